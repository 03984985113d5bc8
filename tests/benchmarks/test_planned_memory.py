"""What the plan says of a step's memory is what the allocator sees."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import memory  # noqa: E402

from moe_builders.ops import routed_blocks  # noqa: E402

# the proportions of the shape that is measured, a few hundred times less of it
SMALL = memory.SMALL | {
    "vocab_size": 2048, "embed_dim": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 32, "num_experts": 8, "experts_per_token": 2, "expert_hidden_dim": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("fp32", kind) for kind in memory.KINDS] + [("bf16", "plain"), ("bf16", "checkpointed")],
)
def test_the_plan_of_a_step_is_what_it_takes(dtype, kind, monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "small", SMALL)
    found = memory.compare(memory.Case("small", dtype, kind, rows=2, length=256, device="cpu"))
    assert found["ratio"] == pytest.approx(1, abs=0.1)
    assert found["measured"]["above"] > 0


@pytest.mark.parametrize("kind", ["plain", "checkpointed"])
def test_experts_a_few_at_a_time_need_less_at_once(kind, monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "small", SMALL | {"num_layers": 2})
    monkeypatch.setattr(routed_blocks, "ROWS", 64)
    case = memory.Case("small", "fp32", kind, rows=2, length=1024, device="cpu")
    found = memory.compare(case)
    assert found["ratio"] == pytest.approx(1, abs=0.1)
    monkeypatch.setattr(routed_blocks, "takes_blocks", lambda *_: False)
    whole = memory.compare(case)
    assert whole["measured"]["peak"] > 1.05 * found["measured"]["peak"]


def test_a_trial(tmp_path, capsys):
    out = tmp_path / "new" / "memory.json"
    memory.main(["--shapes", "tiny", "--dtypes", "fp32", "--kinds", "plain", "--rows", "1",
                 "--length", "16", "--threads", "1", "--out", str(out)])  # fmt: skip
    (case,) = json.loads(out.read_text())["results"]
    assert case["ratio"] == case["planned_peak"] / case["measured"]["peak"]
    assert case["planned"]["activations"]["kept"] > 0
    assert "| tiny | fp32 | plain |" in capsys.readouterr().out


def test_time_that_is_up(tmp_path, capsys):
    out = tmp_path / "memory.json"
    memory.main(["--shapes", "tiny", "--minutes", "-1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["results"] == []
    assert len(report["skipped"]) == 8
    assert "skipped: tiny fp32 plain: the -1.0 minutes are over" in capsys.readouterr().out
