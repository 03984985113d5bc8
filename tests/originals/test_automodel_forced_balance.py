"""Forced balance against NeMo Automodel's gate for balanced benchmarks: numbers only."""

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_near

from moe_builders.routers import ForcedBalanceRouter
from moe_builders.routing import TokenInfo, dense_weights

layers = pytest.importorskip("nemo_automodel.components.moe.layers")


def pair(e, k, **changes):
    theirs = layers.FakeBalancedGate(
        SimpleNamespace(n_routed_experts=e, n_activated_experts=k), **changes
    )
    return ForcedBalanceRouter(dim=8, num_experts=e, experts_per_token=k, **changes), theirs


def test_without_noise_they_are_equal():
    ours, theirs = pair(16, 4, skip_first_n_experts=2)
    x = torch.randn(64, 8)
    routing = ours(x, TokenInfo())
    weights, expert, loss = theirs(x, torch.ones(64, dtype=torch.bool), None)
    assert loss is None
    assert torch.equal(routing.selected, expert)
    assert_near(dense_weights(routing), torch.zeros(64, 16).scatter(1, expert, weights), 1e-7)
    loads = routing.num_tokens_per_expert.tolist()
    assert loads[:2] == [0, 0]
    assert set(loads[2:]) == {18, 19}


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.5, 1.0])
def test_with_noise_they_are_alike(noise):
    """Other draws of the same distributions: mean load of each rank, and spread of the weights."""
    ours, theirs = pair(32, 4, noise=noise, skip_first_n_experts=4)
    loads, weights = [[], []], [[], []]
    for seed in range(24):
        x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(seed))
        routing = ours(x, TokenInfo())
        assert torch.equal(routing.selected, ours(x, TokenInfo()).selected)
        w, expert, _ = theirs(x, None, None)
        assert torch.equal(expert, theirs(x, None, None)[1])
        for side, choice, value in ((0, routing.selected, routing.weights), (1, expert, w)):
            assert choice.min() >= 4
            assert (choice.sort(-1).values.diff(dim=-1) > 0).all()  # unique per token
            counts = torch.bincount(choice.flatten(), minlength=32)[4:].double()
            loads[side].append((counts / counts.mean()).sort().values)
            weights[side].append(value.flatten())
    own, other = (torch.stack(side).mean(0) for side in loads)
    assert_near(own, other, 0.15)
    own, other = (torch.cat(side) for side in weights)
    assert own.mean() == pytest.approx(0.25, abs=1e-6)
    assert own.std() == pytest.approx(float(other.std()), rel=0.02)
    assert own.min() >= (1 - noise) / 4
