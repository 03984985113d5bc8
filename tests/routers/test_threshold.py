"""Threshold gating against loops, its policies, its promises, and who sees whom."""

import itertools

import pytest
import torch
from helpers import (
    D,
    E,
    assert_near,
    assert_same_bits,
    gradients,
    moe_of,
    plain_moe,
    quick,
    randomise,
)
from helpers_memory import Largest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_builders.errors import InputError
from moe_builders.routers.coordinate_descent import soft_top_k
from moe_builders.routers.threshold import ThresholdRouter
from moe_builders.routing import TokenInfo, check_routing, dense_weights

POLICIES = ["random", "threshold", "all", "none"]


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 8, "experts_per_token": 3, "capacity_factor": None}
    return randomise(ThresholdRouter(**arguments | changes)).double()


def plain_gates(router, x):
    """For each token its (expert, weight), best first, as numbers and scalars with a gradient."""
    chosen = []
    for token in x:
        logits = [(row * token).sum() for row in router.gate.weight]
        total = sum(z.exp() for z in logits)
        probs = [z.exp() / total for z in logits]
        best = sorted(range(len(probs)), key=lambda j: -float(probs[j].detach()))
        best = best[: router.experts_per_token]
        weights = [probs[j] for j in best]
        if len(best) > 1:
            weights = [w / sum(weights) for w in weights]
        chosen.append(list(zip(best, weights, strict=True)))
    return chosen


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_formulas(policy, training, k):
    thresholds = [0.3, 0.25, 0.2, 0.1, 0.1, 0.05, 0.02][: k - 1]
    eval_thresholds = [0.4, 0.1, 0.1, 0.1, 0.1, 0.05, 0.02][: k - 1]
    router = router_of(
        policy=policy, experts_per_token=k, threshold=thresholds, eval_threshold=eval_thresholds
    ).train(training)
    x = torch.randn(40, 6, dtype=torch.float64)
    torch.manual_seed(3)
    routing = router(x, TokenInfo())
    check_routing(routing)
    torch.manual_seed(3)
    uniform = torch.rand(40, k, dtype=torch.float64)
    limits = thresholds if training else eval_thresholds
    dense, kept = torch.zeros(40, 8, dtype=torch.float64), []
    for token, choices in enumerate(plain_gates(router, x)):
        assert [j for j, _ in choices] == routing.selected[token].tolist()
        row = [True]
        for r, limit in enumerate(limits, start=1):
            weight = float(choices[r][1].detach())
            if policy == "random" and training:
                row.append(float(uniform[token, r]) < weight / limit)
            else:
                row.append({"all": True, "none": False}.get(policy, weight >= limit))
        kept.append(row)
        for (j, weight), taken in zip(choices, row, strict=True):
            dense[token, j] = weight if taken else 0
    assert_near(dense_weights(routing), dense, 1e-12)
    if policy == "all":
        assert routing.kept is None
    else:
        assert routing.kept.tolist() == kept
    assert_near(routing.logits, x @ router.gate.weight.t(), 1e-12)
    assert_near(routing.probs, routing.logits.softmax(-1), 1e-12)


def test_the_random_policy_takes_in_proportion():
    """P(taken) = min(1, g_2 / threshold), the first choice always."""
    router = router_of(experts_per_token=2, num_experts=2, threshold=0.4)
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.weight[0, 0] = 1.0
    for weight, wanted in ((0.1, 0.25), (0.3, 0.75), (0.45, 1.0)):
        x = torch.zeros(20000, 6, dtype=torch.float64)
        x[:, 0] = torch.log(torch.tensor((1 - weight) / weight))
        kept = router(x, TokenInfo()).kept
        assert kept[:, 0].all()
        assert abs(float(kept[:, 1].double().mean()) - wanted) < 0.015  # 5 standard deviations
        if wanted == 1.0:
            assert kept.all()


def test_evaluation_is_deterministic_unless_asked_and_draws_nothing():
    x = torch.randn(60, 6)
    router = router_of(threshold=0.9, eval_threshold=0.9).float().eval()
    before = torch.get_rng_state()
    first = dense_weights(router(x, TokenInfo()))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, dense_weights(router(x, TokenInfo())))
    router.stochastic_eval = True
    drawn = [router(x, TokenInfo()).kept for _ in range(2)]
    assert not torch.equal(*drawn)


def test_one_uniform_number_a_choice_is_drawn():
    x = torch.randn(10, 6)
    for policy, stochastic in (("random", True), ("threshold", False), ("all", False)):
        router = router_of(policy=policy).float()
        torch.manual_seed(0)
        router(x, TokenInfo())
        after = torch.rand(1)
        torch.manual_seed(0)
        if stochastic:
            torch.rand(10, 3)
        assert torch.equal(after, torch.rand(1)), policy


def test_a_threshold_of_0_always_takes():
    routing = router_of(threshold=0)(torch.randn(50, 6, dtype=torch.float64), TokenInfo())
    assert routing.kept.all()


def test_a_threshold_counts_for_at_least_normalize_eps():
    """Two equal weights of 0.5 against a threshold of 0.1 that counts as 1: taken half the time."""
    router = router_of(experts_per_token=2, num_experts=2, threshold=0.1, normalize_eps=1.0)
    nn.init.zeros_(router.gate.weight)
    kept = router(torch.randn(4000, 6, dtype=torch.float64), TokenInfo()).kept[:, 1]
    assert abs(float(kept.double().mean()) - 0.5) < 0.04  # 5 standard deviations


def test_equal_thresholds_as_one_number():
    x = torch.randn(30, 6, dtype=torch.float64)
    many = router_of(policy="threshold", threshold=(0.3, 0.3))(x, TokenInfo())
    one = router_of(policy="threshold", threshold=0.3)(x, TokenInfo())
    assert torch.equal(many.kept, one.kept)
    assert not one.kept.all()


def plain_capacity(taken, selected, sequence, mask, factor, minimum, slot_order, e):
    """Slots given out one by one, per sequence, with c = max(min(n, int(n·factor/e)), minimum)."""
    t, k = selected.shape
    kept = taken.clone()
    used = {}
    turns = list(itertools.product(range(t), range(k)))
    if slot_order == "rank_major":
        turns.sort(key=lambda turn: turn[1])
    for token, choice in turns:
        if not mask[token] or not taken[token, choice]:
            continue
        own = int(sequence[token])
        n = int(((sequence == own) & mask).sum())
        cell = own, int(selected[token, choice])
        used[cell] = used.get(cell, 0) + 1
        kept[token, choice] = used[cell] <= max(min(n, int(n * factor / e)), minimum)
    return kept


@quick
@given(
    t=st.integers(1, 30),
    slot_order=st.sampled_from(["token_major", "rank_major"]),
    policy=st.sampled_from(["random", "threshold", "all"]),
    factor=st.sampled_from([0.5, 1.0, 1.25, 2.0]),
    training=st.booleans(),
    seed=st.integers(0, 999),
)
def test_capacity_of_ragged_sequences(t, slot_order, policy, factor, training, seed):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, 6, generator=stream, dtype=torch.float64)
    sequence = torch.randint(0, min(3, t), (t,), generator=stream).sort().values
    mask = torch.rand(t, generator=stream) > 0.2
    info = TokenInfo(mask=mask, sequence_ids=sequence)
    free = router_of(policy=policy).train(training)
    torch.manual_seed(seed)
    unlimited = free(x, info)
    taken = unlimited.kept
    if taken is None:
        taken = torch.ones(t, 3, dtype=torch.bool)
    factors = {"capacity_factor" if training else "eval_capacity_factor": factor}
    router = router_of(policy=policy, min_capacity=1, slot_order=slot_order, **factors)
    router.train(training)
    torch.manual_seed(seed)
    routing = router(x, info)
    check_routing(routing)
    wanted = plain_capacity(taken, unlimited.selected, sequence, mask, factor, 1, slot_order, 8)
    assert torch.equal(routing.kept, wanted)
    assert torch.equal(routing.selected, unlimited.selected)
    counts = torch.zeros(8, dtype=torch.int64)
    for token, choice in itertools.product(range(t), range(3)):
        counts[routing.selected[token, choice]] += mask[token] & wanted[token, choice]
    assert routing.num_tokens_per_expert.tolist() == counts.tolist()


def test_defaults_train_with_capacity_and_evaluate_without():
    router = ThresholdRouter(dim=6, num_experts=4)
    with torch.no_grad():
        router.gate.weight.zero_()[0].fill_(1.0)
    x = torch.rand(40, 6)
    assert router(x, TokenInfo()).num_tokens_per_expert[0] == 12  # int(40 · 1.25 / 4)
    assert router(x[:8], TokenInfo()).num_tokens_per_expert[0] == 4  # the minimum
    assert router.eval()(x, TokenInfo()).num_tokens_per_expert[0] == 40
    micro = ThresholdRouter(dim=6, num_experts=4, capacity_scope="micro")
    micro.load_state_dict(router.state_dict())
    rows = TokenInfo(sequence_ids=torch.arange(40) // 5)
    assert micro(x, rows).num_tokens_per_expert[0] == 12
    assert router.train()(x, rows).num_tokens_per_expert[0] == 8 * 4


def test_a_weight_at_its_threshold_is_taken():
    router = router_of(experts_per_token=2, policy="threshold", threshold=0.5)
    nn.init.zeros_(router.gate.weight)  # all equal: both weights are exactly a half
    assert router(torch.randn(9, 6, dtype=torch.float64), TokenInfo()).kept.all()


def test_the_weights_sum_counts_for_at_least_normalize_eps():
    router = router_of(policy="all", normalize_eps=2.0)
    x = torch.randn(9, 6, dtype=torch.float64)
    routing = router(x, TokenInfo())
    assert_near(dense_weights(routing).sum(1), routing.probs.topk(3).values.sum(1) / 2, 1e-12)


def moe_with(**changes):
    moe = moe_of()
    arguments = {"experts_per_token": 2, "threshold": 0.6, "min_capacity": 1} | changes
    router = ThresholdRouter(dim=D, num_experts=E, **arguments)
    moe.router = randomise(router, seed=1).double()
    return moe


@pytest.mark.parametrize("slot_order", ["token_major", "rank_major"])
@pytest.mark.parametrize("training", [True, False])
def test_causal_says_what_a_changed_suffix_shows(slot_order, training):
    moe = moe_with(slot_order=slot_order, capacity_factor=1.0, threshold=0.0).train(training)
    moved = 0
    for _ in range(20):
        x = torch.randn(32, D, dtype=torch.float64)
        before = moe(x)[:24]
        x[24:] = torch.randn(8, D, dtype=torch.float64)
        moved += not torch.equal(moe(x)[:24], before)
    assert moe.router.causal == (moved == 0), moved
    assert moe.router.causal == (slot_order == "token_major" or not training)
    assert moved in (0, *range(12, 21))
    assert not router_of(eval_capacity_factor=1, slot_order="rank_major").eval().causal


def test_dropped_tokens_pass_with_nothing():
    moe = moe_with(capacity_factor=0.5)
    x = torch.randn(24, D, dtype=torch.float64)
    y = moe(x)
    routing = moe.last_routing
    assert (~routing.kept).all(1).any()
    assert torch.equal(y[(~routing.kept).all(1)], torch.zeros_like(y[(~routing.kept).all(1)]))
    gates = plain_gates(moe.router, x)
    choice = [
        [pair for pair, kept in zip(pairs, row, strict=True) if kept]
        for pairs, row in zip(gates, routing.kept.tolist(), strict=True)
    ]
    assert_near(y, plain_moe(moe, x, choice), 1e-12)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_against_loops(straight_through, differentiable):
    """Straight-through: an expert's input counts as weight · x in backward, as x in forward."""
    moe = moe_with(
        straight_through=straight_through, policy="threshold", threshold=0.3,
        differentiable_topk=differentiable, capacity_factor=1.0,
    )  # fmt: skip
    x = torch.randn(12, D, dtype=torch.float64, requires_grad=True)
    y = moe(x)
    kept, selected = moe.last_routing.kept, moe.last_routing.selected
    assert not kept.all()
    y.square().sum().backward()
    got = {**gradients(moe), "x": x.grad.clone()}

    x.grad = None
    probs = (x @ moe.router.gate.weight.t()).softmax(-1)
    scores = soft_top_k(probs, 2)[0] if differentiable else probs
    weights = scores.gather(1, selected)
    weights = weights / weights.sum(1, keepdim=True)
    rows = []
    for token in range(12):
        row = torch.zeros(D, dtype=torch.float64)
        for r in range(2):
            if kept[token, r]:
                w = weights[token, r]
                given = x[token] * (1 + w - w.detach()) if straight_through else x[token]
                one = plain_moe(moe, given[None], [[(int(selected[token, r]), w)]])[0]
                row = row + one
        rows.append(row)
    wanted = torch.stack(rows)
    assert_near(y, wanted, 1e-12)
    wanted.square().sum().backward()
    for name, gradient in {**gradients(moe), "x": x.grad}.items():
        assert_near(got[name], gradient, 1e-10, name)


def test_straight_through_costs_nothing_without_gradients():
    router = router_of()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert router(x, TokenInfo()).input_weights is not None
    with torch.no_grad():
        assert router(x, TokenInfo()).input_weights is None


@pytest.mark.parametrize("policy", ["random", "threshold", "all"])
def test_masked_tokens_of_nan_change_nothing(policy):
    x = torch.randn(14, D, dtype=torch.float64)
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    ids = torch.tensor([0] * 8 + [3] * 6)
    # a threshold of 0 keeps the random policy's draws, which stand at other tokens, out of it
    moe = moe_with(policy=policy, threshold=0.0 if policy == "random" else 0.4, capacity_factor=1.0)
    moe(x[mask], TokenInfo(sequence_ids=ids[mask])).square().sum().backward()
    routing, wanted = moe.last_routing, gradients(moe)
    assert not routing.kept.all()
    y = moe(x[mask], TokenInfo(sequence_ids=ids[mask]))
    x[~mask] = float("nan")
    dirty = moe(x, TokenInfo(mask=mask, sequence_ids=ids))
    check_routing(moe.last_routing)
    assert_near(dirty[mask], y, 1e-12)
    assert torch.equal(dirty[~mask], torch.zeros(4, D).double())
    assert torch.equal(moe.last_routing.kept[mask], routing.kept)
    dirty.square().sum().backward()
    for name, gradient in gradients(moe).items():
        assert_near(gradient, wanted[name], 1e-12, name)


def test_jitter_is_of_training_and_spares_the_z_loss():
    router = router_of(jitter="gumbel", jitter_scale=1.0, policy="all")
    x = torch.randn(30, 6, dtype=torch.float64)
    clean = x @ router.gate.weight.t()
    noisy, quiet = router(x, TokenInfo()), router.eval()(x, TokenInfo())
    assert_near(noisy.logits, clean, 1e-12)
    assert not torch.equal(noisy.selected, quiet.selected)
    best = noisy.probs.topk(3).indices
    assert torch.equal(noisy.selected, best), "probs are those of the noisy logits"


def test_replay_uses_the_recorded_experts():
    router = router_of(policy="threshold", threshold=0.3)
    x = torch.randn(5, 6, dtype=torch.float64)
    recorded = torch.tensor([[7, 0, 3]]).expand(5, 3)
    router.replay = lambda expert: recorded
    routing = router(x, TokenInfo())
    assert torch.equal(routing.selected, recorded)
    weights = routing.probs.gather(1, recorded)
    weights = weights / weights.sum(1, keepdim=True)
    taken = torch.cat([torch.ones(5, 1, dtype=torch.bool), weights[:, 1:] >= 0.3], 1)
    assert torch.equal(routing.kept, taken)
    assert_near(routing.weights[routing.slot_of], torch.where(taken, weights, 0), 1e-12)


def test_with_one_expert_a_token_the_weight_is_its_prob():
    router = router_of(experts_per_token=1, capacity_factor=1.25)
    x = torch.randn(20, 6, dtype=torch.float64)
    routing = router(x, TokenInfo())
    live = routing.kept[:, 0]
    wanted = torch.where(live, routing.probs.amax(-1), 0)
    assert_near(dense_weights(routing).sum(1), wanted, 1e-12)
    routing.weights.sum().backward()
    assert router.gate.weight.grad.any()


def test_no_token_and_one_token():
    for t in (0, 1):
        moe = moe_with()
        y = moe(torch.randn(t, D, dtype=torch.float64))
        assert y.shape == (t, D)
        y.sum().backward()
        assert moe.router.gate.weight.grad is not None


def test_a_recomputation_draws_the_same_numbers():
    moe = moe_with(threshold=0.9)
    x = torch.randn(20, D, dtype=torch.float64)
    found = []
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=False)):
        torch.manual_seed(5)
        y = run(x)
        torch.rand(3)  # what comes after in the forward
        y.square().sum().backward()
        found.append(gradients(moe))
    assert_same_bits(found[1], found[0])


def test_no_tensor_is_larger_than_inputs_and_logits():
    """So none of [t, e, c]."""
    t, e = 512, 64
    for differentiable in (False, True):
        router = ThresholdRouter(dim=8, num_experts=e, differentiable_topk=differentiable)
        info = TokenInfo(mask=torch.arange(t) % 5 > 0, sequence_ids=torch.arange(t) // 128)
        x = torch.randn(t, 8, requires_grad=True)
        with Largest() as largest:
            router(x, info).weights.sum().backward()
        assert largest.elements <= t * e


def test_one_graph():
    moe = moe_with(capacity_factor=1.0)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="eager", fullgraph=True, dynamic=False)
    x = torch.randn(12, D, dtype=torch.float64)
    info = TokenInfo(mask=torch.arange(12) < 9, sequence_ids=torch.arange(12) // 6)
    torch.manual_seed(0)
    y = compiled(x, info)
    torch.manual_seed(0)
    assert_near(y, moe(x, info), 1e-12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"experts_per_token": 9}, "experts_per_token is 9, but must lie between 1 and"),
        ({"policy": "some"}, "policy 'some' is not one of random, threshold, all, none"),
        ({"threshold": (0.2,)}, "threshold has 1 values, but with experts_per_token 3 there are 2"),
        ({"eval_threshold": [0.1] * 3}, "eval_threshold has 3 values"),
        ({"threshold": 1.5}, "threshold is 1.5, but must lie between 0 and 1"),
        ({"normalize_eps": 0}, "normalize_eps is 0"),
        ({"capacity_factor": -1.0}, "^capacity_factor is -1.0"),
        ({"eval_capacity_factor": float("inf")}, "^eval_capacity_factor is inf"),
        ({"min_capacity": -1}, "^min_capacity is -1"),
        ({"threshold": "high"}, "^threshold is 'high', but must be a number or a list of"),
        ({"threshold": ["a", 0.1]}, r"^threshold is \['a', 0.1\], but must be a number or a list"),
        ({"jitter": "gauss", "jitter_scale": 1.0}, "jitter 'gauss' is not one of"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        router_of(**arguments)
