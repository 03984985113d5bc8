"""The layer's benchmark: equal work is checked, limits are those worked out by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import layer_ways  # noqa: E402
import limits  # noqa: E402
import measuring  # noqa: E402
import moe_layer  # noqa: E402

CPU = torch.device("cpu")
SIZE = layer_ways.Size(16, 8, 4, 2)


def problem(kind="uniform", tokens=12, dtype=torch.float32, size=SIZE):
    ids = layer_ways.draw_ids(size, tokens, kind)
    return layer_ways.make_problem(size, ids, dtype=dtype, device=CPU)


@pytest.mark.parametrize("kind", [*moe_layer.ROUTINGS, "ragged"])
def test_choices_of_a_token_differ(kind):
    size = layer_ways.Size(8, 8, 16, 4)
    ids = layer_ways.draw_ids(size, 400, kind)
    assert ids.shape == (400, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    load = torch.bincount(ids.flatten(), minlength=16)
    if kind == "balanced":
        assert load.max() - load.min() <= 1
    elif kind == "zipf":
        assert load.max() > 4 * load.min()
    elif kind == "ragged":
        assert (load[2::3] == 0).all()
    else:
        assert load.max() < 1.5 * load.min()


def test_the_reference_is_what_autograd_says():
    """Without sorting, without batched weights, in fp64."""
    made = problem("ragged", dtype=torch.float64)
    leaves = [v.detach().requires_grad_() for v in (made.x, made.gate_up, made.down)]
    x, gate_up, down = leaves
    weights = made.weights.detach().double().requires_grad_()
    rows = []
    for token in range(12):
        total = torch.zeros(16, dtype=torch.float64)
        for choice in range(2):
            expert = made.ids[token, choice]
            gate, value = (gate_up[expert] @ x[token]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * value
            total = total + weights[token, choice] * (down[expert] @ hidden)
        rows.append(total)
    answer = torch.stack(rows)
    answer.backward(made.grad)
    found = layer_ways.reference(made, torch.float64)
    torch.testing.assert_close(found["answer"], answer.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["x"], x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["weights"], weights.grad, rtol=1e-12, atol=1e-12)
    for name, leaf in (("gate_up", gate_up), ("down", down)):  # kept in fp32: they are large
        torch.testing.assert_close(found[name], leaf.grad.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", list(moe_layer.DTYPES))
def test_ways_compute_the_same_layer(dtype):
    names = ["ours", "plain", "loop", "hf_grouped", "hf_eager"]
    errors = moe_layer.check_ways(names, problem(dtype=moe_layer.DTYPES[dtype]), dtype)
    assert set(errors) == set(names)


def test_a_way_that_computes_something_else_is_refused(monkeypatch):
    def wrong(made):
        return layer_ways.ours(replace(made, down=torch.nn.Parameter(made.down * 1.001)))

    monkeypatch.setitem(layer_ways.WAYS, "ours", wrong)
    with pytest.raises(SystemExit, match="ours does not compute the layer: off by"):
        moe_layer.check_ways(["ours"], problem(), "fp32")


def test_a_gradient_that_is_missing_or_nan_is_seen():
    made = problem()
    way = layer_ways.plain(made)
    wanted = layer_ways.reference(made, torch.float64)
    assert layer_ways.error_of(way, wanted) < 1e-5
    with pytest.raises(AssertionError, match="gradients of"):
        layer_ways.error_of(replace(way, leaves=way.leaves | {"down": torch.ones(1)}), wanted)
    poisoned = replace(made, down=torch.nn.Parameter(made.down.detach().clone()))
    with torch.no_grad():
        poisoned.down[0] = float("nan")
    assert not layer_ways.error_of(layer_ways.plain(poisoned), wanted) < 1e9


def test_what_can_not_run_is_told_and_what_must_run_is_an_error(monkeypatch):
    def broken(made):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(layer_ways.WAYS, "hf_eager", broken)
    ways, left_out = moe_layer.build_ways(["plain", "hf_eager", "liger"], problem())
    assert list(ways) == ["plain"]
    assert left_out["hf_eager"] == "it fails here: no such kernel"
    assert "iger" in left_out["liger"]
    monkeypatch.setitem(layer_ways.WAYS, "plain", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        moe_layer.build_ways(["plain"], problem())


def test_bare_products_are_those_of_the_layer():
    """As many FLOPs as the formula says, in two and in six products."""
    made = problem("balanced", size=layer_ways.Size(16, 8, 4, 2))
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._grouped_mm.default:
                first, second = args[0], args[1]
                # 2D x 3D: [a, i] [e, i, o]; 2D x 2D: [o, a] [a, i], an expert's rows alone
                calls.append(2 * first.numel() * second.shape[-1])
            return func(*args, **(kwargs or {}))

    way = layer_ways.bare(made)
    with Count():
        way.forward()
        assert (len(calls), sum(calls)) == (2, SIZE.flops(12, backward=False))
        calls.clear()
        way.both()
    assert (len(calls), sum(calls)) == (6, SIZE.flops(12, backward=True))


# of one H200 [TFLOP/s, TB/s], bf16: published sizes, worked out by hand
RATES = {"flops_per_second": 790e12, "bytes_per_second": 4.3e12}


@pytest.mark.parametrize(
    ("shape", "tokens", "forward", "both"),
    [
        ("qwen3_30b_a3b", 4096, 0.43, 1.31),
        ("qwen3_30b_a3b", 16384, 1.71, 4.98),
        ("mixtral_8x7b", 32768, 29.41, 88.06),
        ("olmoe_1b_7b", 16384, 2.23, 6.54),
        ("gpt_oss_20b", 4096, 1.06, 3.15),
    ],
)
def test_limits_by_hand(shape, tokens, forward, both):
    size = moe_layer.SHAPES[shape]
    found = [
        1e3 * limits.limit_seconds(size, tokens, item=2, backward=back, rates=RATES)
        for back in (False, True)
    ]
    assert found == pytest.approx([forward, both], abs=0.011)


def test_bytes_of_the_kernels_add_up():
    d, h, e, k = 2048, 768, 128, 8
    size, t = layer_ways.Size(d, h, e, k), 4096
    a, w = t * k, e * d * h
    forward = limits.kernel_set(size, t, item=2, backward=False)
    assert sum(b for _, _, b in forward) == 6 * w + 6 * a * d + 8 * a * h + 2 * t * d
    whole = limits.kernel_set(size, t, item=2, backward=True)
    assert sum(b for _, _, b in whole) == 18 * w + 16 * a * d + 28 * a * h + 4 * t * d
    assert sum(f for _, f, _ in whole) == size.flops(t, backward=True) == 18 * a * d * h


def test_saved_bytes_by_hand():
    x = torch.randn(10, 4, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(4, 4))

    def forward():
        y = x @ weight.t()  # keeps x, and the weight as a view
        return (y * y).sigmoid()  # keeps y once, and its answer

    assert measuring.saved_bytes(forward, [weight]) == 3 * 10 * 4 * 4
    assert measuring.saved_bytes(forward, []) == 3 * 160 + 64


def test_a_deadline():
    assert measuring.Deadline(None).left == float("inf")
    assert 59 < measuring.Deadline(1).left <= 60
    assert measuring.Deadline(-1).left == 0


def test_rates_of_this_machine():
    found = measuring.peak_rates(CPU, torch.float32, tiny=True)
    assert set(found) == set(RATES)
    assert min(found.values()) > 0


ARGS = ["--shapes", "tiny", "--tokens", "16", "--repeats", "2", "--threads", "1"]


def test_a_trial(tmp_path, capsys):
    out = tmp_path / "new" / "layer.json"
    ways = ["ours", "plain", "hf_grouped", "liger", "bare", "bare_own", "dense"]
    moe_layer.main([*ARGS, "--routings", "zipf", "--dtypes", "fp32", "--ways", *ways,
                    "--out", str(out)])  # fmt: skip
    report = json.loads(out.read_text())
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["skipped"]) == 1
    assert "liger" in report["skipped"][0]
    (case,) = report["results"]
    assert len(case["seconds"]["ours"]["both"]) == 2
    assert case["ways"]["ours"]["saved_bytes"] <= case["ways"]["plain"]["saved_bytes"]
    fastest = min(case["ways"][way]["both"]["ratio_to_bare"] for way in ("bare", "bare_own"))
    assert fastest == 1
    row = case["ways"]["ours"]["both"]
    size = moe_layer.SHAPES["tiny"]
    assert row["tflops"] == pytest.approx(size.flops(16, backward=True) / row["ms"] / 1e9)
    assert row["share_of_limit"] == pytest.approx(case["limit_ms"]["both"] / row["ms"])
    assert "| tiny | 16 | zipf | fp32 | ours |" in capsys.readouterr().out


def test_when_time_is_up_it_stops_and_says_so(tmp_path, capsys):
    out = tmp_path / "layer.json"
    moe_layer.main([*ARGS, "--ways", "bare", "--minutes", "1e-9", "--out", str(out)])
    report = json.loads(out.read_text())
    assert len(report["results"]) == 1  # the first, one round of it
    assert [len(v["both"]) for v in report["results"][0]["seconds"].values()] == [1]
    assert len(report["skipped"]) == 5
    assert "skipped: tiny 16 zipf fp32: the 1e-09 minutes are over" in capsys.readouterr().out
