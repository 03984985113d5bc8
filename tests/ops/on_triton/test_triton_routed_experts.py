"""The fused op with all its kernels against itself in plain torch: answers and every gradient."""

import pytest
import torch
from helpers import assert_near
from helpers_triton import DEVICES

from moe_builders.ops import row_ops as plain
from moe_builders.ops.activations import ACTIVATIONS
from moe_builders.ops.permute import sort_by_expert
from moe_builders.ops.routed_experts import ExpertWeights, routed_experts

T, K, E, D, H = 23, 3, 6, 16, 24
WEIGHTS = ("input_weights", "row_weights", "output_weights")
KINDS = ["swiglu", "gpt_oss", "relu2"]


def problem(kind, *, device, parts="biases", weights=WEIGHTS, dead=True):
    """Ragged: expert 1 is idle, choices are dropped, three tokens are masked and hold NaN.

    Returns: leaves by name, in numbers that bf16 holds; where rows stand; the output's gradient.
    """
    scores, live = torch.rand(T, E), torch.rand(T, K) > 0.2
    scores[:, 1] = -1
    masked = [0, 7, T - 1]
    live[masked] = False
    found = sort_by_expert(scores.topk(K).indices, E, live if dead else None)
    there = torch.arange(T * K) < found.num_tokens_per_expert.sum()
    w = 2 * H if ACTIVATIONS[kind].gated else H
    leaves = {
        "x": torch.randn(T, D),
        "up": torch.randn(E, w, D) / 4,
        "down": torch.randn(E, D, H) / 5,
    }
    if parts == "biases":
        leaves |= {"up_bias": torch.randn(E, w), "down_bias": torch.randn(E, D)}
    if parts == "scale":
        leaves["hidden_scale"] = torch.randn(E, H)
    leaves = {name: leaf.bfloat16().float() for name, leaf in leaves.items()}
    grad = torch.randn(T, D).bfloat16().float()
    if dead:
        leaves["x"][masked] = grad[masked] = float("nan")
    leaves |= {name: (torch.rand(T * K) + 0.5) * there for name in weights}
    leaves = {name: leaf.to(device) for name, leaf in leaves.items()}
    return leaves, type(found)(*(each.to(device) for each in found)), grad.to(device)


def run(kind, given, kernels, *, dtype, slots=True, recompute_up=False):
    """The answer and all gradients, by name."""
    leaves, found, grad = given
    leaves = {
        name: leaf.to(leaf.dtype if name in WEIGHTS else dtype).requires_grad_()
        for name, leaf in ((name, leaf.clone()) for name, leaf in leaves.items())
    }
    more = {name: leaf for name, leaf in leaves.items() if name in WEIGHTS}
    experts = {n: leaf for n, leaf in leaves.items() if n != "x" and n not in WEIGHTS}
    y = routed_experts(
        leaves["x"], ExpertWeights(**experts), found.num_tokens_per_expert,
        activation=ACTIVATIONS[kind], token_index=found.token_index,
        slot_of=found.slot_of if slots else None, recompute_up=recompute_up,
        kernels=kernels, **more,
    )  # fmt: skip
    y.backward(grad.to(dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.fixture
def kernels_alone(monkeypatch):
    """Make whatever has a kernel refuse to run plainly; only while it is called."""

    def call(*arguments, **more):
        def refuse(*_, **__):
            raise AssertionError("plain torch where there is a kernel")

        with monkeypatch.context() as patch:
            for name in ("take_rows", "weigh_rows", "sum_slots", "activate", "activate_backward",
                         "add_expert_rows_", "row_products"):  # fmt: skip
                patch.setattr(plain, name, refuse)
            with pytest.raises(AssertionError, match="plain torch"):
                run(*arguments, "torch", **more)
            return run(*arguments, "triton", **more)

    return call


def compare(found, wanted, limit):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].isfinite().all(), name
        assert_near(found[name], value, limit, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute_up", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("slots", [True, False], ids=["slots", "any number"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32(device, kind, slots, recompute_up, kernels_alone):
    given, how = problem(kind, device=device), {"slots": slots, "recompute_up": recompute_up}
    exact = run(kind, given, "torch", dtype=torch.float64, **how)
    found = kernels_alone(kind, given, dtype=torch.float32, **how)
    compare(found, {name: value.float() for name, value in exact.items()}, 1e-5)
    compare(found, run(kind, given, "torch", dtype=torch.float32, **how), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute_up", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("slots", [True, False], ids=["slots", "any number"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_near_to_fp64_as_plain_torch(device, kind, slots, recompute_up, kernels_alone):
    given, how = problem(kind, device=device), {"slots": slots, "recompute_up": recompute_up}
    exact = run(kind, given, "torch", dtype=torch.float64, **how)
    found = kernels_alone(kind, given, dtype=torch.bfloat16, **how)
    twin = run(kind, given, "torch", dtype=torch.bfloat16, **how)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        apart, allowed = ((each[name].double() - value).norm() for each in (found, twin))
        assert found[name].dtype == twin[name].dtype, name
        assert 0 < apart <= 1.05 * allowed, (name, apart, allowed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", [(), *((name,) for name in WEIGHTS)], ids=str)
@pytest.mark.parametrize("parts", ["plain", "biases", "scale"])
def test_any_part_left_out(device, weights, parts):
    for dead in (True, False):
        given = problem("swiglu", device=device, parts=parts, weights=weights, dead=dead)
        wanted = run("swiglu", given, "torch", dtype=torch.float32)
        compare(run("swiglu", given, "triton", dtype=torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_all_dead(device):
    leaves, found, grad = problem("gpt_oss", device=device)
    found = found._replace(num_tokens_per_expert=found.num_tokens_per_expert * 0)
    given = {name: leaf * 0 if name in WEIGHTS else leaf for name, leaf in leaves.items()}
    answers = run("gpt_oss", (given, found, grad), "triton", dtype=torch.float32)
    for name, value in answers.items():
        assert not value.any(), name  # NaN is some


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_run(device):
    given = problem("gpt_oss", device=device)
    first, second = (run("gpt_oss", given, "triton", dtype=torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
