"""Sums over segments against loops: values, gradients, order, and what is not finite."""

import pytest
import torch
from helpers import assert_near

from moe_builders.ops.segments import (
    segment_logsumexp,
    segment_max,
    segment_spread,
    segment_sum,
)

T, E = 12, 3
SEGMENT = torch.tensor([4, 4, 0, 0, 0, 4, 7, 7, 0, 11, 4, 7])  # not contiguous, most are empty


def values_of(dtype=torch.float64, seed=0):
    return torch.randn(T, E, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_hand(values, function, empty):
    rows = torch.full((T, E), empty, dtype=values.dtype)
    for s in SEGMENT.unique():
        rows[s] = function(torch.stack([v for v, n in zip(values, SEGMENT, strict=True) if n == s]))
    return rows


def test_against_a_loop():
    values = values_of()
    assert_near(segment_sum(values, SEGMENT), by_hand(values, lambda v: v.sum(0), 0.0), 1e-14)
    assert torch.equal(
        segment_max(values, SEGMENT), by_hand(values, lambda v: v.amax(0), float("-inf"))
    )
    assert_near(
        segment_logsumexp(values, SEGMENT), by_hand(values, lambda v: v.logsumexp(0), 0.0), 1e-14
    )
    assert torch.equal(segment_spread(values, SEGMENT), values[SEGMENT])


def test_gradients():
    values = values_of().requires_grad_()
    live = torch.arange(T) != 9  # segment 11 has no other token
    for function in (
        lambda v: segment_sum(v, SEGMENT),
        lambda v: segment_spread(v, SEGMENT),
        lambda v: segment_logsumexp(v, SEGMENT),
        lambda v: segment_logsumexp(v, SEGMENT, live),
    ):
        assert torch.autograd.gradcheck(function, (values,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_the_tokens_changes_no_bit(dtype):
    scale = torch.logspace(-6, 6, 5000)[:, None]
    values = (torch.randn(5000, 2) * scale).to(dtype)
    segment = torch.arange(5000) % 3
    order = torch.randperm(5000)
    forward = segment_sum(values, segment)
    assert torch.equal(forward, segment_sum(values[order], segment[order]))
    exact = torch.stack([values[segment == s].double().sum(0) for s in range(3)])
    assert_near(forward[:3].double(), exact, 1e-7)


def test_segments_do_not_touch_each_other():
    values, segment = torch.randn(8, 2), torch.arange(8) // 4
    alone = segment_sum(values, segment)
    values[4:] *= 1e30
    assert torch.equal(segment_sum(values, segment)[0], alone[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(bad):
    values = values_of(torch.float32)
    values[0, 1] = bad
    found = segment_sum(values, SEGMENT).isfinite()
    wanted = torch.ones(T, E, dtype=torch.bool)
    wanted[4, 1] = False
    assert torch.equal(found, wanted)


def test_tokens_that_do_not_count_and_extremes():
    values = values_of(torch.float32) * 1e4
    live = torch.arange(T) % 3 != 0
    values[~live] = 3e38  # would drown all others
    got = segment_logsumexp(values, SEGMENT, live)
    for s in range(T):
        chosen = values[(s == SEGMENT) & live]
        wanted = chosen.logsumexp(0) if len(chosen) else torch.zeros(E)
        assert_near(got[s], wanted, 1e-6)


def test_zeros_and_tiny_values():
    assert torch.equal(segment_sum(torch.zeros(T, E), SEGMENT), torch.zeros(T, E))
    tiny = torch.full((T, E), 1e-40)
    assert_near(segment_sum(tiny, SEGMENT)[7], torch.full((E,), 3e-40), 1e-4)
    vanishing = torch.full((T, E), 5e-324, dtype=torch.float64)
    assert segment_sum(vanishing, SEGMENT).isfinite().all()
