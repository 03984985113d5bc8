"""Batched experts against one expert and one row at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_near, gradients, one_expert, randomise
from torch import nn
from torchtune.modules import FeedForward

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.instantiate import instantiate
from moe_builders.moe import moe_layer
from moe_builders.ops import gathered_mm
from moe_builders.ops.activations import ACTIVATIONS, Activation, limited_swiglu
from moe_builders.ops.gathered_mm import MOST_ROWS, takes_gathered

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
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "limited_swiglu"])
def test_each_row_goes_through_its_expert(activation, scale, bias, weighted):
    if activation == "limited_swiglu":  # a name alone does not tell its limit
        activation = limited_swiglu(limit=0.75)
    experts = experts_of(activation, bias=bias, hidden_scale=scale)
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
        "swiglu", "geglu", "geglu_exact", "gpt_oss", "relu2", "gelu_tanh", "gelu",
        "silu",
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
        ({"dropout": 1.0}, r"dropout is 1.0, but must be at least 0 and below 1"),
        ({"dropout": -0.1}, r"dropout is -0.1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        experts_of(**changes)


def test_hidden_scale_starts_at_one_and_changes_nothing():
    torch.manual_seed(0)
    plain = GroupedExperts(dim=6, hidden_dim=5, num_experts=4)
    torch.manual_seed(0)
    scaled = GroupedExperts(dim=6, hidden_dim=5, num_experts=4, hidden_scale=True)
    assert torch.equal(scaled.hidden_scale, torch.ones(4, 5))
    x = torch.randn(10, 6)
    assert torch.equal(scaled(x, torch.tensor(COUNTS)), plain(x, torch.tensor(COUNTS)))


def test_dropout_is_of_the_answers_and_in_training_only():
    """Bias included, and the rest grows: the mean answer stays."""
    experts, plain = experts_of(bias=True, dropout=0.4, dim=64), experts_of(bias=True, dim=64)
    x, counts = torch.randn(40, 64, dtype=torch.float64), torch.tensor([20, 0, 15, 0])
    wanted = plain(x, counts)
    assert torch.equal(experts.eval()(x, counts), wanted)
    torch.manual_seed(1)
    got = experts.train()(x, counts)
    kept = got[:35] != 0
    assert 0.55 < kept.double().mean() < 0.65
    assert_near(got[:35][kept], wanted[:35][kept] / 0.6, 1e-12)
    assert not got[35:].any()
    torch.manual_seed(1)
    assert torch.equal(experts(x, counts), got)  # a recomputation under the same seed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_wider_are_cast_to_the_rows(dtype):
    wide = experts_of(bias=True, hidden_scale=True, dtype=torch.float32)
    narrow = experts_of(bias=True, hidden_scale=True, dtype=torch.float32).to(dtype)
    x = torch.randn(10, 6).to(dtype)
    got = wide(x, torch.tensor(COUNTS), torch.rand(10))
    assert got.dtype == dtype
    assert torch.equal(wide(x, torch.tensor(COUNTS)), narrow(x, torch.tensor(COUNTS)))
    got.float().sum().backward()
    assert {p.grad.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "loop", "gather"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_without_gradients_idle_experts_are_not_read(activation, backend, dtype):
    """Their weights hold NaN; the answers are those of training."""
    experts = GroupedExperts(
        dim=8, hidden_dim=12, num_experts=6, activation=activation, bias=True, hidden_scale=True,
        backend=backend,
    )  # fmt: skip
    randomise(experts).to(dtype)
    counts, idle = torch.tensor([0, 2, 0, 1, 1, 0]), [0, 2, 5]
    x, weights = torch.randn(6, 8).to(dtype), torch.rand(6)
    experts.backend = "auto"
    wanted = experts(x, counts, weights)  # two dead rows
    experts.backend = backend
    x[4:] = float("nan")
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[idle] = float("nan")
        got = experts(x, counts, weights)
    assert_near(got, wanted, 1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert not got[4:].any()


def test_gathering_has_no_gradient():
    experts = experts_of(backend="gather")
    x = torch.randn(10, 6, dtype=torch.float64)
    with pytest.raises(InputError, match="'gather' has no gradient: use 'auto', or compute under"):
        experts(x, torch.tensor(COUNTS))
    with torch.no_grad():
        assert_near(experts(x, torch.tensor(COUNTS)), plain(experts, x, None), 1e-12)


class OnGpu:
    """As much of a tensor as the choice looks at."""

    is_cuda, device, requires_grad = True, "cuda", False

    def __init__(self, *shape, dtype=torch.float32):
        self.shape, self.dtype = shape, dtype


def test_when_rows_are_gathered_by_themselves(monkeypatch):
    gpu = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    weight, small = OnGpu(64, 12, 8), OnGpu(4, 12, 8)
    few = OnGpu(MOST_ROWS, 8)
    assert not takes_gathered("auto", few, weight)  # gradients are on
    with torch.no_grad():
        assert takes_gathered("auto", few, weight)
        assert not takes_gathered("auto", OnGpu(MOST_ROWS + 1, 8), weight)
        assert takes_gathered("auto", OnGpu(4, 8), small)
        assert not takes_gathered("auto", OnGpu(5, 8), small)  # more than the layer holds
        half = OnGpu(8, 8, dtype=torch.bfloat16)
        assert not takes_gathered("auto", half, weight)  # a kernel reads the experts in place
        gpu.major = 8
        assert takes_gathered("auto", half, weight)
        assert not takes_gathered("auto", torch.zeros(8, 8), torch.zeros(64, 12, 8))  # on a CPU
        assert not takes_gathered("loop", half, weight)
    assert gathered_mm.MOST_ROWS == 32


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("gelu", "gelu"),
        ({"_component_": "moe_builders.ops.activations.gpt_oss_swiglu", "limit": 5.0}, "gpt_oss"),
        ({"_component_": "moe_builders.ops.activations.limited_swiglu", "limit": 10.0},
         "limited_swiglu"),
    ],
)  # fmt: skip
def test_activations_from_a_config(node, name):
    config = {"_component_": "moe_builders.moe.moe_layer", "embed_dim": 6, "expert_hidden_dim": 5,
              "num_experts": 4, "shared_hidden_dim": 3, "activation": node,
              "shared_activation": node}  # fmt: skip
    moe = instantiate(config, path="model")
    assert moe.experts.activation.name == moe.shared_experts.activation.name == name
    if isinstance(node, dict):
        assert moe.experts.activation.function.keywords["limit"] == node["limit"]
    assert moe(torch.randn(3, 6)).shape == (3, 6)


def test_moe_layer_hands_its_options_on():
    moe = moe_layer(
        embed_dim=6, expert_hidden_dim=5, num_experts=4, expert_dropout=0.25, hidden_scale=True
    )
    assert moe.experts.dropout == 0.25
    assert moe.experts.hidden_scale.shape == (4, 5)


def test_equal_counts_are_a_batched_product():
    """What expert choice gives: [e, c, d] times each expert's matrices."""
    experts = experts_of("geglu")
    x = torch.randn(4 * 3, 6, dtype=torch.float64)
    z = torch.bmm(x.view(4, 3, 6), experts.gate_up_proj.transpose(1, 2))
    wanted = torch.bmm(experts.activation.function(z), experts.down_proj.transpose(1, 2))
    assert_near(experts(x, torch.full((4,), 3)), wanted.flatten(0, 1), 1e-12)
