"""Move rows between token order and expert order.

Letters: t tokens · k experts_per_token · a assignments · e experts · d dim.

Both directions exist in two ways that tests hold equal. With ``slot_of`` (every token has its k
places in the sorted list) a token's rows are added in the order of its choices, without it (expert
choice: a token may be taken any number of times) in the order in which they stand; forward and
backward, without atomics: the same bits every run.

On a GPU sorting is an operator of its own, so that torch.compile need not look into it: whether
Triton's counting sort runs there is asked inside.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moe_builders.ops import row_ops
from moe_builders.ops.kernels import row_kernels
from moe_builders.ops.triton import available


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
    if expert.is_cuda:
        return SortedAssignments(*_sort_on_gpu(expert, num_experts, live))
    return _sort(expert, num_experts, live)


@torch.library.custom_op("moe_builders::sort_by_expert", mutates_args=())
def _sort_on_gpu(
    expert: Tensor, num_experts: int, live: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triton's counting sort where it runs, else torch's."""
    if not available(expert.device):
        return _sort(expert, num_experts, live)
    from moe_builders.ops.triton.sort import sort_by_expert as counting_sort

    return counting_sort(expert, num_experts, live)


@_sort_on_gpu.register_fake
def _(expert: Tensor, num_experts: int, live: Tensor | None):
    a = expert.numel()
    order, token_index = (expert.new_empty(a, dtype=torch.int64) for _ in range(2))  # [a]
    counts = expert.new_empty(num_experts, dtype=torch.int32)  # [e]
    return order, token_index, counts, expert.new_empty(expert.shape, dtype=torch.int64)


def _sort(expert: Tensor, num_experts: int, live: Tensor | None) -> SortedAssignments:
    t, k = expert.shape
    if live is not None:
        expert = torch.where(live, expert, num_experts)  # one past the last: sorts to the end
    by_expert, order = expert.flatten().sort(stable=True)  # [a], [a]
    bounds = torch.arange(num_experts + 1, device=expert.device, dtype=by_expert.dtype)
    ends = torch.searchsorted(by_expert, bounds, out_int32=True)  # [e + 1] first row of each
    slot_of = torch.empty_like(order)
    slot_of[order] = torch.arange(t * k, device=expert.device)
    return SortedAssignments(order, order // k, ends.diff(), slot_of.view(t, k))


def gather_rows(x: Tensor, token_index: Tensor, slot_of: Tensor | None) -> Tensor:
    """Copy each assignment's token row: [t, d] -> [a, d]."""
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
    return _CombineRows.apply(rows, weights, token_index, slot_of, num_tokens)


def _add_up(
    rows: Tensor,
    weights: Tensor | None,
    token_index: Tensor,
    slot_of: Tensor | None,
    num_tokens: int,
) -> Tensor:
    """``combine_rows`` without a gradient."""
    passes = _passes(rows)
    if slot_of is None:
        return passes.sum_tokens(rows, token_index, num_tokens, weights)
    return passes.sum_slots(rows, slot_of, weights)


def _passes(rows: Tensor) -> ModuleType:
    """Who passes over rows; a compiler that traces this makes kernels of its own."""
    return row_ops if torch.compiler.is_compiling() else row_kernels(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token_index: Tensor, slot_of: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_index, slot_of)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, token_index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        token_index, slot_of = ctx.saved_tensors
        return _add_up(grad, None, token_index, slot_of, ctx.num_tokens), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows: Tensor, weights: Tensor | None, token_index: Tensor, slot_of: Tensor | None,
        num_tokens: int,
    ) -> Tensor:  # fmt: skip
        # the rows are only needed for the weights' gradient
        ctx.save_for_backward(rows if weights is not None else None, weights, token_index)
        return _add_up(rows, weights, token_index, slot_of, num_tokens)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weights, token_index = ctx.saved_tensors
        spread = grad.index_select(0, token_index)  # [a, d]
        if weights is None:
            return spread, None, None, None, None
        passes = _passes(spread)
        weights_grad = passes.row_products(spread, rows).to(weights.dtype)  # [a]
        return passes.weigh_rows(spread, weights), weights_grad, None, None, None
