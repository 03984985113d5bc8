"""The MoE layer against two plain loops, its masks, and what must hold for any input."""

import itertools

import pytest
import torch
from helpers import (
    assert_near,
    gradients,
    one_expert,
    plain_moe,
    quick,
    randomise,
    reference_choice,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.moe import MoE, collect_routing, moe_layer, shared_experts
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo, check_routing, expert_of_rows

D, E, H = 6, 4, 5
POSITIONS = ["before", "mid", "after"]
GRID = list(itertools.product(POSITIONS, ["none", "shared", "gated"], [False, True]))


def moe_of(
    score_position="after",
    *,
    shared="none",
    bias=False,
    k=2,
    activation="swiglu",
    router="token",
    dtype=torch.float64,
):
    moe = MoE(
        router=TokenChoiceTopKRouter(
            dim=D, num_experts=E, experts_per_token=k, expert_bias=bias, gate_bias=bias
        )
        if router == "token"
        else ExpertChoiceTopKRouter(dim=D, num_experts=E, capacity_factor=1.5),
        experts=GroupedExperts(
            dim=D, hidden_dim=H, num_experts=E, activation=activation, bias=bias
        ),
        shared_experts=shared_experts(embed_dim=D, shared_hidden_dim=7)
        if shared != "none"
        else None,
        shared_gate=nn.Linear(D, 1, bias=False) if shared == "gated" else None,
        score_position=score_position,
    )
    return randomise(moe).to(dtype)


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


@pytest.mark.parametrize("activation", ["geglu", "relu2", "gelu_tanh"])
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
    moe.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    x = torch.randn(7, D, dtype=torch.float64)
    moe(x)
    (rows, counts, row_weights), routing = seen[0], moe.last_routing
    scale = routing.weights[:, None] if score_position == "before" else 1
    assert torch.equal(rows, x[routing.token_index] * scale)
    assert torch.equal(counts, routing.num_tokens_per_expert)
    assert row_weights is (routing.weights if score_position == "mid" else None)


def test_batches_are_rows_of_tokens():
    moe = moe_of(shared="gated")
    x = torch.randn(3, 4, D, dtype=torch.float64)
    mask = torch.rand(12) > 0.3
    wanted = moe(x.flatten(0, 1), TokenInfo(mask=mask)).view_as(x)
    assert torch.equal(moe(x, TokenInfo(mask=mask)), wanted)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(moe(strided, TokenInfo(mask=mask)), wanted)


@pytest.mark.parametrize("router", ["token", "expert"])
@pytest.mark.parametrize("score_position", POSITIONS)
def test_padding_changes_nothing(router, score_position):
    moe = moe_of(score_position, router=router, bias=router == "token")
    x = torch.randn(12, D, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    padded = moe(x, TokenInfo(mask=mask))
    assert torch.equal(padded[~mask], torch.zeros(4, D, dtype=torch.float64))
    with_padding = moe.last_routing
    check_routing(with_padding)
    padded.square().sum().backward()
    grads = gradients(moe)

    unpadded = moe(x[mask])
    assert_near(padded[mask], unpadded, 1e-12)
    counts = moe.last_routing.num_tokens_per_expert
    assert torch.equal(with_padding.num_tokens_per_expert, counts)
    unpadded.square().sum().backward()
    for name, gradient in gradients(moe).items():
        assert_near(grads[name], gradient, 1e-12, name)

    x[~mask] = 100 * torch.randn(4, D, dtype=torch.float64)  # whatever padding holds
    assert_near(moe(x, TokenInfo(mask=mask))[mask], unpadded, 1e-12)


def test_only_token_info_decides_what_is_masked():
    moe = moe_of()
    x = torch.zeros(5, D, dtype=torch.float64)
    x[2:] = torch.randn(3, D, dtype=torch.float64)
    moe(x, TokenInfo(input_ids=torch.zeros(5, dtype=torch.int64)))  # zeros look like padding
    assert int(moe.last_routing.num_tokens_per_expert.sum()) == 10
    moe(x, TokenInfo(mask=torch.arange(5) < 2))
    assert int(moe.last_routing.num_tokens_per_expert.sum()) == 4


def test_a_masked_token_still_gets_the_shared_experts():
    moe = moe_of(shared="gated")
    x = torch.randn(4, D, dtype=torch.float64)
    y = moe(x, TokenInfo(mask=torch.zeros(4, dtype=torch.bool)))
    assert_near(y, plain_moe(moe, x, [[]] * 4), 1e-12)


@quick
@given(t=st.integers(1, 20), k=st.integers(1, E), seed=st.integers(0, 999))
def test_permuting_tokens_permutes_outputs(t, k, seed):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, D, generator=stream)
    mask = torch.rand(t, generator=stream) > 0.2
    order = torch.randperm(t, generator=stream)
    for router, dtype, limit in itertools.product(
        ("token", "expert"), (torch.float32, torch.float64), (1e-5,)
    ):
        moe = moe_of(k=k, router=router, dtype=dtype)
        y = moe(x.to(dtype), TokenInfo(mask=mask))
        counts = moe.last_routing.num_tokens_per_expert
        y_permuted = moe(x.to(dtype)[order], TokenInfo(mask=mask[order]))
        assert torch.equal(moe.last_routing.num_tokens_per_expert, counts)
        assert_near(y_permuted, y[order], limit if dtype == torch.float32 else 1e-12)


@quick
@given(t=st.integers(1, 20), k=st.integers(2, E), seed=st.integers(0, 999))
def test_identical_experts_are_one_dense_ffn(t, k, seed):
    stream = torch.Generator().manual_seed(seed)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        moe = moe_of(k=k, bias=True, dtype=dtype)  # normalised weights sum to 1
        with torch.no_grad():
            for parameter in moe.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
        x = torch.randn(t, D, generator=stream).to(dtype)
        wanted = torch.stack([one_expert(moe.experts, 0, row) for row in x])
        assert_near(moe(x), wanted, limit)


@quick
@given(t=st.integers(2, 20), cut=st.integers(1, 19), seed=st.integers(0, 999))
def test_token_choice_sees_no_later_token(t, cut, seed):
    cut = min(cut, t - 1)
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, D, generator=stream)
    moe = moe_of(shared="gated", bias=True, dtype=torch.float32)
    before = moe(x)[:cut]
    x[cut:] = torch.randn(t - cut, D, generator=stream)
    assert_near(moe(x)[:cut], before, 1e-6)


@pytest.mark.parametrize("score_position", POSITIONS)
def test_experts_without_tokens_get_zero_gradients(score_position):
    moe = moe_of(score_position, bias=True, k=1)
    with torch.no_grad():
        moe.router.expert_bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    moe(torch.randn(8, D, dtype=torch.float64)).square().sum().backward()
    assert moe.last_routing.num_tokens_per_expert.tolist() == [8, 0, 0, 0]
    for name, parameter in moe.experts.named_parameters():
        assert not parameter.grad[1:].any(), name
        assert parameter.grad[0].any(), name


def test_all_tokens_masked_and_no_tokens_at_all():
    for tokens, mask in ((5, torch.zeros(5, dtype=torch.bool)), (0, None)):
        moe = moe_of(bias=True, dtype=torch.float32)
        y = moe(torch.randn(tokens, D), TokenInfo(mask=mask))
        assert torch.equal(y, torch.zeros(tokens, D))
        y.sum().backward()
        for name, parameter in moe.named_parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_position": "behind"}, "'behind' is not one of before, mid, after"),
        ({"shared_gate": True}, "no shared_experts to gate"),
        ({"experts_per_token": 5}, "experts_per_token is 5"),
        ({"router": ExpertChoiceTopKRouter(dim=D, num_experts=8)}, "serves 8 experts"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        moe_layer(embed_dim=D, expert_hidden_dim=H, num_experts=E, **changes)
