"""Batched experts against one expert and one row at a time."""

import math

import pytest
import torch
from helpers import assert_near, gradients, one_expert, randomise
from torch import nn
from torchtune.modules import FeedForward

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.ops.activations import ACTIVATIONS, Activation

COUNTS = [3, 0, 4, 1]  # and two dead rows


def experts_of(activation="swiglu", dtype=torch.float64, **changes):
    arguments = {"dim": 6, "hidden_dim": 5, "num_experts": 4} | changes
    return randomise(GroupedExperts(activation=activation, **arguments)).to(dtype)


def plain(experts, x, row_weights):
    numbers = [j for j, n in enumerate(COUNTS) for _ in range(n)]
    rows = [one_expert(experts, j, x[row]) for row, j in enumerate(numbers)]
    if row_weights is not None:
        rows = [row_weights[number] * row for number, row in enumerate(rows)]
    return torch.stack([*rows, *[torch.zeros_like(rows[0])] * (x.shape[0] - len(rows))])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_row_goes_through_its_expert(activation, bias, weighted):
    experts = experts_of(activation, bias=bias)
    clean = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(10, dtype=torch.float64, requires_grad=True) if weighted else None
    probe = torch.randn(10, 6, dtype=torch.float64)

    wanted = plain(experts, clean, weights)
    (wanted * probe).sum().backward()
    wanted_grads = gradients(experts) | {"x": clean.grad}
    if weighted:
        wanted_grads["row_weights"] = weights.grad

    x = clean.detach().clone()
    x[8:] = float("nan")  # dead rows may hold anything
    x.requires_grad_()
    row_weights = weights.detach().clone().requires_grad_() if weighted else None
    got = experts(x, torch.tensor(COUNTS), row_weights)
    (got * probe).sum().backward()
    grads = gradients(experts) | {"x": x.grad}
    if weighted:
        grads["row_weights"] = row_weights.grad

    assert_near(got, wanted, 1e-12)
    assert torch.equal(got[8:], torch.zeros(2, 6, dtype=torch.float64))
    assert grads.keys() == wanted_grads.keys()
    for name, gradient in grads.items():
        assert_near(gradient, wanted_grads[name], 1e-12, name)


def test_every_known_activation_has_its_plain_twin():
    assert set(ACTIVATIONS) == {
        "swiglu", "geglu", "geglu_exact", "gpt_oss", "relu2", "gelu_tanh", "silu"
    }  # fmt: skip
    assert {a.name for a in ACTIVATIONS.values()} == set(ACTIVATIONS)


def test_an_activation_of_ones_own():
    half = Activation("half", gated=False, function=lambda z: z / 2 + 1)  # 1, not 0, at 0
    experts = experts_of(half, bias=True)
    x = torch.randn(10, 6, dtype=torch.float64)
    got = experts(x, torch.tensor(COUNTS))
    wanted = experts.down_proj[2] @ ((experts.up_proj[2] @ x[4] + experts.up_bias[2]) / 2 + 1)
    assert_near(got[4], wanted + experts.down_bias[2], 1e-12)
    assert torch.equal(got[8:], torch.zeros(2, 6, dtype=torch.float64))


def test_weights_are_stored_as_linear_layers_store_them():
    """Experts stacked from Hugging Face's Linear weights, gate rows first, give its answers."""
    ffs = [
        randomise(
            FeedForward(
                gate_proj=nn.Linear(6, 5, bias=False),
                up_proj=nn.Linear(6, 5, bias=False),
                down_proj=nn.Linear(5, 6, bias=False),
            ).double(),
            seed,
        )
        for seed in range(4)
    ]
    experts = experts_of()
    experts.load_state_dict(
        {
            "gate_up_proj": torch.stack([torch.cat((f.w1.weight, f.w3.weight)) for f in ffs]),
            "down_proj": torch.stack([f.w2.weight for f in ffs]),
        }
    )
    x = torch.randn(8, 6, dtype=torch.float64)
    wanted = torch.cat([f(rows) for f, rows in zip(ffs, x.split(COUNTS), strict=True)])
    assert_near(experts(x, torch.tensor(COUNTS)), wanted, 1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_names_and_shapes(activation):
    experts = experts_of(activation, bias=True)
    shapes = {name: tuple(value.shape) for name, value in experts.state_dict().items()}
    up, width = ("gate_up", 10) if activation == "swiglu" else ("up", 5)
    assert shapes == {
        f"{up}_proj": (4, width, 6),
        f"{up}_bias": (4, width),
        "down_proj": (4, 6, 5),
        "down_bias": (4, 6),
    }


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [9, 0, 0, 0]])
def test_experts_without_rows_get_zero_gradients_not_none(counts):
    experts = experts_of(bias=True, dtype=torch.float32)
    experts(torch.randn(10, 6), torch.tensor(counts)).square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        for expert, rows in enumerate(counts):
            gradient = parameter.grad[expert]
            if rows:
                assert gradient.abs().sum() > 0, name
            else:
                assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("counts", [COUNTS, [0, 5, 0, 3], [8, 0, 2, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_equals_loop(bias, activation, counts):
    x = 4 * torch.randn(10, 8)  # wide enough for a clamp to be met
    found = []
    for backend in ("grouped", "loop"):
        experts = randomise(
            GroupedExperts(
                dim=8,
                hidden_dim=12,
                num_experts=4,
                bias=bias,
                backend=backend,
                activation=activation,
            )
        )
        y = experts(x, torch.tensor(counts), torch.linspace(0, 1, 10))
        y.square().sum().backward()
        found.append({"y": y.detach()} | gradients(experts))
    for name, value in found[0].items():
        assert_near(value, found[1][name], 1e-5, name)


def test_bf16_stays_bf16():
    experts = experts_of(bias=True, dtype=torch.bfloat16)
    y = experts(torch.randn(10, 6).bfloat16(), torch.tensor(COUNTS), torch.rand(10))
    assert y.dtype == torch.bfloat16


def test_fresh_weights():
    experts = GroupedExperts(dim=64, hidden_dim=16, num_experts=4, bias=True)
    for weight, fan_in in ((experts.gate_up_proj, 64), (experts.down_proj, 16)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not experts.down_bias.any()
    assert not experts.gate_up_bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, r"dim \(0\)"),
        ({"hidden_dim": -1}, r"hidden_dim \(-1\)"),
        ({"num_experts": 0}, r"num_experts \(0\)"),
        ({"activation": "swish"}, "'swish' is not one of swiglu, geglu, geglu_exact, gpt_oss, "),
        ({"backend": "fast"}, "'fast' is not one of"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        experts_of(**changes)
