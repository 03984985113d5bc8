"""Where a run goes on from, what it says about it, and what it refuses."""

import errno
import json
import os
import shutil
from pathlib import Path

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import HF_CONFIG, config, on_ranks
from safetensors.torch import load_file

from moe_builders.checkpoint import run_checkpoints, saving
from moe_builders.errors import InputError
from moe_builders.hub import HFSource, create_hf_model, read_hf_source

EVERY = {"checkpoint_every_n_steps": 2, "keep_last": None}
SCHEDULE = {"_component_": "torchtune.training.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 2}  # fmt: skip


def _names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def _weights(trained):
    return load_file(trained.model_folder / "model.safetensors")


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_command_goes_on_from_the_newest_and_a_longer_run_is_one_run(tmp_path, capsys):
    whole = recipe.main(config(tmp_path / "whole", max_steps=6))
    recipe.main(config(tmp_path / "run", max_steps=3, **EVERY))
    assert _names(tmp_path / "run") == ["step_00000002", "step_00000003"]
    capsys.readouterr()
    again = recipe.main(config(tmp_path / "run", max_steps=6, **EVERY))
    said = capsys.readouterr().out
    assert "going on from" in said
    assert "step_00000003 (step 3)" in said
    assert "the new value counts: max_steps: 3 -> 6" in said
    assert [v["step"] for v in again.history] == [1, 2, 3, 4, 5, 6]
    assert [v["loss"] for v in again.history] == [v["loss"] for v in whole.history]
    assert _equal(_weights(again), _weights(whole))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "kind" not in line] == [1, 2, 3, 4, 5, 6]
    assert len(json.loads((tmp_path / "run/environment.json").read_text())) == 2


def test_a_run_that_is_done_has_nothing_left_to_do(tmp_path):
    first = recipe.main(config(tmp_path, max_steps=2, **EVERY))
    weights = _weights(first)
    again = recipe.main(config(tmp_path, max_steps=2, **EVERY))
    assert again.history == first.history
    assert _equal(_weights(again), weights)


def test_starting_over_is_asked_for(tmp_path, capsys):
    recipe.main(config(tmp_path, max_steps=2, **EVERY))
    again = recipe.main(config(tmp_path, max_steps=1, resume="never", **EVERY))
    assert "checkpoints.1, since this run goes another way: step_00000002" in (
        capsys.readouterr().out
    )
    assert len(again.history) == 1
    assert _names(tmp_path) == ["step_00000001"]
    assert (tmp_path / "checkpoints.1/step_00000002").is_dir()


def test_rates_and_schedule_are_those_of_now(tmp_path, capsys):
    rates = {}
    for name, lr in (("slow", 1e-3), ("fast", 1e-2)):
        cfg = config(tmp_path / name, max_steps=6, lr_scheduler=SCHEDULE, optimizer__lr=lr, **EVERY)
        rates[name] = [v["lr"] for v in recipe.main(cfg).history]
    assert rates["slow"] != rates["fast"]
    capsys.readouterr()
    cfg = config(
        tmp_path / "changed", max_steps=6, lr_scheduler=SCHEDULE, optimizer__lr=1e-2,
        resume=str(tmp_path / "slow/checkpoints/step_00000004"),
    )  # fmt: skip
    changed = [v["lr"] for v in recipe.main(cfg).history]
    assert changed == rates["slow"][:4] + rates["fast"][4:]
    assert "the new value counts: optimizer.lr: 0.001 -> 0.01" in capsys.readouterr().out


def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path):
    """fp64, so that only the order of sums differs."""
    momentum = {"_component_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9}
    keys = {"param_dtype": "fp64", "compute_dtype": "fp64", "max_steps": 6, "optimizer": momentum}
    straight = recipe.main(config(tmp_path / "one", batch_size=4, **keys, **EVERY))
    cfg = config(tmp_path / "two", batch_size=2, **keys,
                 resume=str(tmp_path / "one/checkpoints/step_00000004"))  # fmt: skip
    answer = on_ranks(2, {"two": ("losses_and_weights", cfg)}, tmp_path)["two"]
    wanted = torch.tensor([v["loss"] for v in straight.history], dtype=torch.float64)
    found = torch.tensor(answer["loss"], dtype=torch.float64)
    assert (wanted - found).abs().max() <= 1e-10
    for name, weight in _weights(straight).items():
        assert (answer["weights"][name] - weight).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}},
         "holds the state of AdamW, which SGD cannot go on with"),
        ({"model__vocab_size": 80}, "does not fit this run: "),
        ({"param_dtype": "fp64", "compute_dtype": "fp64"},
         "of another shape or dtype (model.tok_embeddings.weight is float64 [64, 64], was float32"),
        ({"dataset": {"_component_": "helpers_train.RaggedDataset", "num_samples": 81}},
         "the numbers of rows of the data sets was 80 when it was saved and is now 81"),
        ({"dataset": {"_component_": "helpers_train.RaggedDataset", "packed": True}}, "packed"),
        ({"resume": "no"}, "resume is 'no', but must be auto, never, or the folder of"),
        ({"resume": str(Path(__file__).parent)}, "recipes is not a complete checkpoint: run.json"),
    ],
    ids=["optimizer", "model", "dtype", "rows", "packed", "word", "folder"],
)  # fmt: skip
def test_what_cannot_go_on(tmp_path, changes, sentence):
    recipe.main(config(tmp_path, max_steps=2, **EVERY))
    before = _names(tmp_path)
    with pytest.raises(InputError) as caught:
        recipe.main(config(tmp_path, max_steps=3, **EVERY | changes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _names(tmp_path) == before


def test_a_damaged_one_is_passed_over_aloud(tmp_path, capsys):
    recipe.main(config(tmp_path, max_steps=4, **EVERY))
    os.truncate(tmp_path / "checkpoints/step_00000004/__0_0.distcp", 999)
    again = recipe.main(config(tmp_path, max_steps=3))
    said = capsys.readouterr().out
    assert "step_00000004 is passed over: __0_0.distcp has 999 bytes" in said
    assert "step_00000002 (step 2)" in said
    assert len(again.history) == 3


def test_one_of_an_earlier_version_is_gone_on_from_and_named(tmp_path, capsys):
    """Sizes without checksums, a number of processes without a mesh."""
    whole = recipe.main(config(tmp_path / "whole", max_steps=4, **EVERY))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000004")
    path = tmp_path / "run/checkpoints/step_00000002/run.json"
    facts = json.loads(path.read_text())
    facts["files"] = {name: entry["bytes"] for name, entry in facts["files"].items()}
    del facts["checksum"], facts["mesh"]
    path.write_text(json.dumps(facts | {"format": 1}))
    capsys.readouterr()
    again = recipe.main(config(tmp_path / "run", max_steps=4, **EVERY))
    said = capsys.readouterr().out
    assert "step_00000002 is of an earlier version, without checksums: only the sizes" in said
    assert "the checkpoint is of" not in said
    assert _equal(_weights(again), _weights(whole))


def test_a_diverged_run_saves_nothing_and_the_last_good_one_stays(tmp_path):
    cfg = config(tmp_path, max_steps=8, checkpoint_every_n_steps=1, keep_last=None,
                 optimizer={"_component_": "torch.optim.SGD", "lr": 1e30})  # fmt: skip
    with pytest.raises(InputError, match=r"at step 2, first in layers\.0 on rank 0"):
        recipe.main(cfg)
    assert _names(tmp_path) == ["step_00000001"], "of the step whose values were finite"
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_during_a_run(tmp_path, monkeypatch, background):
    """In the background it is told at the next save, or at the end."""
    real, calls = saving._write_text, []

    def full(file, text):
        calls.append(text)
        if len(calls) > 3:  # three a checkpoint: the second save fails
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, text)

    monkeypatch.setattr(saving, "_write_text", full)
    with pytest.raises(InputError) as caught:
        recipe.main(config(tmp_path, max_steps=5, enable_async_checkpointing=background, **EVERY))
    sentence = str(caught.value)
    assert not (tmp_path / "model").exists()
    assert _names(tmp_path) == ["step_00000002"]
    assert "step_00000004 cannot be written: [Errno 28] No space left on device" in sentence
    assert "step_00000002 is the last" in sentence
    monkeypatch.undo()
    calm = recipe.main(config(tmp_path / "calm", max_steps=6))
    assert _equal(_weights(recipe.main(config(tmp_path, max_steps=6))), _weights(calm))


@pytest.mark.parametrize("on", [1, 2])
def test_a_folder_replaced_by_a_file_during_a_run(tmp_path, on):
    """The data set does it, in the middle of the run; each process says the same sentence."""
    spoiler = {"_component_": "helpers_resume.Spoiler",
               "folder": str(tmp_path / "run/checkpoints")}  # fmt: skip
    cfg = config(tmp_path / "run", max_steps=6, dataset=spoiler, batch_size=4 // on, **EVERY)
    sentences = set(on_ranks(on, {"case": ("sentence_of", cfg)}, tmp_path)["case"])
    (sentence,) = sentences
    assert "checkpoints is a file, but a folder is to be written at" in sentence
    assert "there is no earlier one" in sentence


def test_early_stop(tmp_path, capsys):
    cfg = config(
        tmp_path, max_steps=50, epochs=10, run_val_every_n_steps=1, early_stop_patience=2,
        dataset_val={"_component_": "helpers_train.RaggedDataset", "num_samples": 8, "seed": 9},
        optimizer={"_component_": "torch.optim.AdamW", "lr": 0.3}, **EVERY,
    )  # fmt: skip
    trained = recipe.main(cfg)
    losses = [v["val_loss"] for v in trained.validations]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) - 1 - best == 2
    assert len(trained.history) == len(losses) - 1 < 50
    assert f"stopped early at step {len(trained.history)}" in capsys.readouterr().out
    assert trained.model_folder.is_dir()
    assert _names(tmp_path)[-1] == f"step_{len(trained.history):08d}"


def test_the_hf_layout_is_kept_in_the_checkpoint(tmp_path):
    base = tmp_path / "base"
    create_hf_model(base, HF_CONFIG, seed=0)
    keys = {"model": None, "base_model": str(base), "max_steps": 2} | EVERY
    recipe.main(config(tmp_path / "run", **keys))
    facts = json.loads((tmp_path / "run/checkpoints/step_00000002/run.json").read_text())
    assert HFSource.from_json(facts["hf_source"]) == read_hf_source(base)
    shutil.rmtree(tmp_path / "run/model")
    again = recipe.main(config(tmp_path / "run", **keys))
    assert (again.model_folder / "config.json").is_file()


def test_deterministic_training_changes_no_number_here(tmp_path):
    plain = recipe.main(config(tmp_path / "a", max_steps=3))
    strict = recipe.main(config(tmp_path / "b", max_steps=3, deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled(), "of this run alone"
    assert [v["loss"] for v in plain.history] == [v["loss"] for v in strict.history]
    assert _equal(_weights(plain), _weights(strict))


def test_the_run_folder(tmp_path):
    recipe.main(config(tmp_path, max_steps=2, plots=True, **EVERY))
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == [
        "checkpoints", "environment.json", "logs", "metrics.jsonl", "model", "plots",
        "torchtune_config.yaml",
    ]  # fmt: skip


def test_going_back_and_another_way_is_what_counts_from_then_on(tmp_path, capsys):
    recipe.main(config(tmp_path, max_steps=6, **EVERY))
    back = {"resume": str(tmp_path / "checkpoints/step_00000002"), "optimizer__lr": 1e-2}
    other = recipe.main(config(tmp_path, max_steps=6, **EVERY | back))
    assert "since this run goes another way: step_00000004, step_00000006" in (
        capsys.readouterr().out
    )
    again = recipe.main(config(tmp_path, max_steps=6, **EVERY | {"optimizer__lr": 1e-2}))
    assert [v["loss"] for v in again.history] == [v["loss"] for v in other.history]
    assert _equal(_weights(again), _weights(other))


def test_a_damaged_last_one_is_written_again(tmp_path):
    whole = recipe.main(config(tmp_path, max_steps=4, **EVERY))
    (tmp_path / "checkpoints/step_00000004/run.json").write_text("{")
    again = recipe.main(config(tmp_path, max_steps=4, **EVERY))
    assert _equal(_weights(again), _weights(whole))
    assert run_checkpoints.read_checkpoint(tmp_path / "checkpoints/step_00000004").step == 4


def test_a_folder_without_a_whole_one_is_not_silently_begun_anew(tmp_path):
    recipe.main(config(tmp_path, max_steps=2, **EVERY))
    (tmp_path / "checkpoints/step_00000002/run.json").unlink()
    with pytest.raises(InputError, match=r"none of the checkpoints in .* is whole \(step_00000002"):
        recipe.main(config(tmp_path, max_steps=2, **EVERY))


@pytest.mark.parametrize("batch_size", [2, 8])
def test_another_batch_size_sees_the_rest_of_the_epoch_once(tmp_path, batch_size):
    """80 samples: 8 steps of 4 before, 48 samples left."""
    cfg = config(tmp_path, max_steps=8, batch_size=4, **EVERY)
    recipe.main(cfg)
    again = recipe.main(config(tmp_path, batch_size=batch_size, lr_scheduler=SCHEDULE, **EVERY))
    assert len(again.history) == 8 + 48 // batch_size
    assert again.history[-1]["lr"] < 1e-3 * 0.2, "the schedule ends with the run"


def test_fewer_steps_than_done(tmp_path):
    recipe.main(config(tmp_path, max_steps=4, **EVERY))
    with pytest.raises(InputError, match="max_steps is 3, but the run that goes on has done 4"):
        recipe.main(config(tmp_path, max_steps=3, **EVERY))


def test_a_run_that_has_stopped_early_stays_stopped(tmp_path):
    keys = {
        "max_steps": 50, "epochs": 10, "run_val_every_n_steps": 1, "early_stop_patience": 2,
        "dataset_val": {"_component_": "helpers_train.RaggedDataset", "num_samples": 8, "seed": 9},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.3},
    } | EVERY  # fmt: skip
    first = recipe.main(config(tmp_path, **keys))
    again = recipe.main(config(tmp_path, **keys))
    assert again.history == first.history
    assert again.validations == first.validations
    assert _equal(_weights(again), _weights(first))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Loss and norm of the step were fine; its update was not."""
    real = recipe.update

    def update(stepper, scheduler, cfg):
        norm = real(stepper, scheduler, cfg)
        with torch.no_grad():
            stepper.parameters[0].view(-1)[0] = float("inf")
        return norm

    monkeypatch.setattr(recipe, "update", update)
    with pytest.raises(InputError, match="is not finite after step 1: training has diverged"):
        recipe.main(config(tmp_path, max_steps=4, checkpoint_every_n_steps=1))
    assert not (tmp_path / "checkpoints").exists()


def test_optimizers_with_states_of_their_own_kind(tmp_path):
    """A step that is a plain number, and momentum kept as this process's part alone."""
    keys = {
        "optimizer": {"_component_": "helpers_resume.OwnMomentum", "lr": 0.05},
        "compute_dtype": "bf16",
        "batch_size": 2,
        "max_steps": 4,
        "run_val_every_n_steps": 2,
        "dataset_val": {"_component_": "helpers_train.RaggedDataset", "num_samples": 8},
    }
    for size in (1, 2):
        cfg = config(tmp_path / str(size), **keys)
        case = ("helpers_resume.differences_after_resuming", cfg, [2])
        assert on_ranks(size, {"case": case}, tmp_path)["case"] == {2: []}
