"""A run that was stopped and goes on ends in the same bytes as one that never stopped."""

import pytest
import torch
from helpers_data import isolate_datasets
from helpers_resume import data_keys, differences_after_resuming, write_data
from helpers_saves import differences_of_background
from helpers_train import config, on_ranks

SCHEDULE = {"_component_": "torchtune.training.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 2}  # fmt: skip
LOW_BIT = {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 1e-3}
OPTIMIZERS = {
    "adamw": {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}},
    "8-bit": {"optimizer": LOW_BIT, "param_dtype": "bf16", "compute_dtype": "bf16"},
    "in backward": {
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "optimizer_in_bwd": True, "clip_grad_norm": None,
    },
}  # fmt: skip
KINDS = ("packed", "streamed", "mixed")
STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    isolate_datasets(tmp_path, monkeypatch)


def _config(folder, data, optimizer, kind, **changes):
    keys = OPTIMIZERS[optimizer] | data_keys(kind, data) | {"lr_scheduler": SCHEDULE}
    return config(folder, **(keys | {"max_steps": STEPS} | changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process(tmp_path, data, optimizer, kind):
    cfg = _config(tmp_path / "run", data, optimizer, kind, run_val_every_n_steps=2,
                  dataset_val=data_keys("packed", data)["dataset"])  # fmt: skip
    found = differences_after_resuming(cfg, [1, 4])
    assert found == {1: [], 4: []}


def test_the_same_bytes_in_the_background(tmp_path, data):
    cfg = _config(tmp_path / "run", data, "8-bit", "packed")
    with torch.compiler.set_stance("force_eager"):  # torchao compiles each shape: seconds
        assert differences_of_background(cfg) == []


def test_two_processes(tmp_path, data):
    cases = {
        f"{optimizer}, {kind}": (
            "helpers_resume.differences_after_resuming",
            _config(tmp_path / f"{optimizer}{kind}", data, optimizer, kind, batch_size=1),
            [2],
        )
        for optimizer in OPTIMIZERS
        for kind in KINDS
    }
    background = _config(tmp_path / "background", data, "adamw", "packed", batch_size=1,
                         enable_async_checkpointing=True)  # fmt: skip
    cases["in the background"] = ("helpers_resume.differences_after_resuming", background, [2])
    both = {"both ways": ("helpers_saves.differences_of_background", background)}
    answers = on_ranks(2, cases | both, tmp_path)
    assert answers.pop("both ways") == []
    assert answers == {name: {2: []} for name in cases}


@pytest.mark.full
@pytest.mark.parametrize("kind", [*KINDS, "mixed streams"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 2])
def test_at_every_step(tmp_path, data, optimizer, kind, size):
    cfg = _config(tmp_path / "run", data, optimizer, kind, max_steps=None, epochs=2,
                  gradient_accumulation_steps=1 if "backward" in optimizer else 2,
                  batch_size=2 // size)  # fmt: skip
    if "stream" in kind:
        cfg.max_steps, cfg.epochs = 12, 1 if "mixed" in kind else 9
    stops = list(range(1, 12))
    case = ("helpers_resume.differences_after_resuming", cfg, stops)
    found = on_ranks(size, {"case": case}, tmp_path)["case"]
    assert found == {stop: [] for stop in stops}
