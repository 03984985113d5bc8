"""Fine-tunes on one GPU, tried on a CPU; what the table shows, by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import measuring  # noqa: E402
import one_gpu  # noqa: E402

from moe_builders.families.gpt_oss import gpt_oss  # noqa: E402
from moe_builders.parallel.world import open_world  # noqa: E402

# torch's AdamW is refused for bf16, ours are compiled for many seconds: none of it is tested here
PLAIN = replace(one_gpu.TINY, steps=8, warmup=2, rows=1, length=16, device="cpu", rate=0.05,
                optimizer="torch.optim.SGD")  # fmt: skip


@pytest.mark.parametrize("case", [*one_gpu.CASES.values(), *one_gpu.TINY_CASES.values()],
                         ids=lambda case: case.name)  # fmt: skip
def test_every_case_is_a_configuration(case):
    config = one_gpu.config_of(case)
    assert config.optimizer_in_bwd
    assert (config.router is not None) == (case.routing == "balanced")


def test_weights_are_drawn_where_they_lie():
    model = gpt_oss(
        vocab_size=64, embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        num_experts=4, experts_per_token=2, expert_hidden_dim=16, max_seq_len=64,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    one_gpu.fill_randomly(model, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith("bias"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, name
    assert (model.layers[0].sa_norm.weight == 1).all()
    assert not model.layers[0].attn.q_proj.bias.any()


def build(case):
    with open_world(device="cpu") as world:
        return one_gpu.build(case, one_gpu.config_of(case), world)


def test_fsdp2_on_and_off():
    off = build(replace(PLAIN, fsdp2=False))
    assert not hasattr(next(off.parameters()), "device_mesh")
    assert {p.dtype for p in off.parameters()} == {torch.bfloat16, torch.float32}
    assert hasattr(next(build(replace(PLAIN, fsdp2=True)).parameters()), "device_mesh")


def test_even_routing():
    model = build(replace(PLAIN, routing="balanced", fsdp2=False))
    assert type(model.layers[0].mlp.router).__name__ == "ForcedBalanceRouter"


def step(number, **changes):
    return {"seconds": float(number), "loss": 9.0 - number, "norm": 1.0, "mfu": 0.1 * number,
            "max_violation": number, "peak_bytes": number, "reserved_bytes": 10 * number,
            **changes}  # fmt: skip


def test_a_summary_by_hand():
    case = replace(PLAIN, rows=2, length=6, warmup=1)
    found = one_gpu.summary(case, [step(100), step(1), step(3), step(2)])
    assert found["timed_steps"] == 3
    assert found["tokens_per_second"] == 6
    assert found["tokens_per_second_range"] == [4, 12]
    assert found["mfu"] == pytest.approx(0.2)
    assert (found["peak_bytes"], found["reserved_bytes"]) == (3, 30)
    assert (found["loss_first"], found["loss_last"], found["falls"]) == (-91.0, 7.0, False)
    short = one_gpu.summary(case, [step(1)])  # ended in the warm-up: nothing is timed
    assert "tokens_per_second" not in short
    assert one_gpu.table([{"case": vars(case), "model": {"sharded": True}, "summary": short}])


def run(monkeypatch, tmp_path, answers, *words):
    asked = []

    def run_case(case, deadline):
        asked.append(case)
        return answers[len(asked) - 1]

    monkeypatch.setattr(one_gpu, "run_case", run_case)
    out = tmp_path / "one.json"
    one_gpu.main(["--tiny", "--device", "cpu", "--cases", "tiny", *words, "--out", str(out)])
    return asked, json.loads(out.read_text())


def test_out_of_memory_is_tried_with_half_the_rows(monkeypatch, tmp_path):
    fine = ("done", {"sharded": False}, [step(1), step(1)])
    asked, report = run(monkeypatch, tmp_path, [("out of memory: 9 GiB", {}, []), fine])
    assert [case.rows for case in asked] == [2, 1]
    assert report["skipped"] == [
        "skipped: tiny: out of memory: 9 GiB; tried again with half the rows"
    ]
    assert report["results"][0]["case"]["rows"] == 1


def test_what_time_cut_off_is_kept_and_said(monkeypatch, tmp_path):
    cut = ("its time was over", {"sharded": False}, [step(1), step(1)])
    _, report = run(monkeypatch, tmp_path, [cut])
    assert report["skipped"] == ["skipped: tiny, or the rest of it: its time was over"]
    assert len(report["results"][0]["steps"]) == 2
    asked, report = run(monkeypatch, tmp_path, [], "--minutes", "-1")
    assert (asked, report["results"]) == ([], [])
    assert "over before it began" in report["skipped"][0]


def test_the_first_case_has_the_longest_share(monkeypatch, tmp_path):
    left = []

    def run_case(case, deadline):
        left.append(deadline.left)
        return "done", {"sharded": False}, [step(1), step(1)]

    monkeypatch.setattr(one_gpu, "run_case", run_case)
    out = tmp_path / "one.json"
    one_gpu.main(["--tiny", "--device", "cpu", "--minutes", "4", "--out", str(out)])
    assert left == pytest.approx([180, 240], abs=5)  # 3 / 4 of all; the last one has what is left


def test_steps_on_the_same_rows_teach(monkeypatch):
    """The real thing in this process, but for the optimizer."""
    monkeypatch.setattr(
        one_gpu, "build_optimizer",
        lambda node, model: torch.optim.SGD(model.parameters(), lr=node["lr"]),
    )  # fmt: skip
    told = []
    one_gpu.train(PLAIN, told.append)
    model, *steps = told
    assert model["parameters"] == sum(p.numel() for p in build(PLAIN).parameters())
    assert len(steps) == 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["mfu"] is None  # of a CPU nobody knows the peak


def test_a_process_that_dies_is_told():
    case = replace(PLAIN, model="no such model")
    word, model, steps = one_gpu.run_case(case, measuring.Deadline(1))
    assert word == "its process died; its own message stands above"
    assert (model, steps) == ({}, [])
