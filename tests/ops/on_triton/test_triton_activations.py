"""Activation kernels, forward and backward, against their twins in fp64."""

import pytest
import torch
from helpers import assert_near, quick
from helpers_triton import DEVICES, kernels_run, poisoned
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.ops import row_ops as plain
from moe_builders.ops.activations import (
    ACTIVATIONS,
    Activation,
    gpt_oss_swiglu,
    limited_swiglu,
    swiglu,
)
from moe_builders.ops.triton import row_ops as kernels
from moe_builders.ops.triton.activations import serves

KINDS = {
    **ACTIVATIONS,
    "limited_swiglu": limited_swiglu(limit=0.75),
    "other gpt_oss": gpt_oss_swiglu(limit=1.5, alpha=0.7),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some(a, h, kind, dtype, device, *, weighted=True):
    """[a, w] z, [a, h] gradient, [a] weights or None."""
    z = 3 * torch.randn(a, 2 * h if kind.gated else h)
    weights = torch.randn(a).to(device) if weighted else None
    return z.to(dtype).to(device), torch.randn(a, h).to(dtype).to(device), weights


def all_answers(ops, z, grad, kind, weights):
    """By name; what is None is left out."""
    found = ops.activate_backward(z, grad, kind, weights)
    names = ("z_grad", "hidden", "weights_grad")
    answers = {"forward": ops.activate(z, kind, weights)}
    answers |= {name: v for name, v in zip(names, found, strict=True) if v is not None}
    return answers


def wide(value):
    return None if value is None else value.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(device, dtype, name, weighted):
    kind = KINDS[name]
    z, grad, weights = some(7, 261, kind, dtype, device, weighted=weighted)
    got = all_answers(kernels, z, grad, kind, weights)
    exact = all_answers(plain, z.double(), grad.double(), kind, wide(weights))
    twin = all_answers(plain, z, grad, kind, weights)
    assert got.keys() == exact.keys() == twin.keys()
    assert torch.equal(got["forward"], got["hidden"])
    for what, answer in got.items():
        assert answer.dtype == twin[what].dtype, what
        if answer.dtype == torch.float32:
            assert_near(answer.double(), exact[what], 3e-6, what)
        else:  # computed in fp32 and rounded once: each number off by no more than half a step
            step = torch.finfo(dtype).eps
            off = (answer.double() - exact[what]).abs()
            assert (off <= 0.51 * step * exact[what].abs() + 2e-6).all(), what


@quick
@given(
    a=st.integers(0, 9),
    h=st.integers(0, 30),
    name=st.sampled_from(sorted(KINDS)),
    weighted=st.booleans(),
)
def test_any_shape(a, h, name, weighted):
    device, kind = "cuda" if torch.cuda.is_available() else "cpu", KINDS[name]
    z, grad, weights = some(a, h, kind, torch.float32, device, weighted=weighted)
    with kernels_run(), poisoned():
        got = all_answers(kernels, z, grad, kind, weights)
        exact = all_answers(plain, z.double(), grad.double(), kind, wide(weights))
    for what, answer in got.items():
        assert_near(answer.double(), exact[what], 1e-5, what)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KINDS)
def test_far_out(device, name):
    kind, far = KINDS[name], [-300.0, -30.0, -7.0, -1.5, 0.0, 0.75, 1.5, 7.0, 30.0, 300.0]
    z = torch.tensor([far, far[::-1]], device=device)  # limits and beyond, both halves
    grad = torch.ones(2, 5 if kind.gated else 10, device=device)
    got = all_answers(kernels, z, grad, kind, torch.ones(2, device=device))
    exact = all_answers(plain, z.double(), grad.double(), kind, torch.ones(2, device=device))
    for what, answer in got.items():
        assert answer.isfinite().all(), what
        assert_near(answer.double(), exact[what].double(), 1e-6, what)
        zeros = exact[what] == 0  # a clamped half learns nothing
        assert (answer[zeros] == 0).all(), what


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KINDS)
def test_nan_stays_in_its_row_and_is_not_clamped_away(device, name):
    kind = KINDS[name]
    for column in (0, -1):  # a gate and an up half, or two of an ungated form
        z, grad, weights = some(5, 12, kind, torch.float32, device)
        z[2, column] = float("nan")
        for what, answer in all_answers(kernels, z, grad, kind, weights).items():
            rows = answer.isnan().view(5, -1).any(1)
            assert rows.tolist() == [False, False, True, False, False], what


@pytest.mark.parametrize("device", DEVICES)
def test_other_layouts(device):
    kind = KINDS["swiglu"]
    z, grad, weights = some(6, 9, kind, torch.float32, device)
    wanted = all_answers(kernels, z, grad, kind, weights)
    other = (z.t().contiguous().t(), grad[:, :1].expand(6, 9), torch.stack((weights,) * 2, 1)[:, 1])
    got = all_answers(kernels, other[0], grad, kind, other[2])
    for what, answer in got.items():
        assert torch.equal(answer, wanted[what]), what
    got = all_answers(kernels, other[0], other[1], kind, weights)
    wanted = all_answers(kernels, z, other[1].contiguous(), kind, weights)
    for what, answer in got.items():
        assert torch.equal(answer, wanted[what]), what


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_run(device):
    kind = KINDS["swiglu"]
    z, grad, weights = some(40, 300, kind, torch.bfloat16, device)
    first = all_answers(kernels, z, grad, kind, weights)
    for what, answer in all_answers(kernels, z, grad, kind, weights).items():
        assert torch.equal(answer, first[what]), what


def test_what_is_served():
    assert all(serves(kind) for kind in KINDS.values())
    own = Activation("mine", gated=True, function=swiglu, gradient=lambda z, grad: z)
    assert not serves(own)
    named_so = Activation("swiglu", gated=True, function=lambda z: z, gradient=lambda z, grad: z)
    assert not serves(named_so)
    without = Activation("swiglu", gated=True, function=swiglu)
    assert not serves(without)
    with pytest.raises(AssertionError):
        kernels.activate(torch.ones(1, 2), own)
