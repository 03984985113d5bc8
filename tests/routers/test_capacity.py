"""Capacity against loops over experts and tokens, its promises, and what it keeps in memory."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import D, E, assert_near, gradients, moe_of, plain_moe, quick
from helpers_memory import Largest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_builders.errors import InputError
from moe_builders.ops.row_ops import take_rows
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routers.capacity import Capacity
from moe_builders.routing import TokenInfo, check_routing, dense_weights, route_by_choice

RULES = list(
    itertools.product(
        ["sequence", "micro"],
        ["position", "probs"],
        ["token_major", "rank_major"],
        ["choices", "tokens"],
    )
)


def plain_kept(capacity, routing, *, factor):
    """[t][k] bool: a token, an expert, a place at a time."""
    t, k = routing.selected.shape
    e = routing.logits.shape[1]
    mask = [True] * t if routing.info.mask is None else routing.info.mask.tolist()
    sequence = [0] * t
    if capacity.scope == "sequence" and routing.info.sequence_ids is not None:
        sequence = routing.info.sequence_ids.tolist()
    weights = routing.weights.detach()[routing.slot_of].tolist()
    kept = [[True] * k for _ in range(t)] if routing.kept is None else routing.kept.tolist()
    turns = [(token, choice) for token in range(t) for choice in range(k)]
    if capacity.slot_order == "rank_major":
        turns.sort(key=lambda turn: turn[1])
    if capacity.drop == "probs":
        turns.sort(key=lambda turn: -weights[turn[0]][turn[1]])
    taken = {}
    for token, choice in turns:
        if not mask[token] or not kept[token][choice]:
            continue
        own = sequence[token]
        n = sum(real and other == own for real, other in zip(mask, sequence, strict=True))
        if capacity.share_of == "choices":
            limit = math.ceil(n * k * factor / e)
        else:
            limit = int(n * factor / e)
        limit = max(min(n, limit), capacity.minimum)
        cell = own, int(routing.selected[token, choice])
        taken[cell] = taken.get(cell, 0) + 1
        kept[token][choice] = taken[cell] <= limit
    return kept


def routing_of(t, k=2, e=4, *, seed=0, mask=None, sequence_ids=None, kept=None, **more):
    """Choices that crowd on the first experts."""
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, e, generator=stream, dtype=torch.float64)
    logits = (logits - torch.arange(e)).requires_grad_()
    probs = logits.softmax(-1)
    weights, expert = probs.topk(k, dim=-1)
    return route_by_choice(
        expert=expert,
        weights=weights,
        logits=logits,
        probs=probs,
        info=TokenInfo(mask=mask, sequence_ids=sequence_ids),
        kept=kept,
        **more,
    )


@quick
@given(
    t=st.integers(0, 24),
    k=st.integers(1, 4),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.25, 8.0]),
    minimum=st.integers(0, 3),
    seed=st.integers(0, 999),
    masked=st.booleans(),
    ragged=st.booleans(),
    policy=st.booleans(),
)
def test_every_rule_against_loops(t, k, factor, minimum, seed, masked, ragged, policy):
    stream = torch.Generator().manual_seed(seed)
    routing = routing_of(
        t,
        k,
        seed=seed,
        mask=torch.rand(t, generator=stream) > 0.3 if masked else None,
        # documents of uneven lengths, not even one after the other
        sequence_ids=torch.randint(0, min(3, t), (t,), generator=stream) if ragged and t else None,
        kept=torch.rand(t, k, generator=stream) > 0.3 if policy else None,
    )
    for scope, drop, slot_order, share_of in RULES:
        capacity = Capacity(
            factor=factor,
            minimum=minimum,
            scope=scope,
            drop=drop,
            slot_order=slot_order,
            share_of=share_of,
        )
        limited = capacity.limit(routing, training=True)
        check_routing(limited)
        wanted = torch.tensor(plain_kept(capacity, routing, factor=factor), dtype=torch.bool)
        assert torch.equal(limited.kept, wanted.view(t, k)), (scope, drop, slot_order, share_of)
        assert torch.equal(limited.selected, routing.selected)
        live = limited.kept
        if routing.info.mask is not None:
            live = live & routing.info.mask[:, None]
        full = torch.zeros(t, 4, dtype=torch.float64).scatter(1, routing.selected, 1.0)
        kept = torch.zeros(t, 4, dtype=torch.float64).scatter(1, routing.selected, live.double())
        assert torch.equal(dense_weights(limited), dense_weights(routing) * kept * full)
        assert torch.equal(limited.num_tokens_per_expert, kept.sum(0).int())


def test_the_two_shares_and_the_bounds():
    """e 4, k 2: ⌈n·k·factor/e⌉ and ⌊n·factor/e⌋, at most n, at least the minimum."""
    for share_of, factor, n, minimum, wanted in (
        ("choices", 1.25, 10, 0, 7),  # ⌈6.25⌉
        ("tokens", 1.25, 10, 0, 3),  # ⌊3.125⌋
        ("tokens", 1.25, 10, 4, 4),
        ("choices", 9.0, 10, 0, 10),
        ("choices", 0.1, 10, 0, 1),
        ("tokens", 0.1, 10, 0, 0),
    ):
        expert = torch.tensor([[0, 1]]).expand(n, 2)
        probs = torch.full((n, 4), 0.25)
        routing = route_by_choice(
            expert=expert, weights=probs[:, :2], logits=probs, probs=probs, info=TokenInfo()
        )
        capacity = Capacity(factor=factor, minimum=minimum, share_of=share_of)
        counts = capacity.limit(routing, training=True).num_tokens_per_expert
        assert counts.tolist() == [wanted, wanted, 0, 0], (share_of, factor, n, minimum)


def test_a_share_that_is_whole_is_not_rounded_away():
    for e in range(1, 257):
        probs = torch.full((e, e), 1 / e)
        expert = torch.zeros(e, 1, dtype=torch.int64)
        for share_of in ("choices", "tokens"):
            routing = route_by_choice(
                expert=expert, weights=probs[:, :1], logits=probs, probs=probs, info=TokenInfo()
            )
            capacity = Capacity(factor=1, minimum=0, share_of=share_of)
            counts = capacity.limit(routing, training=True).num_tokens_per_expert
            assert counts[0] == 1, (e, share_of)


def test_equal_weights_stay_in_the_order_of_their_tokens():
    t = 400
    expert, probs = torch.zeros(t, 1, dtype=torch.int64), torch.full((t, 4), 0.25)
    routing = route_by_choice(
        expert=expert, weights=probs[:, :1], logits=probs, probs=probs, info=TokenInfo()
    )
    limited = Capacity(factor=1, drop="probs").limit(routing, training=True)
    assert torch.equal(limited.kept[:, 0], torch.arange(t) < 100)


def test_dropless_where_no_factor_is_given():
    routing = routing_of(16)
    assert Capacity(factor=0.5).limit(routing, training=False) is routing
    assert Capacity(eval_factor=0.5).limit(routing, training=True) is routing
    limited = Capacity(eval_factor=0.5, minimum=0).limit(routing, training=False)
    assert not limited.kept.all()


def test_all_else_is_carried_over():
    mask = torch.arange(12) < 10
    kept = torch.rand(12, 2) > 0.2
    own_loss = torch.randn(12, requires_grad=True)
    routing = routing_of(12, mask=mask, kept=kept, own_loss=own_loss, straight_through=True)
    limited = Capacity(factor=0.5, minimum=1).limit(routing, training=True)
    assert limited.own_loss is own_loss
    assert limited.info is routing.info
    assert limited.logits is routing.logits
    assert limited.probs is routing.probs
    assert torch.equal(limited.input_weights, torch.ones(24, dtype=torch.float64))
    assert limited.input_weights.requires_grad
    assert torch.equal(limited.kept[~mask], kept[~mask]), "a masked token was not dropped"
    assert not (limited.kept & ~kept).any()
    assert Capacity(factor=0.5).limit(routing_of(9), training=True).input_weights is None


def test_experts_that_pick_and_a_padded_list_are_refused():
    routing = ExpertChoiceTopKRouter(dim=6, num_experts=4)(torch.randn(8, 6), TokenInfo())
    with pytest.raises(InputError, match="experts pick tokens"):
        Capacity(factor=1).limit(routing, training=True)
    padded = Capacity(factor=1, scope="micro", pad=True).limit(routing_of(8), training=True)
    with pytest.raises(InputError, match="padded before"):
        Capacity(factor=1).limit(padded, training=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "limits nothing"),
        ({"factor": 0}, "factor is 0, but must be a number above 0"),
        ({"factor": float("inf")}, "factor is inf"),
        ({"factor": 1, "eval_factor": -1}, "eval_factor is -1"),
        ({"factor": 1, "minimum": -1}, "minimum is -1"),
        ({"factor": 1, "scope": "batch"}, "scope 'batch' is not one of sequence, micro"),
        ({"factor": 1, "drop": "random"}, "drop 'random' is not one of position, probs"),
        ({"factor": 1, "slot_order": "x"}, "slot_order 'x' is not one of token_major, rank_major"),
        ({"factor": 1, "share_of": "x"}, "share_of 'x' is not one of choices, tokens"),
        ({"factor": 1, "pad": True}, "set scope to 'micro'"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        Capacity(**arguments)


def layer(capacity, *, bias=False, k=2, score_position="after"):
    moe = moe_of(score_position, k=k, bias=bias)
    moe.capacity = capacity
    return moe


def test_causal_says_what_a_changed_suffix_shows():
    """Lengths stay; the last 8 of 32 tokens change; does any token before them notice?"""
    for drop, slot_order in itertools.product(("position", "probs"), ("token_major", "rank_major")):
        capacity = Capacity(factor=0.5, minimum=0, drop=drop, slot_order=slot_order)
        moe = layer(capacity)
        moved = 0
        for _ in range(20):
            x = torch.randn(32, D, dtype=torch.float64)
            before = moe(x)[:24]
            x[24:] = torch.randn(8, D, dtype=torch.float64)
            moved += not torch.equal(moe(x)[:24], before)
        assert capacity.causal(training=True) == (moved == 0), (drop, slot_order, moved)
        assert moved in (0, *range(15, 21))  # a leak is no rare event
        assert capacity.causal(training=False), "no limit there"
    assert not Capacity(eval_factor=1, drop="probs").causal(training=False)


@pytest.mark.parametrize("score_position", ["before", "mid", "after"])
def test_a_dropped_choice_gives_nothing_and_leaves_the_others(score_position):
    moe = layer(Capacity(factor=0.6, minimum=0), score_position=score_position)
    x = torch.randn(16, D, dtype=torch.float64)
    y = moe(x)
    kept = moe.last_routing.kept
    assert (~kept).any(1).any()
    assert (~kept).all(1).any(), "a token without any expert"
    moe.capacity = None
    moe(x)
    routing = moe.last_routing
    weights = routing.weights[routing.slot_of]
    choice = [
        [(int(routing.selected[t, r]), weights[t, r]) for r in range(2) if kept[t, r]]
        for t in range(16)
    ]
    assert_near(y, plain_moe(moe, x, choice), 1e-12)
    assert torch.equal(y[(~kept).all(1)], torch.zeros(int((~kept).all(1).sum()), D).double())


@pytest.mark.parametrize("pad", [False, True])
def test_masked_tokens_of_nan_change_nothing(pad):
    """Not the capacities, nor outputs, nor gradients of experts and of real tokens."""
    x = torch.randn(14, D, dtype=torch.float64)
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    results = []
    for tokens, info in ((x, TokenInfo(mask=mask)), (x[mask], None)):
        moe = layer(Capacity(factor=0.7, minimum=0, scope="micro", pad=pad), bias=True)
        tokens = tokens.clone()
        if info is not None:
            tokens[~mask] = float("nan")
        tokens.requires_grad_()
        moe.router.gate.requires_grad_(False)  # a linear layer of NaN has a gradient of NaN
        y = moe(tokens, info)
        y.square().sum().backward()
        kept, grad = moe.last_routing.kept, tokens.grad
        if info is not None:
            assert torch.equal(y[~mask], torch.zeros(4, D).double())
            y, kept = y[mask], kept[mask]
            grad = grad[mask]
        results.append((y, kept, grad, gradients(moe)))
    (y, kept, grad, weights), (y2, kept2, grad2, weights2) = results
    assert torch.equal(kept, kept2)
    assert not kept.all()
    assert_near(y, y2, 1e-12)
    assert_near(grad, grad2, 1e-12)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert_near(weights[name], weights2[name], 1e-12, name)


@quick
@given(
    t=st.integers(0, 20),
    k=st.integers(1, 3),
    factor=st.sampled_from([0.3, 1.0, 3.0]),
    drop=st.sampled_from(["position", "probs"]),
    masked=st.booleans(),
    straight=st.booleans(),
    score_position=st.sampled_from(["before", "mid", "after"]),
    seed=st.integers(0, 999),
)
def test_padding_to_capacity_changes_no_output_and_no_gradient(
    t, k, factor, drop, masked, straight, score_position, seed
):
    """With biases, which answer to the zeros of a row in excess, too."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, D, generator=stream, dtype=torch.float64)
    mask = torch.rand(t, generator=stream) > 0.4 if masked else None
    results = []
    for pad in (False, True):
        moe = layer(
            Capacity(factor=factor, minimum=2, scope="micro", drop=drop, pad=pad), bias=True, k=k
        )
        moe.score_position = score_position
        if straight:
            moe.router = StraightThrough(moe.router)
        tokens = x.clone().requires_grad_()
        y = moe(tokens, TokenInfo(mask=mask))
        y.square().sum().backward()
        results.append((y, tokens.grad, gradients(moe), moe.last_routing))
    (y, grad, weights, routing), (padded_y, padded_grad, padded_weights, padded) = results
    assert_near(padded_y, y, 1e-12)
    assert_near(padded_grad, grad, 1e-12)
    for name, gradient in weights.items():
        assert_near(padded_weights[name], gradient, 1e-12, name)
    assert torch.equal(padded.kept, routing.kept)
    if t:
        assert_near(dense_weights(padded), dense_weights(routing), 1e-15)
    rows = max(min(t, math.ceil(t * k * factor / E)), 2)
    if t and (mask is None or mask.any()):
        check_routing(padded)
        assert padded.num_tokens_per_expert.tolist() == [rows] * E
        assert padded.token_index.shape == (E * rows,)


class StraightThrough(nn.Module):
    """A router whose weights also get a gradient as if they multiplied the input."""

    def __init__(self, router):
        super().__init__()
        self.router, self.num_experts = router, router.num_experts

    def forward(self, x, info):
        routing = self.router(x, info)
        weights = routing.weights
        return replace(routing, input_weights=1 + (weights - weights.detach()))


def test_padding_when_every_token_is_masked():
    moe = layer(Capacity(factor=1, scope="micro", pad=True), bias=True)
    moe.router.gate.requires_grad_(False)
    x = torch.full((6, D), float("nan"), dtype=torch.float64)
    y = moe(x, TokenInfo(mask=torch.zeros(6, dtype=torch.bool)))
    assert torch.equal(y, torch.zeros(6, D, dtype=torch.float64))
    y.sum().backward()
    for name, parameter in moe.experts.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    check_routing(replace(moe.last_routing, logits=torch.zeros(6, E), probs=torch.ones(6, E) / E))


def test_a_padding_row_is_zeros_even_beside_a_huge_token():
    """A row in excess must not run a real token through an expert it was not made for."""
    moe = layer(Capacity(factor=4, minimum=0, scope="micro", pad=True))
    moe.experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].detach(), kwargs["assigned"])),
        with_kwargs=True,
    )
    seen = []
    moe(torch.randn(8, D, dtype=torch.float64))
    routing = moe.last_routing
    spare = routing.input_weights == 0
    assert int(spare.sum()) == E * 8 - 16
    ((tokens, assigned),) = seen
    rows = take_rows(tokens, assigned.token_index, assigned.input_weights)  # what experts see
    assert torch.equal(rows[spare], torch.zeros(int(spare.sum()), D).double())


def test_an_expert_of_nobody():
    routing = routing_of(10, k=1, e=6)
    counts = Capacity(factor=9).limit(routing, training=True).num_tokens_per_expert
    assert (counts == 0).any()
    assert counts.sum() == 10


def test_gradients_reach_the_gate_through_what_is_kept():
    moe = layer(Capacity(factor=0.5, minimum=1))
    x = torch.randn(12, D, dtype=torch.float64)

    def loss(weight):
        with torch.no_grad():
            moe.router.gate.weight.copy_(weight)
        return moe(x).square().sum()

    start = moe.router.gate.weight.detach().clone()
    loss(start).backward()
    found = moe.router.gate.weight.grad[1, 2]
    step = torch.zeros_like(start)
    step[1, 2] = 1e-6
    assert_near(found, (loss(start + step) - loss(start - step)) / 2e-6, 1e-6)


def test_what_is_made_grows_with_the_assignments_alone():
    """No tensor [t, e, c], nor [t, e]: the largest that is made has a elements."""
    t, k, e = 512, 2, 64
    router = TokenChoiceTopKRouter(dim=8, num_experts=e, experts_per_token=k)
    info = TokenInfo(sequence_ids=torch.arange(t) // 128)
    routing = router(torch.randn(t, 8), info)
    for drop, slot_order in itertools.product(("position", "probs"), ("token_major", "rank_major")):
        capacity = Capacity(factor=1, drop=drop, slot_order=slot_order)
        with Largest() as largest:
            capacity.limit(routing, training=True)
        assert largest.elements <= t * k + 1, (drop, slot_order)


@pytest.mark.parametrize("pad", [False, True])
def test_one_graph_and_one_shape_whatever_is_masked(pad):
    capacity = Capacity(factor=0.7, minimum=1, scope="micro", drop="probs", pad=pad)
    moe = layer(capacity)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="eager", fullgraph=True, dynamic=False)
    x = torch.randn(12, D, dtype=torch.float64)
    for real in (12, 5, 0):
        info = TokenInfo(mask=torch.arange(12) < real)
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x, info)
        assert_near(y, moe(x, info), 1e-12)


def test_padding_nothing_has_the_same_parts():
    """Processes that exchange rows must agree on what there is to exchange, with or without."""
    padded = Capacity(factor=1, scope="micro", pad=True).limit(routing_of(0), training=True)
    assert padded.slot_of is None
    assert padded.input_weights is not None
    assert padded.input_weights.shape == (0,)
