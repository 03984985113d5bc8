"""The benchmark runs, measures equal work, and keeps every timing."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import balance  # noqa: E402
import import_cost  # noqa: E402
import measuring  # noqa: E402
import train_step  # noqa: E402

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_memory_by_hand():
    kept = []

    def work():
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(5 * MIB, dtype=torch.uint8)
        del first
        kept[:] = [torch.empty(2 * MIB, dtype=torch.uint8)]  # until the next call
        del second

    # 3 + 5, and what the call before left
    assert measuring.peak_bytes(work, CPU) == 10 * MIB


def test_what_a_model_needs():
    model = torch.nn.Linear(10, 10, bias=False)
    model.register_parameter("frozen", torch.nn.Parameter(torch.zeros(7), requires_grad=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones(10, 10)
    optimizer.step()
    needed = train_step.needed_bytes(model, optimizer)
    assert needed == {"weights": 428, "gradients": 400, "state": 804}  # two moments, and a count


def values(seconds, above=100):
    return {"seconds": seconds, "cpu_seconds": seconds, "bytes": {"above": above}}


def test_ratios_by_hand():
    found = {"recipe": values([1.0, 2.0, 4.0], 50), "grouped_mm": values([2.0, 2.0, 2.0]),
             "eager": values([9.0, 9.0, 9.0])}  # fmt: skip
    summary = train_step.compare(found, tokens=100)
    assert summary["best_of_transformers"] == "grouped_mm"
    ours = summary["ways"]["recipe"]
    assert ours["tokens_per_second"] == 50
    assert ours["speed_ratio"] == 1
    assert ours["speed_ratio_range"] == [0.5, 2]
    assert ours["memory_ratio"] == 0.5


def test_unequal_work_is_refused():
    found = {"recipe": {"losses": [5.0], "norms": [1.0]}, "eager": {"losses": [5.01], "norms": [1]}}
    with pytest.raises(SystemExit, match="do not do the same work: first losses are"):
        train_step.check_equal_work(found, "fp32")
    found["eager"]["losses"] = [5.0004]
    assert train_step.check_equal_work(found, "fp32")["losses"] == pytest.approx(8e-5, rel=0.01)
    found["eager"]["norms"] = [float("nan")]
    with pytest.raises(SystemExit, match="first norms"):
        train_step.check_equal_work(found, "fp32")


def test_a_trial_from_the_command_line(tmp_path):
    out = tmp_path / "new" / "trial.json"
    command = [
        sys.executable, str(ROOT / "benchmarks/train_step.py"), "--shapes", "tiny", "--dtypes",
        "mixed", "--ways", "recipe", "bare", "grouped_mm", "--rows", "2", "--length", "16",
        "--repeats", "2", "--warmup", "1", "--threads", "1", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "skipped: tiny mixed bare: computing in another dtype" in done.stdout
    assert "<- transformers' best" in done.stdout
    report = json.loads(out.read_text())
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["skipped"]) == 1
    (result,) = report["results"]
    for way in ("recipe", "grouped_mm"):
        assert len(result["ways"][way]["seconds"]) == 2
        assert len(result["ways"][way]["losses"]) == 3
        assert result["ways"][way]["bytes"]["above"] > 0


def test_import_cost_from_the_command_line(tmp_path):
    out = tmp_path / "cost.json"
    command = [
        sys.executable, str(ROOT / "benchmarks/import_cost.py"), "--gib", "0.02", "--vocab-size",
        "512", "--processes", "1", "--shard-mib", "50", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["checkpoint"]["files"] == 3
    (result,) = report["results"]
    assert 0 < result["model"] == pytest.approx(report["checkpoint"]["total"], rel=0.01)
    assert result["ranks"][0]["load"]["peak_above"] > 0
    assert "save: above" in done.stdout


def test_an_export_that_differs_is_seen(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        import_cost.save_file({"t": torch.tensor([value])}, tmp_path / name / "x.safetensors")
    assert import_cost.same_bytes(tmp_path / "a", tmp_path / "b")
    assert not import_cost.same_bytes(tmp_path / "a", tmp_path / "c")
    (tmp_path / "b" / "y.safetensors").write_bytes(b"")
    assert not import_cost.same_bytes(tmp_path / "a", tmp_path / "b")


def test_every_way_of_balancing_is_a_configuration_of_its_own(tmp_path):
    args = argparse.Namespace(rows=2, steps=3, seed=0, every=1)
    configs = {way: balance.run_config(tmp_path, tmp_path / "out", args, way)
               for way in balance.WAYS}  # fmt: skip
    for way, config in configs.items():
        same = [name for name, other in configs.items() if other == config]
        assert same == [way]
        assert config.dataset == configs["none"].dataset
        assert config.optimizer == configs["none"].optimizer
    assert configs["none"].router_losses.load_balancing_coef == 0


def test_the_end_of_a_run_by_hand():
    steps = [{"max_violation": float(n), "drop_rate": 0.0, "dead_experts": 2.0} for n in range(20)]
    ends = [{"val_loss": 5.0, "val_max_violation": 0.5}, {"val_loss": 4.5, "val_max_violation": 1}]
    found = {"history": steps, "validations": ends}
    assert balance.summary(found) == {"val_loss": 4.5, "val_max_violation": 1,
                                      "max_violation": 18.5, "drop_rate": 0,
                                      "dead_experts": 2}  # fmt: skip
    assert balance.table({"none": found}).splitlines()[-1] == (
        "| none | 4.500 | 1.000 | 18.500 | 0.000 | 2.000 |"
    )


def test_the_page_on_balancing_shows_what_was_measured():
    measured = json.loads((ROOT / "benchmarks/results/balance_cpu.json").read_text())
    assert list(measured["runs"]) == list(balance.WAYS)
    assert balance.table(measured["runs"]) in (ROOT / "docs/balancing.md").read_text()
