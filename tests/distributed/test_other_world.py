"""A run goes on with another number of processes: weights and states exactly, losses but for sums.

2 processes save, 1 goes on, 2 go on from what that one saved; plain, local and 8-bit states.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers_saves import losses_and_notes, values_in
from helpers_train import config, on_ranks
from moe_full_finetune import build_model

from moe_builders.parallel.dcp import stored_tensors
from moe_builders.parallel.world import open_world

RUN = "helpers_saves.losses_and_notes"
OPTIMIZERS = {
    "adamw": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
    "own": {"_component_": "helpers_resume.OwnMomentum", "lr": 0.05},
    "8bit": {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 1e-3},
}
PLAIN = ("adamw", "own")


def _config(folder, name, size, **changes):
    keys = {"checkpoint_every_n_steps": 1, "keep_last": None, "max_steps": 4} | changes
    return config(folder / f"{name} on {size}", optimizer=OPTIMIZERS[name], batch_size=4 // size,
                  **keys)  # fmt: skip


def _checkpoint(cfg, step):
    return f"{cfg.output_dir}/checkpoints/step_{step:08d}"


def _from(cfg, other, step):
    return dataclasses.replace(cfg, resume=_checkpoint(other, step),
                               output_dir=f"{cfg.output_dir} from {step}")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(processes so far, optimizer): (config, losses and notes)}; 8 bits do no further steps."""
    folder = tmp_path_factory.mktemp("worlds")
    straight = {name: _config(folder, name, 2) for name in OPTIMIZERS}
    alone, again = {}, {}
    for name, cfg in straight.items():
        steps = {} if name in PLAIN else {"max_steps": 1}
        alone[name] = _from(_config(folder, name, 1, **steps), cfg, 1)
        step = 2 if name in PLAIN else 1
        again[name] = _from(_config(folder, name, 2, **steps), alone[name], step)
    found = {"2": on_ranks(2, {name: (RUN, cfg) for name, cfg in straight.items()}, folder)}
    found["2, 1"] = {name: losses_and_notes(cfg) for name, cfg in alone.items()}
    found["2, 1, 2"] = on_ranks(2, {name: (RUN, cfg) for name, cfg in again.items()}, folder)
    configs = {"2": straight, "2, 1": alone, "2, 1, 2": again}
    return {(way, name): (configs[way][name], answer)
            for way, answers in found.items() for name, answer in answers.items()}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_losses_go_on(runs, name):
    straight = torch.tensor(runs["2", name][1]["losses"], dtype=torch.float64)
    for way, step in (("2, 1", 1), ("2, 1, 2", 2)):
        found = torch.tensor(runs[way, name][1]["losses"], dtype=torch.float64)
        assert len(found) == len(straight) == 4
        assert torch.equal(found[:1], straight[:1]), "history"
        gap = (found - straight).abs() / straight
        assert gap[step] <= 1e-6, "the next step's loss is that of the same weights"
        assert gap.max() <= 1e-5


def _rounded(said):
    """(how many entries a run has quantised anew, the first of them)."""
    (line,) = [line for line in said if "quantised anew" in line] or ["0"]
    return int(line.split()[0]), set(re.findall(r"optimizer\.[\w.]+", line))


def _quantised(folder):
    parts = map(re.compile(r"(.+)\.codes\[.+").fullmatch, stored_tensors(Path(folder)))
    return {match[1] for match in parts if match is not None}


def test_quantised_states_are_the_same_values_but_those_that_are_named(runs):
    with open_world(device="cpu") as world:
        model = build_model(runs["2, 1", "8bit"][0], world).model
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ways = ("2", "2, 1", "2, 1, 2")
    folders = [_checkpoint(runs[way, "8bit"][0], 1) for way in ways]
    two, one, again = (values_in(folder, shapes) for folder in folders)
    # halves of these are too small for blocks and were fp32
    small = _quantised(folders[1]) - _quantised(folders[0])
    assert len(small) == 12
    assert len(_quantised(folders[0])) > 4
    count, named = _rounded(runs["2, 1", "8bit"][1]["said"])
    assert (count, len(named)) == (12, 5)
    assert named < small
    assert _rounded(runs["2, 1, 2", "8bit"][1]["said"]) == (0, set())
    for name, value in two.items():
        assert value.abs().max() > 0
        assert torch.equal(again[name], one[name]), "fp32 holds what 8 bits held"
        assert torch.equal(value, one[name]) == (name not in small), name
        assert (value - one[name]).abs().max() <= 0.02 * value.abs().max()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_said_of_the_processes(runs, name):
    one, two = (
        f"{count} (dp_replicate 1, dp_shard {count[0]}, ep 1)"
        for count in ("1 process", "2 processes")
    )
    for way, was, now in (("2, 1", two, one), ("2, 1, 2", one, two)):
        sentence = f"the checkpoint is of {was}, this run of {now}: sums are rounded in another"
        assert any(sentence in line for line in runs[way, name][1]["said"])
    assert not [line for line in runs["2", name][1]["said"] if "checkpoint is of" in line]
