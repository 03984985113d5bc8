"""The MoE layer against two plain loops, in every way it can be put together."""

import copy
import inspect
import itertools

import pytest
import torch
from helpers import (
    D,
    E,
    H,
    assert_near,
    gradients,
    moe_of,
    plain_moe,
    randomise,
    reference_choice,
)
from torch import nn

from moe_builders.errors import InputError
from moe_builders.moe import MoE, collect_routing, moe_experts, moe_layer
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routers.gate import Jitter
from moe_builders.routing import TokenInfo, expert_of_rows

POSITIONS = ["before", "mid", "after"]
GRID = list(itertools.product(POSITIONS, ["none", "shared", "gated"], [False, True]))


def check_against_loops(moe, x, mask):
    """Outputs and all gradients, fp64."""
    info = TokenInfo(mask=mask)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    probe = torch.randn_like(x)
    got = moe(ours, info)
    (got * probe).sum().backward()
    grads = gradients(moe) | {"x": ours.grad}

    if isinstance(moe.router, TokenChoiceTopKRouter):
        choice = reference_choice(moe.router, theirs)
    else:
        probs = (theirs @ moe.router.gate.weight.t()).softmax(-1)
        choice = [[] for _ in x]
        routing = moe.last_routing  # which tokens is shown in tests/routers; how much is not
        expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])
        for i, j in zip(routing.token_index.tolist(), expert.tolist(), strict=True):
            if j < E:
                choice[i].append((j, probs[i, j]))
    wanted = plain_moe(moe, theirs, choice, mask)
    (wanted * probe).sum().backward()
    wanted_grads = gradients(moe) | {"x": theirs.grad}
    assert_near(got.detach(), wanted.detach(), 1e-12)
    for name, gradient in grads.items():
        assert_near(gradient, wanted_grads[name], 1e-12, name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("score_position", "shared", "bias"), GRID)
def test_two_loops(score_position, shared, bias, masked):
    moe = moe_of(score_position, shared=shared, bias=bias)
    mask = torch.arange(9) % 3 != 1 if masked else None
    check_against_loops(moe, torch.randn(9, D, dtype=torch.float64), mask)


@pytest.mark.parametrize(
    "activation", ["geglu", "geglu_exact", "gpt_oss", "relu2", "gelu_tanh", "silu"]
)
@pytest.mark.parametrize("score_position", POSITIONS)
def test_two_loops_with_every_activation(score_position, activation):
    moe = moe_of(score_position, bias=True, activation=activation)
    mask = torch.arange(9) != 4
    check_against_loops(moe, torch.randn(9, D, dtype=torch.float64), mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score_position", POSITIONS)
def test_two_loops_with_expert_choice(score_position, masked):
    moe = moe_of(score_position, router="expert", shared="gated")
    mask = torch.arange(9) % 3 != 1 if masked else None
    check_against_loops(moe, torch.randn(9, D, dtype=torch.float64), mask)


def test_mid_equals_after_with_expert_biases_too():
    x = torch.randn(11, D, dtype=torch.float64)
    outputs, grads = [], []
    for score_position in ("mid", "after", "before"):
        moe = moe_of(score_position, shared="shared", bias=True)
        y = moe(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        grads.append(gradients(moe))
    assert_near(outputs[0], outputs[1], 1e-12)
    for name, gradient in grads[0].items():
        assert_near(gradient, grads[1][name], 1e-12, name)
    assert (outputs[2] - outputs[1]).abs().max() > 1e-2  # "before" is another model


@pytest.mark.parametrize("score_position", POSITIONS)
def test_the_weight_multiplies_at_its_position(score_position):
    moe, seen = moe_of(score_position), []
    moe.experts.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, kwargs["assigned"])), with_kwargs=True
    )
    x = torch.randn(7, D, dtype=torch.float64)
    moe(x)
    (tokens, counts, row_weights, assigned), routing = seen[0], moe.last_routing
    assert torch.equal(tokens, x)
    assert assigned.token_index is routing.token_index
    assert assigned.slot_of is routing.slot_of
    assert torch.equal(counts, routing.num_tokens_per_expert)
    assert assigned.input_weights is (routing.weights if score_position == "before" else None)
    assert row_weights is (routing.weights if score_position == "mid" else None)
    assert assigned.output_weights is (routing.weights if score_position == "after" else None)


def test_batches_are_rows_of_tokens():
    moe = moe_of(shared="gated")
    x = torch.randn(3, 4, D, dtype=torch.float64)
    mask = torch.rand(12) > 0.3
    wanted = moe(x.flatten(0, 1), TokenInfo(mask=mask)).view_as(x)
    assert torch.equal(moe(x, TokenInfo(mask=mask)), wanted)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(moe(strided, TokenInfo(mask=mask)), wanted)


def test_bf16_in_bf16_out():
    moe = moe_of("mid", shared="gated", bias=True, dtype=torch.float32)
    x = torch.randn(30, D)
    wanted = moe(x.bfloat16().float())
    moe.bfloat16()
    got = moe(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert moe.last_routing.weights.dtype == torch.float32
    assert_near(got.float(), wanted, 0.1)


def test_routing_is_collected_from_the_last_forward():
    model = nn.ModuleDict({"first": moe_of(), "dense": nn.Linear(D, D), "second": moe_of(k=1)})
    with pytest.raises(InputError, match="first has not routed anything yet"):
        collect_routing(model)
    for tokens in (3, 5):
        for name in ("first", "second"):
            model[name](torch.randn(tokens, D, dtype=torch.float64))
    found = collect_routing(model)
    assert list(found) == ["first", "second"]
    assert [int(r.num_tokens_per_expert.sum()) for r in found.values()] == [10, 5]


def test_moe_layer_from_plain_numbers():
    moe = moe_layer(
        embed_dim=D,
        expert_hidden_dim=H,
        num_experts=E,
        experts_per_token=2,
        shared_hidden_dim=7,
        shared_gate=True,
        score_function="sigmoid",
        normalize_weights=False,
        route_scale=1.5,
        expert_bias=True,
        score_position="before",
    )
    randomise(moe).double()
    check_against_loops(moe, torch.randn(6, D, dtype=torch.float64), None)
    plain = moe_layer(embed_dim=D, expert_hidden_dim=H, num_experts=E)
    assert plain.shared_experts is None
    assert plain.shared_gate is None
    own = ExpertChoiceTopKRouter(dim=D, num_experts=E)
    assert moe_layer(embed_dim=D, expert_hidden_dim=H, num_experts=E, router=own).router is own


def test_moe_layer_with_groups_and_biases():
    moe = moe_layer(
        embed_dim=D,
        expert_hidden_dim=H,
        num_experts=E,
        experts_per_token=2,
        activation="gpt_oss",
        expert_proj_bias=True,
        score_function="sigmoid",
        expert_bias=True,
        gate_bias=True,
        num_groups=2,
        groups_per_token=1,
        group_score_topk=1,
    )
    randomise(moe).double()
    check_against_loops(moe, torch.randn(9, D, dtype=torch.float64), None)


def test_every_argument_of_the_router_reaches_it():
    """Whatever the router takes, moe_layer takes under the same name, with the same default."""
    given = {
        "experts_per_token": 2, "score_function": "sigmoid", "normalize_weights": False,
        "normalize_eps": 0.25, "normalize_min": 0.5, "route_scale": 1.5, "expert_bias": True,
        "gate_bias": True, "num_groups": 2, "groups_per_token": 2, "group_score_topk": 1,
        "weights_from": "biased", "gate_precision": "bf16", "jitter": "gumbel", "jitter_scale": 0.5,
    }  # fmt: skip
    takes = inspect.signature(TokenChoiceTopKRouter).parameters
    offered = inspect.signature(moe_layer).parameters
    assert set(given) == set(takes) - {"dim", "num_experts"}
    sizes = {"embed_dim": D, "expert_hidden_dim": H, "num_experts": E}
    for name, value in given.items():
        if name != "experts_per_token":
            assert offered[name].default == takes[name].default != value, name
        # two groups where a group is asked for, k 2 so that weights can be normalised
        rest = {"experts_per_token": 2} | ({"num_groups": 2} if "group" in name else {})
        if name == "weights_from":
            rest["expert_bias"] = True
        if name.startswith("jitter"):  # one needs the other
            rest |= {"jitter": given["jitter"], "jitter_scale": given["jitter_scale"]}
        router = moe_layer(**(sizes | rest | {name: value})).router
        if name in ("expert_bias", "gate_bias"):
            assert (router.expert_bias is not None) == (name == "expert_bias")
            assert (router.gate.bias is not None) == (name == "gate_bias")
        elif name.startswith("jitter"):
            assert router.jitter == Jitter(given["jitter"], given["jitter_scale"])
        else:
            assert getattr(router, name) == value, name


def test_the_experts_of_moe_layer():
    sizes = {"embed_dim": D, "expert_hidden_dim": H, "num_experts": E}
    plain = moe_layer(**sizes).experts
    assert plain.activation.name == "swiglu"
    assert plain.down_bias is None
    biased = moe_layer(**sizes, expert_proj_bias=True, activation="silu").experts
    assert biased.activation.name == "silu"
    assert biased.down_bias.shape == (E, D)
    assert biased.up_bias.shape == (E, H)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, "activation 'swish' is not one of"),
        ({"num_groups": 3}, r"num_groups is 3, but must divide num_experts \(4\)"),
        ({"score_position": "behind"}, "'behind' is not one of before, mid, after"),
        ({"shared_gate": True}, "no shared_experts to gate"),
        ({"experts_per_token": 5}, "experts_per_token is 5"),
        ({"router": ExpertChoiceTopKRouter(dim=D, num_experts=8)}, "serves 8 experts"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        moe_layer(embed_dim=D, expert_hidden_dim=H, num_experts=E, **changes)


def test_a_router_for_other_experts_is_refused():
    experts = moe_experts(embed_dim=8, expert_hidden_dim=4, num_experts=4)
    router = TokenChoiceTopKRouter(dim=8, num_experts=8, experts_per_token=2)
    with pytest.raises(InputError, match="serves 8 experts, but there are 4"):
        MoE(router=router, experts=experts)
    with pytest.raises(InputError, match="Identity lacks an attribute num_experts"):
        MoE(router=nn.Identity(), experts=experts)


def test_a_copy_after_a_forward_with_gradients_has_routed_nothing():
    moe = moe_of()
    x = torch.randn(5, D, dtype=torch.float64)
    wanted = moe(x)
    twin = copy.deepcopy(moe)
    assert twin.last_routing is None
    assert moe.last_routing is not None
    assert torch.equal(twin(x), wanted)
    assert twin.experts.down_proj.data_ptr() != moe.experts.down_proj.data_ptr()
