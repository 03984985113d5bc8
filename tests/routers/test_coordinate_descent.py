"""Soft top-k scores against loops over numbers, the router that uses them, and masks."""

import math

import pytest
import torch
from helpers import assert_near, quick, randomise
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.errors import InputError
from moe_builders.routers.coordinate_descent import (
    CoordinateDescentRouter,
    coordinate_descent,
    soft_top_k,
)
from moe_builders.routing import TokenInfo, check_routing


def plain_scores(values, k, iterations=20, eps=0.1, eps_init=None, eps_decay=1.0):
    """One row of numbers -> its scores."""
    now = max(eps_init or eps, eps)
    row, own = 0.0, [-v for v in values]
    for _ in range(iterations):
        shifted = [(v + b) / now for v, b in zip(values, own, strict=True)]
        top = max(shifted)
        row = now * (math.log(k) - top - math.log(sum(math.exp(z - top) for z in shifted)))
        own = [-max(v + row, 0.0) for v in values]
        now = max(now * eps_decay, eps)
    return [math.exp((v + row + b) / now) for v, b in zip(values, own, strict=True)]


@quick
@given(
    e=st.integers(1, 12),
    k=st.floats(0.5, 12),
    iterations=st.integers(1, 25),
    eps=st.sampled_from([0.02, 0.1, 1.0]),
    eps_init=st.sampled_from([None, 0.01, 4.0]),
    eps_decay=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 999),
)
def test_formulas(e, k, iterations, eps, eps_init, eps_decay, seed):
    stream = torch.Generator().manual_seed(seed)
    values = torch.randn(5, e, generator=stream, dtype=torch.float64)
    options = {"iterations": iterations, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay}
    k = min(k, e)
    got = coordinate_descent(values, k=k, **options)
    for row, scores in zip(values.tolist(), got, strict=True):
        hand = torch.tensor(plain_scores(row, k, **options), dtype=torch.float64)
        assert_near(scores, hand, 1e-10)


def test_scores_lie_between_0_and_1_sum_to_k_and_harden():
    values = torch.rand(64, 16, dtype=torch.float64).softmax(-1) * 8
    for k in (1, 2.25, 9, 16):
        scores = coordinate_descent(values, k=k, iterations=200)
        assert ((scores >= 0) & (scores <= 1 + 1e-12)).all()
        assert (scores.sum(-1) - k).abs().max() < 1e-3 * k
        order = values.argsort(-1)
        assert (scores.gather(1, order).diff(dim=1) >= -1e-12).all(), "higher for higher values"
    values = torch.linspace(0, 1, 16, dtype=torch.float64)[torch.randperm(16)]
    hard = coordinate_descent(values, k=4, iterations=500, eps=3e-3, eps_init=4.0, eps_decay=0.98)
    wanted = torch.zeros(16, dtype=torch.float64).index_fill(0, values.topk(4).indices, 1.0)
    assert_near(hard, wanted, 1e-6)


def test_what_is_not_taken_gets_a_gradient():
    values = torch.randn(3, 8, dtype=torch.float64).softmax(-1).requires_grad_()
    scores, expert = soft_top_k(values, 2)
    assert torch.equal(expert, values.topk(2).indices)
    scores.gather(1, expert)[:, 1].sum().backward()
    others = values.grad.clone().scatter(1, expert, 0.0)
    assert (others != 0).sum() == 3 * 6
    assert torch.autograd.gradcheck(lambda v: coordinate_descent(v, k=2.25, iterations=5), values)


def test_masked_values_take_no_part_whatever_they_hold():
    values = torch.randn(4, 9, dtype=torch.float64)
    allowed = torch.tensor([0, 2, 3, 5, 8])
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, allowed] = True
    mask[3] = False  # a row without any
    for eps in (0.1, 4.0):  # from eps 1 on the lowest float times eps is no float
        for rubbish in (100.0, float("nan"), float("-inf")):
            dirty = values.masked_fill(~mask, rubbish).requires_grad_()
            scores = coordinate_descent(dirty, k=2, eps=eps, mask=mask)
            wanted = coordinate_descent(values[:3, allowed], k=2, eps=eps)
            assert_near(scores[:3, allowed], wanted, 1e-12)
            assert torch.equal(scores[~mask], torch.zeros(int((~mask).sum())).double())
            scores.square().sum().backward()
            assert torch.isfinite(dirty.grad).all()
            assert not dirty.grad[~mask].any()
            assert dirty.grad[:3, allowed].any(1).all()


def test_arithmetic_is_fp32_or_wider():
    values = torch.randn(4, 8).bfloat16()
    assert torch.equal(coordinate_descent(values, k=2), coordinate_descent(values.float(), k=2))
    assert coordinate_descent(values.double(), k=2).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"k": 9}, "k is 9, but must be above 0 and at most the number of values"),
        ({"k": 0}, "k is 0"),
        ({"k": 2, "iterations": 0}, "iterations is 0"),
        ({"k": 2, "eps": 0}, "eps is 0"),
        ({"k": 2, "eps_init": -1}, "eps_init -1"),
        ({"k": 2, "eps_decay": 0}, "eps_decay is 0"),
        ({"k": 2, "eps_decay": 1.1}, "eps_decay is 1.1"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        coordinate_descent(torch.randn(3, 8), **arguments)


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 8, "experts_per_token": 3} | changes
    return randomise(CoordinateDescentRouter(**arguments)).double()


@pytest.mark.parametrize(("k", "normalize"), [(1, True), (3, True), (3, False), (8, True)])
def test_router_formulas(k, normalize):
    router = router_of(experts_per_token=k, normalize_weights=normalize, route_scale=2.5)
    x = torch.randn(20, 6, dtype=torch.float64)
    routing = router(x, TokenInfo())
    check_routing(routing)
    probs = (x @ router.gate.weight.t()).softmax(-1)
    weights = routing.weights[routing.slot_of]
    for row, expert, got in zip(probs.tolist(), routing.selected.tolist(), weights, strict=True):
        assert expert == sorted(range(8), key=lambda j: -row[j])[:k]
        scores = plain_scores(row, min(k * 9 / 8, 8))
        chosen = [scores[j] for j in expert]
        if normalize and k > 1:
            chosen = [score / sum(chosen) for score in chosen]
        assert_near(got, 2.5 * torch.tensor(chosen, dtype=torch.float64), 1e-10)
    assert_near(routing.probs, probs, 1e-12)


def test_router_options_reach_the_scores():
    options = {"iterations": 5, "eps": 0.02, "eps_init": 4.0, "eps_decay": 0.5}
    router = router_of(k_ratio=2.0, normalize_weights=False, **options)
    x = torch.randn(4, 6, dtype=torch.float64)
    routing = router(x, TokenInfo())
    scores = coordinate_descent(routing.probs, k=6.0, **options)
    wanted = scores.gather(1, routing.selected)
    assert_near(routing.weights[routing.slot_of], wanted, 1e-12)


def test_router_gives_every_expert_a_gradient_and_masked_nan_none():
    x = torch.randn(9, 6, dtype=torch.float64)
    mask = torch.arange(9) % 3 != 1
    router = router_of()
    router(x[mask], TokenInfo()).weights.square().sum().backward()
    wanted = router.gate.weight.grad
    assert wanted.any(1).all()
    router.zero_grad()
    x[~mask] = float("nan")
    routing = router(x, TokenInfo(mask=mask))
    assert int(routing.num_tokens_per_expert.sum()) == 18
    routing.weights.square().sum().backward()
    assert_near(router.gate.weight.grad, wanted, 1e-12)


def test_router_jitter_is_of_training_and_spares_the_z_loss():
    router = router_of(jitter="gumbel", jitter_scale=1.0)
    x = torch.randn(30, 6, dtype=torch.float64)
    clean = x @ router.gate.weight.t()
    noisy, quiet = router(x, TokenInfo()), router.eval()(x, TokenInfo())
    assert_near(noisy.logits, clean, 1e-12)
    assert not torch.equal(noisy.selected, quiet.selected)
    assert_near(quiet.probs, clean.softmax(-1), 1e-12)


def test_router_sees_no_later_token_and_says_so():
    router = router_of()
    assert router.causal
    x = torch.randn(12, 6, dtype=torch.float64)
    before = router(x, TokenInfo()).selected[:7]
    x[7:] = 0
    assert torch.equal(router(x, TokenInfo()).selected[:7], before)


def test_router_replays_a_selection():
    router = router_of()
    x = torch.randn(5, 6, dtype=torch.float64)
    recorded = torch.tensor([[7, 0, 3]]).expand(5, 3)
    router.replay = lambda expert: recorded
    routing = router(x, TokenInfo())
    assert torch.equal(routing.selected, recorded)
    scores = coordinate_descent(routing.probs, k=3 * 9 / 8).gather(1, recorded)
    wanted = scores / scores.sum(-1, keepdim=True)
    assert_near(routing.weights[routing.slot_of], wanted, 1e-12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"experts_per_token": 9}, "experts_per_token is 9, but must lie between 1 and"),
        ({"k_ratio": 0.9}, "k_ratio is 0.9, but must be at least 1"),
        ({"eps": 0}, "eps is 0"),
        ({"jitter_scale": 1.0}, "jitter is not set"),
    ],
)
def test_router_refusals(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        router_of(**arguments)
