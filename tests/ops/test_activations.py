"""Activations against their formulas, and where one clamps."""

import math

import pytest
import torch
from helpers import assert_near

from moe_builders.errors import InputError
from moe_builders.ops.activations import (
    ACTIVATIONS,
    find_activation,
    gpt_oss_swiglu,
    limited_swiglu,
)


def test_exact_gelu_is_no_approximation():
    z = torch.tensor([[-3.0, -0.5, 0.7, 2.0, 1.5, -2.0, 3.0, 0.1]], dtype=torch.float64)
    gate, up = z[0, :4].tolist(), z[0, 4:].tolist()
    wanted = [g * 0.5 * (1 + math.erf(g / math.sqrt(2))) * u for g, u in zip(gate, up, strict=True)]
    assert ACTIVATIONS["geglu_exact"].function(z)[0].tolist() == pytest.approx(wanted, rel=1e-12)
    assert ACTIVATIONS["geglu"].function(z)[0].tolist() != pytest.approx(wanted, rel=1e-6)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


@pytest.mark.parametrize(
    ("gate", "up", "clamped_gate", "clamped_up"),
    [
        (0.5, 0.25, 0.5, 0.25),
        (9.0, 0.25, 7.0, 0.25),
        (-9.0, 0.25, -9.0, 0.25),  # below nothing is clamped
        (0.5, 8.0, 0.5, 7.0),
        (0.5, -8.0, 0.5, -7.0),
        (70.0, 70.0, 7.0, 7.0),
    ],
)
def test_gpt_oss_clamps(gate, up, clamped_gate, clamped_up):
    z = torch.tensor([[gate, up]], dtype=torch.float64, requires_grad=True)
    got = ACTIVATIONS["gpt_oss"].function(z)
    wanted = (clamped_up + 1) * clamped_gate * sigmoid(1.702 * clamped_gate)
    assert got.item() == pytest.approx(wanted, rel=1e-12)
    (grad,) = torch.autograd.grad(got.sum(), z)
    assert (grad[0, 0] != 0) == (gate == clamped_gate)  # a clamped half learns nothing
    assert (grad[0, 1] != 0) == (up == clamped_up)


def test_gpt_oss_with_other_numbers():
    z = torch.tensor([[2.0, -0.5, 3.0, -4.0]], dtype=torch.float64)  # gates, then ups
    given = find_activation(gpt_oss_swiglu(limit=1.5, alpha=0.7))
    wanted = [2.5 * 1.5 * sigmoid(0.7 * 1.5), -0.5 * -0.5 * sigmoid(0.7 * -0.5)]
    assert given.function(z)[0].tolist() == pytest.approx(wanted, rel=1e-12)
    default = gpt_oss_swiglu()
    assert (default.name, default.gated) == ("gpt_oss", True)
    assert_near(default.function(z), ACTIVATIONS["gpt_oss"].function(z), 0)
    for limit in (0, -7.0, float("nan")):
        with pytest.raises(InputError, match=rf"limit is {limit}, but must be above 0"):
            gpt_oss_swiglu(limit=limit)


@pytest.mark.parametrize(
    ("gate", "up", "clamped_gate", "clamped_up"),
    [
        (0.5, 0.25, 0.5, 0.25),
        (9.0, 0.25, 2.0, 0.25),
        (-9.0, 0.25, -9.0, 0.25),  # below nothing is clamped
        (0.5, 8.0, 0.5, 2.0),
        (0.5, -8.0, 0.5, -2.0),
    ],
)
def test_limited_swiglu(gate, up, clamped_gate, clamped_up):
    z = torch.tensor([[gate, up]], dtype=torch.float64, requires_grad=True)
    got = limited_swiglu(limit=2.0).function(z)
    wanted = clamped_gate * sigmoid(clamped_gate) * clamped_up
    assert got.item() == pytest.approx(wanted, rel=1e-12)
    (grad,) = torch.autograd.grad(got.sum(), z)
    assert (grad[0, 0] != 0) == (gate == clamped_gate)
    assert (grad[0, 1] != 0) == (up == clamped_up)


def test_limited_swiglu_is_rounded_once():
    z = torch.randn(64, 16).bfloat16()
    function = limited_swiglu(limit=1.0).function
    assert torch.equal(function(z), function(z.float()).bfloat16())
    swiglu = ACTIVATIONS["swiglu"].function
    assert_near(limited_swiglu(limit=100.0).function(z.double()), swiglu(z.double()), 1e-15)
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(InputError, match=rf"limit is {limit}, but must be above 0"):
            limited_swiglu(limit=limit)


def test_gelu_is_exact_and_ungated():
    z = torch.tensor([[-3.0, -0.5, 0.7, 2.0]], dtype=torch.float64)
    wanted = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z[0].tolist()]
    assert ACTIVATIONS["gelu"].function(z)[0].tolist() == pytest.approx(wanted, rel=1e-12)
    assert ACTIVATIONS["gelu_tanh"].function(z)[0].tolist() != pytest.approx(wanted, rel=1e-6)


def test_silu_is_ungated():
    z = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    wanted = [v * sigmoid(v) for v in z[0].tolist()]
    assert ACTIVATIONS["silu"].function(z)[0].tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_widths(name):
    activation = ACTIVATIONS[name]
    width = 6 if activation.gated else 3
    got = activation.function(torch.randn(4, width, dtype=torch.bfloat16))
    assert got.shape == (4, 3)
    assert got.dtype == torch.bfloat16
    assert not activation.function(torch.zeros(2, width)).any()  # a dead row stays zero


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    function = ACTIVATIONS[name].function
    z = 5 * torch.randn(4, 6)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_near(compiled(z), function(z), 1e-6)
