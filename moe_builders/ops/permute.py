"""Move rows between token order and expert order.

Letters: t tokens · k experts_per_token · a assignments · e experts · d dim.

Both directions exist in two ways that tests hold equal. With ``slot_of`` (every token has its k
places in the sorted list) a token's rows are gathered and added in a fixed order, forward and
backward: no atomics, the same bits every run. Without it (expert choice: a token may be taken any
number of times) rows are added with index_add.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SortedAssignments(NamedTuple):
    """[a] int64 order (sorted place -> flat place), [a] token, [e] counts, [t, k] slot_of."""

    order: Tensor
    token_index: Tensor
    num_tokens_per_expert: Tensor
    slot_of: Tensor


def sort_by_expert(expert: Tensor, num_experts: int, live: Tensor | None) -> SortedAssignments:
    """Sort the assignments of t tokens by expert, stably, dead ones last.

    Args:
        expert: [t, k] int, the experts each token goes to.
        num_experts: e.
        live: [t, k] bool, False where the assignment is void (masked token, dropped choice);
            None when all count.

    No host sync: the number of dead assignments never decides a shape.
    """
    t, k = expert.shape
    if live is not None:
        expert = torch.where(live, expert, num_experts)  # one past the last: sorts to the end
    by_expert, order = expert.flatten().sort(stable=True)  # [a], [a]
    bounds = torch.arange(num_experts + 1, device=expert.device, dtype=by_expert.dtype)
    ends = torch.searchsorted(by_expert, bounds, out_int32=True)  # [e + 1] first row of each
    slot_of = torch.empty_like(order)
    slot_of[order] = torch.arange(t * k, device=expert.device)
    return SortedAssignments(order, order // k, ends.diff(), slot_of.view(t, k))


def expert_of_rows(num_tokens_per_expert: Tensor, num_rows: int) -> Tensor:
    """[a] int, the expert of each sorted row; e (one past the last) for dead rows."""
    ends = num_tokens_per_expert.cumsum(0)  # [e]
    rows = torch.arange(num_rows, device=ends.device)
    return torch.searchsorted(ends, rows, right=True)


def gather_rows(x: Tensor, token_index: Tensor, slot_of: Tensor | None) -> Tensor:
    """Copy each assignment's token row: [t, d] -> [a, d]."""
    if slot_of is None:
        return x.index_select(0, token_index)
    return _GatherRows.apply(x, token_index, slot_of)


def combine_rows(
    rows: Tensor,
    weights: Tensor | None,
    token_index: Tensor,
    slot_of: Tensor | None,
    num_tokens: int,
) -> Tensor:
    """Add up each token's (weighted) rows in fp32 or wider: [a, d] -> [t, d] in rows.dtype.

    Args:
        rows: [a, d], zero where an assignment is dead.
        weights: [a] or None for an unweighted sum.
        token_index: [a] the token of each row.
        slot_of: [t, k] where each token's rows stand, or None.
        num_tokens: t.
    """
    if slot_of is not None:
        return _CombineRows.apply(rows, weights, token_index, slot_of)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if weights is not None:
        wide = wide * weights[:, None].to(wide.dtype)
    out = wide.new_zeros(num_tokens, rows.shape[1]).index_add(0, token_index, wide)
    return out.to(rows.dtype)


def _sum_slots(rows: Tensor, slot_of: Tensor, weights: Tensor | None) -> Tensor:
    """Σ over a token's k slots, first slot first: [a, d] -> [t, d]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(slot_of.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    for choice in range(slot_of.shape[1]):
        slots = slot_of[:, choice]  # [t]
        part = rows.index_select(0, slots).to(wide)
        if weights is not None:
            part = part * weights.index_select(0, slots)[:, None].to(wide)
        out += part
    return out.to(rows.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token_index: Tensor, slot_of: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of)
        return x.index_select(0, token_index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slot_of,) = ctx.saved_tensors
        return _sum_slots(grad, slot_of, None), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows: Tensor, weights: Tensor | None, token_index: Tensor, slot_of: Tensor
    ) -> Tensor:
        # the rows are only needed for the weights' gradient
        ctx.save_for_backward(rows if weights is not None else None, weights, token_index)
        return _sum_slots(rows, slot_of, weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weights, token_index = ctx.saved_tensors
        spread = grad.index_select(0, token_index)  # [a, d]
        if weights is None:
            return spread, None, None, None
        wide = torch.promote_types(rows.dtype, torch.float32)
        spread = spread.to(wide)
        weights_grad = (spread * rows.to(wide)).sum(-1).to(weights.dtype)  # [a]
        return (spread * weights[:, None].to(wide)).to(rows.dtype), weights_grad, None, None
