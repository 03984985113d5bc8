"""Expert choice against loops; even load, masks, and that it is not causal."""

import math

import pytest
import torch
from helpers import assert_near, quick, randomise
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.errors import InputError
from moe_builders.routers import ExpertChoiceTopKRouter
from moe_builders.routing import TokenInfo, check_routing, expert_of_rows


def router_of(e=4, capacity_factor=1.5, dtype=torch.float32):
    return randomise(
        ExpertChoiceTopKRouter(dim=6, num_experts=e, capacity_factor=capacity_factor)
    ).to(dtype)


def taken(routing):
    """For each expert {token: weight}."""
    e = routing.logits.shape[1]
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])
    found = [{} for _ in range(e)]
    for j, token, weight in zip(
        expert.tolist(), routing.token_index.tolist(), routing.weights.tolist(), strict=True
    ):
        if j < e:
            assert token not in found[j], "taken twice by one expert"
            found[j][token] = weight
    return found


@pytest.mark.parametrize("masked", [0, 3])
def test_each_expert_takes_its_best_tokens(masked):
    router = router_of(dtype=torch.float64)
    x = torch.randn(10, 6, dtype=torch.float64)
    mask = torch.arange(10) % 4 != 1 if masked else None
    routing = router(x, TokenInfo(mask=mask))
    check_routing(routing)
    real = [i for i in range(10) if mask is None or mask[i]]
    capacity = math.ceil(1.5 * len(real) / 4)
    probs = (x @ router.gate.weight.t()).softmax(-1).detach()
    assert_near(routing.probs.detach()[real], probs[real], 1e-12)
    assert routing.num_tokens_per_expert.tolist() == [capacity] * 4
    for j, tokens in enumerate(taken(routing)):
        best = sorted(real, key=lambda i: float(probs[i, j]), reverse=True)[:capacity]
        assert list(tokens) == best
        for i, weight in tokens.items():
            assert weight == pytest.approx(float(probs[i, j]), abs=1e-12)


def test_gradient_of_the_weights():
    router = router_of(dtype=torch.float64)
    x = torch.randn(10, 6, dtype=torch.float64)
    mask = torch.arange(10) != 3
    routing = router(x, TokenInfo(mask=mask))
    probe = torch.randn_like(routing.weights)
    (routing.weights * probe).sum().backward()
    got = router.gate.weight.grad.clone()
    router.zero_grad()
    probs = (x @ router.gate.weight.t()).softmax(-1)
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])
    live = expert < 4
    (probs[routing.token_index[live], expert[live]] * probe[live]).sum().backward()
    assert_near(got, router.gate.weight.grad, 1e-12)


@quick
@given(
    e=st.integers(2, 6),  # a single expert likes all tokens alike
    factor=st.sampled_from([0.1, 0.3, 0.7, 1.0, 1.1, 1.25, 1.6, 2.3, 6.0]),
    t=st.integers(0, 120),
    masked=st.integers(0, 40),
    seed=st.integers(0, 999),
)
def test_counts_are_the_capacity_of_the_real_tokens(e, factor, t, masked, seed):
    factor = min(factor, e)
    router = router_of(e, factor)
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, 6, generator=stream)
    mask = torch.randperm(t, generator=stream) >= masked
    routing = router(x, TokenInfo(mask=mask))
    check_routing(routing)
    capacity = math.ceil(factor * int(mask.sum()) / e)
    assert routing.num_tokens_per_expert.tolist() == [capacity] * e
    assert routing.token_index.shape == (e * math.ceil(factor * t / e),)
    # padding changes nothing
    alone = router(x[mask], TokenInfo())
    numbers = mask.nonzero().flatten().tolist()
    for padded, unpadded in zip(taken(routing), taken(alone), strict=True):
        assert list(padded) == [numbers[i] for i in unpadded]
        assert list(padded.values()) == pytest.approx(list(unpadded.values()), abs=1e-6)


@pytest.mark.parametrize(("factor", "e", "t"), [(0.3, 2, 100), (0.3, 3, 50), (0.3, 2, 420)])
def test_capacity_never_exceeds_the_slots(factor, e, t):
    # in fp32 0.3 · 100 / 2 rounds up to 16, but there are 15 slots
    routing = router_of(e, factor)(torch.randn(t, 6), TokenInfo())
    check_routing(routing)
    assert int(routing.num_tokens_per_expert.sum()) == routing.token_index.shape[0]


def test_it_is_not_causal_and_says_so():
    router = router_of()
    x = torch.randn(8, 6)
    before = taken(router(x, TokenInfo()))
    x[4:] = 3 * torch.randn(4, 6)  # only later tokens change
    after = taken(router(x, TokenInfo()))
    early = [[{i for i in tokens if i < 4} for tokens in found] for found in (before, after)]
    assert early[0] != early[1]
    assert "Not causal" in ExpertChoiceTopKRouter.__doc__


def test_all_masked():
    routing = router_of()(torch.randn(6, 6), TokenInfo(mask=torch.zeros(6, dtype=torch.bool)))
    check_routing(routing)
    assert routing.num_tokens_per_expert.tolist() == [0] * 4
    assert torch.equal(routing.weights, torch.zeros_like(routing.weights))


def test_a_masked_token_of_nan_is_never_taken():
    x = torch.randn(6, 6)
    x[2] = float("nan")
    mask = torch.arange(6) != 2
    routing = router_of()(x, TokenInfo(mask=mask))
    check_routing(routing)
    assert routing.weights.isfinite().all()


@pytest.mark.parametrize("factor", [0, -1.0, 4.1])
def test_capacity_factor_out_of_range(factor):
    with pytest.raises(InputError, match=r"capacity_factor is .*num_experts \(4\)"):
        router_of(capacity_factor=factor)
