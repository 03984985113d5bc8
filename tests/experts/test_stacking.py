"""A module an expert and all stacked: there and back, to the bit."""

import pytest
import torch
from helpers import assert_near, gradients, one_expert, randomise
from torch import nn
from torchtune.modules import FeedForward

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.experts.expert_list import ExpertList, ExpertNetwork
from moe_builders.experts.stacking import merge_experts, split_experts
from moe_builders.ops.activations import ACTIVATIONS, gpt_oss_swiglu, limited_swiglu

COUNTS = torch.tensor([3, 0, 4, 1])


def experts_of(activation="swiglu", dtype=torch.float64, **options):
    experts = GroupedExperts(
        dim=6, hidden_dim=5, num_experts=4, activation=activation, **options
    )  # fmt: skip
    return randomise(experts).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_there_and_back(activation, bias, scale, dtype):
    experts = experts_of(activation, bias=bias, hidden_scale=scale, dtype=dtype)
    state = torch.random.get_rng_state()
    listed = split_experts(experts)
    again = merge_experts(listed)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn
    wanted, got = experts.state_dict(), again.state_dict()
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], value), name
        assert got[name].data_ptr() != value.data_ptr()  # copies
    assert again.activation == experts.activation
    plain = activation == "swiglu" and not scale
    assert all(isinstance(n, FeedForward) == plain for n in listed.children())


@pytest.mark.parametrize("options", [{}, {"bias": True, "hidden_scale": True}])
@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss", "relu2"])
def test_the_answers_and_gradients_are_the_same(activation, options):
    experts = experts_of(activation, **options)
    listed = split_experts(experts)
    x, weights = torch.randn(10, 6).double(), torch.rand(10).double()
    found = []
    for module in (experts, listed):
        y = module(x, COUNTS, weights)
        y.square().sum().backward()
        found.append(y)
    assert_near(found[1], found[0], 1e-12)
    stacked, own = gradients(experts), gradients(listed)
    for number in range(4):
        down = "w2" if activation == "swiglu" and not options else "down_proj"
        got = own[f"{number}.{down}.weight"]
        assert_near(got, stacked["down_proj"][number], 1e-12)
    assert_near(listed.get_submodule("2")(x[4]), one_expert(experts, 2, x[4]), 1e-12)


def test_what_else_is_kept():
    experts = experts_of(dropout=0.25).eval()
    experts.down_proj.requires_grad_(False)
    listed = split_experts(experts)
    frozen = {name for name, p in listed.named_parameters() if not p.requires_grad}
    assert frozen == {f"{number}.down_proj.weight" for number in range(4)}
    assert not any(module.training for module in listed.modules())
    again = merge_experts(listed, backend="loop")
    assert (again.dropout, again.backend, again.training) == (0.25, "loop", False)
    assert [p.requires_grad for p in (again.gate_up_proj, again.down_proj)] == [True, False]


def test_activations_made_with_the_same_numbers_are_the_same():
    def network(activation):
        return ExpertNetwork(dim=6, hidden_dim=5, activation=activation)

    same = ExpertList([network(gpt_oss_swiglu(limit=3.0)) for _ in range(2)])
    assert merge_experts(same).activation.function.keywords["limit"] == 3.0
    other = ExpertList([network(limited_swiglu(limit=limit)) for limit in (1.0, 2.0)])
    with pytest.raises(InputError, match="activation of expert 1 is limited_swiglu"):
        merge_experts(other)


def feed_forward(h=5, activation=None, bias=False, up=True):
    return FeedForward(
        gate_proj=nn.Linear(6, h, bias=bias),
        up_proj=nn.Linear(6, h, bias=bias) if up else None,
        down_proj=nn.Linear(h, 6, bias=bias),
        activation=activation or nn.SiLU(),
    )


def frozen(network):
    network.w2.weight.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(6, 6), "expert 1 is a Linear, which cannot be stacked"),
        (lambda: feed_forward(activation=nn.GELU()), "expert 1 is a FeedForward, which cannot"),
        (lambda: feed_forward(up=False), "expert 1 is a FeedForward, which cannot"),
        (lambda: feed_forward(h=4), "hidden_dim of expert 1 is 4, but of expert 0 5"),
        (lambda: feed_forward(bias=True), "bias of expert 1 is True, but of expert 0 False"),
        (
            lambda: ExpertNetwork(dim=6, hidden_dim=5, activation="geglu"),
            "activation of expert 1 is geglu, but of expert 0 swiglu",
        ),
        (lambda: feed_forward().double(), "dtype of the experts' gate_up_proj is torch.float32 "),
        (lambda: frozen(feed_forward()), "requires_grad of the experts' down_proj is False here"),
    ],
)
def test_what_cannot_be_stacked(other, message):
    with pytest.raises(InputError, match=message):
        merge_experts(ExpertList([feed_forward(), other()]))


def test_a_network_of_ours_and_a_feed_forward_may_be_mixed():
    mixed = ExpertList([feed_forward(), ExpertNetwork(dim=6, hidden_dim=5)])
    x = torch.randn(4, 6)
    counts = torch.tensor([2, 2])
    assert_near(merge_experts(mixed)(x, counts), mixed(x, counts), 1e-6)
