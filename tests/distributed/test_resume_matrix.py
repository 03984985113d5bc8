"""4 processes with experts over 2 of them save; other worlds go on: the same tensors, to the bit.

Each world goes on twice: once it does no step and saves what it has read, once it goes to the end.
"""

import dataclasses

import pytest
import torch
from helpers_saves import losses_and_notes, values_in
from helpers_train import config, on_ranks
from moe_full_finetune import build_model

from moe_builders.checkpoint.run_checkpoints import read_checkpoint
from moe_builders.parallel.dcp import stored_tensors
from moe_builders.parallel.world import open_world

SAVED, STEPS = 2, 4
WORLDS = {  # processes, keys, what a note says of them
    "4, ep 2": (4, {"ep": 2}, "4 processes (dp_replicate 1, dp_shard 2, ep 2)"),
    "2, ep 1": (2, {}, "2 processes (dp_replicate 1, dp_shard 2, ep 1)"),
    "4, ep 4": (4, {"ep": 4, "ep_dispatcher": "all_gather"},
                "4 processes (dp_replicate 1, dp_shard 1, ep 4)"),
    "1": (1, {}, "1 process (dp_replicate 1, dp_shard 1, ep 1)"),
}  # fmt: skip
FIRST, *OTHERS = WORLDS
OPTIMIZERS = {
    "adamw": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
    "8bit": {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 1e-3},
}


def _config(folder, world, name, **changes):
    size, keys, _ = WORLDS[world]
    return config(
        folder / f"{world} {name} {len(changes)}", optimizer=OPTIMIZERS[name], batch_size=4 // size,
        checkpoint_every_n_steps=1, keep_last=None, **{"max_steps": STEPS} | keys | changes,
    )  # fmt: skip


def _checkpoint(cfg):
    return f"{cfg.output_dir}/checkpoints/step_{SAVED:08d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(world, optimizer): {"read" and "on": (config, losses and notes)}}."""
    folder, run = tmp_path_factory.mktemp("matrix"), "helpers_saves.losses_and_notes"
    found, first = {}, {name: _config(folder, FIRST, name) for name in OPTIMIZERS}
    for world, (size, _, _) in WORLDS.items():
        configs = {f"{name} on": cfg for name, cfg in first.items()}
        if world != FIRST:
            configs = {}
            for name, cfg in first.items():
                resume = {"resume": _checkpoint(cfg)}
                configs[f"{name} on"] = _config(folder, world, name, **resume)
                configs[f"{name} read"] = _config(folder, world, name, max_steps=SAVED, **resume)
        if size == 1:
            answers = {case: losses_and_notes(cfg) for case, cfg in configs.items()}
        else:
            answers = on_ranks(size, {case: (run, cfg) for case, cfg in configs.items()}, folder)
        for case, answer in answers.items():
            name, what = case.split()
            found.setdefault((world, name), {})[what] = configs[case], answer
    return found


@pytest.fixture(scope="module")
def shapes(runs):
    cfg = dataclasses.replace(runs["1", "adamw"]["on"][0])
    with open_world(device="cpu") as world:
        return {n: tuple(p.shape) for n, p in build_model(cfg, world).model.named_parameters()}


def _weights(folder):
    checkpoint = read_checkpoint(folder)
    stored = stored_tensors(checkpoint.folder).items()
    tensors = {n: torch.zeros(s, dtype=d) for n, (s, d) in stored if n.startswith("model.")}
    with open_world(device="cpu"):
        checkpoint.read(tensors)
    return tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", OTHERS)
def test_what_was_saved_is_what_is_read(runs, shapes, world, name):
    first = _checkpoint(runs[FIRST, name]["on"][0])
    cfg, answer = runs[world, name]["read"]
    wanted, found = _weights(first), _weights(_checkpoint(cfg))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    wanted, found = values_in(first, shapes), values_in(_checkpoint(cfg), shapes)
    differ = [n for n in wanted if not torch.equal(found[n], wanted[n])]
    rounded = [line for line in answer["said"] if "quantised anew" in line]
    assert len(differ) == (int(rounded[0].split()[0]) if rounded else 0), differ
    assert name == "8bit" or not differ
    for entry in differ:
        gap = (found[entry] - wanted[entry]).abs().max()
        assert gap <= 0.02 * wanted[entry].abs().max(), entry


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", OTHERS)
def test_losses_go_on(runs, world, name):
    straight = torch.tensor(runs[FIRST, name]["on"][1]["losses"], dtype=torch.float64)
    found = torch.tensor(runs[world, name]["on"][1]["losses"], dtype=torch.float64)
    assert len(found) == len(straight) == STEPS
    assert torch.equal(found[:SAVED], straight[:SAVED]), "history"
    gap = (found - straight).abs() / straight
    assert gap[SAVED] <= 1e-6, "the next step's loss is that of the same weights"
    assert name == "8bit" or gap.max() <= 1e-5


@pytest.mark.parametrize("world", OTHERS)
def test_both_meshes_are_named(runs, world):
    said = runs[world, "adamw"]["on"][1]["said"]
    sentence = f"the checkpoint is of {WORLDS[FIRST][2]}, this run of {WORLDS[world][2]}: sums are"
    assert any(sentence in line for line in said)
