"""The routing value, with an example worked out on paper."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from moe_builders.ops.permute import gather_rows
from moe_builders.routing import (
    Routing,
    TokenInfo,
    check_routing,
    dense_weights,
    expert_of_rows,
    route_by_choice,
)

# Four tokens choose two of four experts:
#   token 0: 2 (0.75), 0 (0.25) · token 1: 1 (0.5), 2 (0.5)
#   token 2: 0 (0.875), 3 (0.125) · token 3: 2 (1.0), 1 (0.0625)
EXPERT = torch.tensor([[2, 0], [1, 2], [0, 3], [2, 1]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.875, 0.125], [1.0, 0.0625]])


def by_hand(mask=None, weights=WEIGHTS):
    logits = torch.zeros(4, 4)
    return route_by_choice(
        expert=EXPERT,
        weights=weights,
        logits=logits,
        probs=logits.softmax(-1),
        info=TokenInfo(mask=mask),
    )


def test_by_hand():
    routing = by_hand()
    # sorted:      expert 0 | expert 1 | expert 2       | expert 3
    assert routing.token_index.tolist() == [0, 2, 1, 3, 0, 1, 3, 2]
    assert routing.weights.tolist() == [0.25, 0.875, 0.5, 0.0625, 0.75, 0.5, 1.0, 0.125]
    assert routing.num_tokens_per_expert.tolist() == [2, 2, 3, 1]
    assert routing.slot_of.tolist() == [[4, 0], [2, 5], [1, 7], [6, 3]]
    check_routing(routing)


def test_by_hand_with_token_1_masked():
    routing = by_hand(mask=torch.tensor([True, False, True, True]))
    # sorted:      expert 0 | expert 1 | expert 2 | expert 3 | dead
    assert routing.token_index.tolist() == [0, 2, 3, 0, 3, 2, 1, 1]
    assert routing.weights.tolist() == [0.25, 0.875, 0.0625, 0.75, 1.0, 0.125, 0.0, 0.0]
    assert routing.num_tokens_per_expert.tolist() == [2, 1, 2, 1]
    assert routing.slot_of.tolist() == [[3, 0], [6, 7], [1, 5], [4, 2]]
    check_routing(routing)


def test_a_masked_tokens_weights_get_no_gradient_even_through_nan():
    weights = WEIGHTS.clone().requires_grad_()
    routing = by_hand(mask=torch.tensor([True, False, True, True]), weights=weights)
    incoming = torch.arange(8.0)
    incoming[-2:] = float("nan")
    routing.weights.backward(incoming)
    assert weights.grad.tolist() == [[3, 0], [0, 0], [1, 5], [4, 2]]


def test_weights_as_a_table_by_hand():
    weights = WEIGHTS.clone().requires_grad_()
    kept = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    mask = torch.tensor([True, False, True, True])
    logits = torch.zeros(4, 4)
    routing = route_by_choice(
        expert=EXPERT, weights=weights, logits=logits, probs=logits.softmax(-1),
        info=TokenInfo(mask=mask), kept=kept,
    )  # fmt: skip
    table = dense_weights(routing)
    wanted = [[0.25, 0, 0.75, 0], [0, 0, 0, 0], [0.875, 0, 0, 0], [0, 0.0625, 1, 0]]
    assert table.tolist() == wanted
    (table * torch.arange(16.0).view(4, 4)).sum().backward()
    assert weights.grad.tolist() == [[2, 0], [0, 0], [8, 0], [14, 13]]


def test_all_masked():
    routing = by_hand(mask=torch.zeros(4, dtype=torch.bool))
    assert routing.num_tokens_per_expert.tolist() == [0, 0, 0, 0]
    assert routing.weights.tolist() == [0.0] * 8
    check_routing(routing)


def test_experts_of_rows():
    counts = torch.tensor([0, 2, 0, 3, 0], dtype=torch.int32)
    assert expert_of_rows(counts, 7).tolist() == [1, 1, 3, 3, 3, 5, 5]
    assert expert_of_rows(torch.tensor([0, 0]), 2).tolist() == [2, 2]
    assert expert_of_rows(torch.tensor([1, 1]), 2).tolist() == [0, 1]


def test_slots_lead_each_row_to_its_token():
    x = torch.randn(4, 3)
    routing = by_hand()
    rows = gather_rows(x, routing.token_index, routing.slot_of)
    for token in range(4):
        for slot in routing.slot_of[token].tolist():
            assert torch.equal(rows[slot], x[token])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(4, 4, dtype=torch.bfloat16)}, "logits must be fp32"),
        ({"weights": torch.zeros(7)}, r"weights must be \[8\]"),
        ({"num_tokens_per_expert": torch.tensor([2, 1, 2])}, r"must be \[4\]"),
        ({"num_tokens_per_expert": torch.tensor([2, 1, -2, 1])}, "not negative"),
        ({"num_tokens_per_expert": torch.tensor([2, 1, 2, 9])}, "14 live assignments, more"),
        ({"token_index": torch.tensor([0, 2, 3, 0, 3, 4, 1, 1])}, r"lie in \[0, 4\)"),
        ({"token_index": torch.tensor([0, 2, 3, 0, 3, -1, 1, 1])}, r"lie in \[0, 4\)"),
        ({"num_tokens_per_expert": torch.tensor([2, 1, 2, 2])}, "masked token was given"),
        ({"weights": torch.ones(8)}, "dead assignment has a weight"),
        ({"probs": torch.full((4, 4), 0.3)}, "do not sum to 1"),
        ({"slot_of": torch.tensor([[3, 0], [6, 7], [1, 5], [2, 1]])}, "slot_of"),
    ],
)
def test_broken_promises_are_named(changes, message):
    routing = by_hand(mask=torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match=message):
        check_routing(replace(routing, **changes))


def test_a_masked_tokens_probs_may_be_anything():
    routing = by_hand(mask=torch.tensor([True, False, True, True]))
    probs = routing.probs.clone()
    probs[1] = float("nan")
    check_routing(replace(routing, probs=probs))


def test_the_values_tensors_are_visible_to_torch():
    routing = by_hand(mask=torch.ones(4, dtype=torch.bool))
    leaves, spec = tree_flatten(routing)
    assert any(leaf is routing.info.mask for leaf in leaves)
    again = tree_unflatten(leaves, spec)
    assert isinstance(again, Routing)
    assert again.slot_of is routing.slot_of
    assert again.info.input_ids is None
