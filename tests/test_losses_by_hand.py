"""Losses of routings small enough to work out on paper, and the cross-entropy sum."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_near
from torch import nn

from moe_builders.counts import count_assignments
from moe_builders.losses import (
    IGNORE_INDEX,
    cross_entropy_sum,
    load_balancing_loss,
)
from moe_builders.routing import TokenInfo, route_by_choice

SCOPES = ["sequence", "micro", "global"]


def value(routing, scope, **changes):
    counts = count_assignments(routing) if scope == "global" else None
    return load_balancing_loss(routing, **({"scope": scope, "counts": counts} | changes))


def forced(expert, probs, info=None):
    """A token-choice routing of given decisions and scores."""
    expert, probs = torch.tensor(expert), torch.tensor(probs, dtype=torch.float64)
    weights = torch.ones(expert.shape, dtype=torch.float64)
    info = info or TokenInfo()
    return route_by_choice(
        expert=expert, weights=weights, logits=probs.log(), probs=probs, info=info
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_balanced_is_exactly_1_and_collapse_is_e(scope):
    balanced = forced([[0], [1], [2], [3]], [[0.25] * 4] * 4)
    assert float(value(balanced, scope)) == 1.0
    # balanced selection is 1 whatever the scores
    skewed = forced([[0], [1], [2], [3]], [[0.7, 0.1, 0.1, 0.1]] * 4)
    assert float(value(skewed, scope)) == pytest.approx(1.0, abs=1e-15)
    collapsed = forced([[2]] * 4, [[0.0, 0.0, 1.0, 0.0]] * 4)
    assert float(value(collapsed, scope)) == 4.0


def test_scopes_differ_where_each_document_likes_its_own_experts():
    probs = [[0.8, 0.2]] * 2 + [[0.2, 0.8]] * 2
    info = TokenInfo(sequence_ids=torch.tensor([0, 0, 1, 1]))
    routing = forced([[0], [0], [1], [1]], probs, info)
    assert float(value(routing, "micro")) == pytest.approx(1.0)
    assert float(value(routing, "sequence")) == pytest.approx(2 * 0.8)
    counts = torch.tensor([30, 10])
    assert float(value(routing, "global", counts=counts)) == pytest.approx(2 * 0.5 * 1.0)


def test_counts_by_hand():
    routing = forced([[0, 2], [1, 2], [2, 0]], [[0.25] * 4] * 3)
    assert count_assignments(routing).tolist() == [2, 1, 3, 0]
    masked = replace(routing, info=TokenInfo(mask=torch.tensor([True, False, True])))
    assert count_assignments(masked).tolist() == [2, 0, 2, 0]


def test_cross_entropy_is_a_sum_over_labelled_tokens():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 3] = labels[1, 0] = IGNORE_INDEX
    wanted = torch.zeros((), dtype=torch.float64)
    for b, s in torch.nonzero(labels != IGNORE_INDEX).tolist():
        scores = logits[b, s].exp()
        wanted = wanted - (scores[labels[b, s]] / scores.sum()).log()
    got = cross_entropy_sum(logits, labels)
    assert_near(got, wanted, 1e-12)
    got.backward()
    assert not logits.grad[0, 3].any()


def test_cross_entropy_without_labels_is_zero_with_zero_gradients():
    layer = nn.Linear(3, 7)
    loss = cross_entropy_sum(layer(torch.randn(2, 5, 3)), torch.full((2, 5), IGNORE_INDEX))
    assert float(loss.detach()) == 0
    loss.backward()
    assert torch.equal(layer.weight.grad, torch.zeros(7, 3))
