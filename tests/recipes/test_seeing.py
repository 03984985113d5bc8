"""What a run of the recipe leaves to look at, on one process and on two."""

import json
import sys

import moe_full_finetune as recipe
import pytest
import torch
from helpers_seeing import EvenDataset
from helpers_train import VOCAB, config, on_ranks, sentence_of

from moe_builders.errors import InputError
from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.flops import model_flops, utilisation
from moe_builders.parallel.launch import launch
from moe_builders.training.run_files import MetricsFile

EVEN = {"_component_": "helpers_seeing.EvenDataset"}
VAL = {"_component_": "helpers_train.RaggedDataset", "num_samples": 8, "seed": 7}
EVERYTHING = {
    "max_steps": 4, "batch_size": 2, "dataset_val": VAL, "run_val_every_n_steps": 2, "plots": True,
    "log_layers": True, "log_experts": 1, "peak_tflops": 0.5,
    "profiler": {"enabled": True, "wait_steps": 1, "warmup_steps": 1, "active_steps": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run on two processes with everything switched on."""
    folder = tmp_path_factory.mktemp("two")
    cfg = config(folder / "run", dataset=EVEN, **EVERYTHING)
    on_ranks(2, {"run": ("losses_and_weights", cfg)}, folder)
    return folder / "run"


def test_the_run_folder(two):
    found = sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file())
    assert [name for name in found if not name.startswith(("logs/", "model/"))] == [
        "environment.json", "metrics.jsonl", "plots/curves.png", "plots/load_step_0.png",
        "plots/load_step_2.png", "plots/load_step_4.png", "plots/usage_step_0.png",
        "plots/usage_step_2.png", "plots/usage_step_4.png", "profile/rank_0.json.gz",
        "profile/rank_0.txt", "profile/rank_1.json.gz", "profile/rank_1.txt",
        "torchtune_config.yaml",
    ]  # fmt: skip
    assert len(list((two / "logs").iterdir())) == 1, "the first process alone writes"
    (start,) = json.loads((two / "environment.json").read_text())
    assert start["num_processes"] == 2


def test_metrics_of_steps_and_validations(two):
    lines = MetricsFile(two / "metrics.jsonl").read()
    marks = [(line["step"], line.get("kind", "step")) for line in lines]
    val = "validation"
    assert marks == [(0, val), (1, "step"), (2, "step"), (2, val), (3, "step"), (4, "step"),
                     (4, val)]  # fmt: skip
    step, last = lines[-2], lines[-1]
    assert {"loss", "balance", "z", "own", "grad_norm", "lr", "tokens_per_second", "mfu",
            "peak_rss_gib", "cut_samples", "max_violation", "dead_experts", "load_entropy",
            "load_cv", "drop_rate", "step", "slowest_rank",
            "slowest_lag_seconds"} == set(step)  # fmt: skip
    tokens = 2 * 2 * 2 * EvenDataset.LENGTH  # two steps of two processes with two rows each
    assert torch.tensor(last["load"]).sum(-1).tolist() == [2 * tokens] * 2, "k is 2"
    assert lines[0]["val_load"] != last["val_load"]
    for name in ("usage", "val_usage"):
        sums = torch.tensor(last[name], dtype=torch.float64).sum(-1)
        torch.testing.assert_close(sums, torch.ones(2).double(), rtol=0, atol=1e-6)
    assert last["layers_drop_rate"] == [0.0, 0.0], "no capacity"


def test_each_layer_is_logged_when_asked_for(two):
    (log,) = (two / "logs").iterdir()
    first = log.read_text().splitlines()[1]
    assert first.startswith("Step 1 | ")
    for layer in (0, 1):
        for measure in ("max_violation", "dead_experts", "load_entropy"):
            assert f"layers.{layer}/{measure}:" in first
    assert "utilisation_p25:" in first
    assert first.count("moe_expert_utilization/layer_") == 2, "the most and the least used one"


def test_mfu_is_flops_over_what_the_devices_could_have_done(two, tmp_path):
    flops = model_flops(qwen3_moe_tiny(vocab_size=VOCAB))
    pairs = (EvenDataset.LENGTH + 1) / 2  # a token's, in the mean
    per_token = 3 * (flops.per_token + flops.per_pair * pairs)
    one = recipe.main(config(tmp_path, dataset=EVEN, max_steps=2, peak_tflops=0.5)).history
    for size, lines in ((1, one), (2, MetricsFile(two / "metrics.jsonl").read())):
        for line in lines:
            if "mfu" in line:
                wanted = line["tokens_per_second"] * per_token / (size * 0.5e12)
                assert line["mfu"] == pytest.approx(wanted, rel=1e-5), size
    assert len(one) == 2


def test_mfu_needs_a_known_peak():
    arguments = {"compute_dtype": torch.bfloat16, "num_devices": 2}
    model = qwen3_moe_tiny()
    cpu = torch.device("cpu")
    assert utilisation(model, peak_tflops=None, device=cpu, **arguments) is None
    given = utilisation(model, peak_tflops=3.0, device=cpu, **arguments)
    assert given is not None
    assert given.peak == 6e12
    assert given.flops == model_flops(model)


def test_mfu_on_a_gpu_that_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu, model = torch.device("cuda", 0), qwen3_moe_tiny()
    narrow = {"peak_tflops": None, "device": gpu, "num_devices": 8, "compute_dtype": torch.bfloat16}
    found = utilisation(model, **narrow)
    assert found is not None
    assert found.peak == 8 * 989e12
    wide = narrow | {"compute_dtype": torch.float32}
    assert utilisation(model, **wide) is None, "fp32 has another peak"
    del model.layers[0].mlp.router.experts_per_token  # somebody's own router
    assert utilisation(model, **narrow) is None
    with pytest.raises(InputError, match="does not tell how many experts"):
        utilisation(model, **narrow | {"peak_tflops": 989.0})


def test_a_second_run_in_the_same_folder_starts_its_own_numbers(tmp_path):
    for steps in (3, 2):
        recipe.main(config(tmp_path, max_steps=steps))
    assert [line["step"] for line in MetricsFile(tmp_path / "metrics.jsonl").read()] == [1, 2]


def test_plots_without_matplotlib_are_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (sentence,) = sentence_of(config(tmp_path / "run", max_steps=1, plots=True))
    assert "plots=true needs the package matplotlib" in sentence
    assert not (tmp_path / "run").exists()


def test_a_profiled_run_that_is_too_short(tmp_path):
    (sentence,) = sentence_of(config(tmp_path, max_steps=5, profiler__enabled=True))
    assert "the profiler needs 6 steps" in sentence
    assert "only 5" in sentence


def noisy_main(config):
    """What libraries do when they are used."""
    import logging
    import warnings

    logging.getLogger("a library").warning("a line to log")
    logging.getLogger("a library").error("an error")
    warnings.warn("a warning", UserWarning, stacklevel=1)


@pytest.mark.parametrize(("rank", "lines"), [("0", 2), ("1", 1)])
def test_only_the_first_process_warns(rank, lines, monkeypatch, caplog):
    import logging

    monkeypatch.setenv("RANK", rank)
    if rank == "0":
        with pytest.raises(UserWarning, match="a warning"):  # tests make them errors
            launch(noisy_main, lambda: None)
    else:
        assert launch(noisy_main, lambda: None) == 0
        assert logging.root.manager.disable == logging.NOTSET, "only while main runs"
    assert [r.message for r in caplog.records] == ["a line to log", "an error"][-lines:]
