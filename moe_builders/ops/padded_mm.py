"""The grouped product as one batched product: every expert's rows padded to the largest number.

Letters: a rows sorted by expert · e experts · c rows of the largest expert · i in-features ·
o out-features.

For many small experts of about the same load, where the products are so short that calling them
one by one costs as much as they do. Copies and products are of e·c rows: with one expert that has
most of them it is a waste. Equal numbers of rows (``routing.pad_to_capacity``) are not copied at
all. The counts are read on the host, for which a GPU would wait, so nobody gets it unasked.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_builders.ops.runs import expert_of_rows


class _Places(NamedTuple):
    """Where rows stand: [e, c] int of padded ones, [e, c] bool whether they are some, [a] back."""

    row: Tensor
    there: Tensor
    back: Tensor


def padded_mm(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """y[r] = weight[expert of r] @ x[r]; zero past the last run.

    Args:
        x: [a, i] rows sorted by expert.
        weight: [e, o, i], any strides.
        num_tokens_per_expert: [e] int; read on the host.

    Returns:
        [a, o].
    """
    counts = num_tokens_per_expert.tolist()
    e, live, most = len(counts), sum(counts), max(counts)
    y = x.new_empty(x.shape[0], weight.shape[1])  # [a, o]
    y[live:] = 0
    if live == e * most:
        groups = x[:live].view(e, most, x.shape[1])  # [e, c, i]
        torch.bmm(groups, weight.transpose(1, 2), out=y[:live].view(e, most, y.shape[1]))
        return y
    places = _find_places(num_tokens_per_expert, most, live)
    # what stands in for missing rows is never looked at
    padded = x.index_select(0, places.row.flatten()).view(e, most, x.shape[1])  # [e, c, i]
    answers = torch.bmm(padded, weight.transpose(1, 2)).flatten(0, 1)  # [e · c, o]
    torch.index_select(answers, 0, places.back, out=y[:live])
    return y


def padded_weight_grad(grad: Tensor, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """dW[j] = Σ over rows r of expert j of grad[r] ⊗ x[r]; zero for one without rows.

    Args:
        grad: [a, o].
        x: [a, i].
        num_tokens_per_expert: [e] int; read on the host.

    Returns:
        [e, o, i].
    """
    counts = num_tokens_per_expert.tolist()
    e, live, most = len(counts), sum(counts), max(counts)
    if live == e * most:
        left, right = (t[:live].view(e, most, t.shape[1]) for t in (grad, x))
        return torch.bmm(left.transpose(1, 2), right)
    places = _find_places(num_tokens_per_expert, most, live)
    padded = (
        torch.where(places.there[..., None], t[places.row], 0)  # [e, c, o], [e, c, i]
        for t in (grad, x)
    )
    left, right = padded
    return torch.bmm(left.transpose(1, 2), right)


def _find_places(num_tokens_per_expert: Tensor, most: int, live: int) -> _Places:
    ends = num_tokens_per_expert.cumsum(0)  # [e]
    starts = ends - num_tokens_per_expert
    numbers = torch.arange(most, device=ends.device)  # [c]
    there = numbers < num_tokens_per_expert[:, None]  # [e, c]
    row = torch.where(there, starts[:, None] + numbers, 0)  # [e, c] the first stands in
    expert = expert_of_rows(num_tokens_per_expert, live)  # [live rows]
    rows = torch.arange(live, device=ends.device)
    back = expert * most + rows - starts.index_select(0, expert)
    return _Places(row, there, back)
