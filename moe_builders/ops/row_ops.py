"""The passes over rows around an expert's products: copy, activate, add up. Plain torch.

Letters: t tokens · k experts_per_token · a assignments (sorted by expert) · e experts · d dim ·
h hidden_dim of an expert · o columns.

Each takes numbers as they are stored and computes in fp32 or wider, with one rounding at the end.
``ops.triton`` has the same functions as kernels; these are what they are compared with, and what
runs on a CPU. None of them has a gradient of its own: ``ops.routed_experts`` puts them together.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_builders.ops.activations import Activation
from moe_builders.ops.runs import live_rows

# what several passes find in a CPU's cache: numbers of a block, tokens whose rows are added up
_BLOCK, _TOKENS = 1 << 17, 64


def take_rows(x: Tensor, token_index: Tensor, weights: Tensor | None = None) -> Tensor:
    """Copy each assignment's token row, times its weight: [t, d] -> [a, d] in x.dtype.

    Args:
        x: [t, d].
        token_index: [a] int.
        weights: [a] or None for 1.
    """
    rows = x.index_select(0, token_index)  # [a, d]
    return rows if weights is None else weigh_rows(rows, weights)


def weigh_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Each row times its weight: [a, o] and [a] -> [a, o] in rows.dtype."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) * weights[:, None].to(wide)).to(rows.dtype)


def sum_slots(rows: Tensor, slot_of: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up each token's (weighted) rows, its first choice first: [a, d] -> [t, d] in rows.dtype.

    Args:
        rows: [a, d].
        slot_of: [t, k] int, where a token's rows stand.
        weights: [a] or None for 1.
    """
    if rows.is_cpu:
        return _sum_bags(rows, slot_of, weights)
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(slot_of.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    for choice in range(slot_of.shape[1]):
        slots = slot_of[:, choice]  # [t]
        part = rows.index_select(0, slots).to(wide)
        if weights is not None:
            part = part * weights.index_select(0, slots)[:, None].to(wide)
        out += part
    return out.to(rows.dtype)


def _sum_bags(rows: Tensor, slot_of: Tensor, weights: Tensor | None) -> Tensor:
    """``sum_slots`` in one pass: a token's rows are a bag of embeddings, summed in its order."""
    if slot_of.numel() == 0 or rows.numel() == 0:  # which torch's bags refuse
        return rows.new_zeros(slot_of.shape[0], rows.shape[1])
    if weights is None:  # summed in fp32; ties of bf16 are rounded away from zero
        return F.embedding_bag(slot_of, rows, mode="sum")
    wide = torch.promote_types(rows.dtype, torch.float32)
    weights = weights.to(wide)
    if rows.dtype == wide:
        return F.embedding_bag(slot_of, rows, mode="sum", per_sample_weights=weights[slot_of])
    # weights would be rounded to the rows' precision: rather widen the rows, a few at a time
    out = rows.new_empty(slot_of.shape[0], rows.shape[1])  # [t, d]
    k = slot_of.shape[1]
    places = torch.arange(_TOKENS * k).view(_TOKENS, k)
    for part, slots in zip(out.split(_TOKENS), slot_of.split(_TOKENS), strict=True):
        own = rows.index_select(0, slots.flatten()).to(wide)  # [tokens · k, d]
        bag = places[: slots.shape[0]]
        part.copy_(F.embedding_bag(bag, own, mode="sum", per_sample_weights=weights[slots]))
    return out


def sum_tokens(
    rows: Tensor, token_index: Tensor, num_tokens: int, weights: Tensor | None = None
) -> Tensor:
    """As ``sum_slots`` where tokens have any number of rows, in the order in which they stand.

    Args:
        rows: [a, d].
        token_index: [a] int in [0, t).
        num_tokens: t.
        weights: [a] or None for 1.

    Returns:
        [t, d]; zero for a token without rows.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    # sorted and summed run by run: adding into cells has no fixed order on a GPU
    token, order = token_index.sort(stable=True)
    bounds = torch.arange(num_tokens + 1, device=token.device, dtype=token.dtype)
    lengths = torch.searchsorted(token, bounds).diff()  # [t]
    sorted_rows = rows.index_select(0, order).to(wide)  # [a, d]
    if weights is not None:
        sorted_rows = sorted_rows * weights.index_select(0, order)[:, None].to(wide)
    out = torch.segment_reduce(sorted_rows, "sum", lengths=lengths, axis=0, unsafe=True)
    return out.to(rows.dtype)


def activate(z: Tensor, activation: Activation, weights: Tensor | None = None) -> Tensor:
    """activation(z), times a weight a row: [a, 2h] (ungated: [a, h]) -> [a, h] in z.dtype.

    Args:
        z: what the first product gave.
        activation: one with a gradient.
        weights: [a] or None for 1.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    hidden = z.new_empty(z.shape[0], _hidden_dim(z, activation))  # [a, h]
    for block in _blocks(z):
        answer = activation.function(z[block].to(wide))
        if weights is None:
            hidden[block] = answer
        else:
            torch.mul(answer, weights[block, None].to(wide), out=hidden[block])
    return hidden


def activate_backward(
    z: Tensor, grad: Tensor, activation: Activation, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``activate``'s backward needs, and its answer once more.

    Args:
        z: [a, 2h] (ungated: [a, h]).
        grad: [a, h] of the answer.
        activation: one with a gradient.
        weights: [a] or None for 1.

    Returns:
        Gradient of z like z; [a, h] the answer, weights and all, in z.dtype; [a] the gradient of
        the weights in fp32 or wider, or None without weights.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    z_grad = torch.empty_like(z)  # [a, 2h]
    hidden = z.new_empty(grad.shape)  # [a, h]
    weights_grad = None if weights is None else z.new_empty(z.shape[0], dtype=wide)  # [a]
    for block in _blocks(z):
        inner, outer = z[block].to(wide), grad[block].to(wide)
        weight = None if weights is None else weights[block, None].to(wide)
        answer = _both(
            activation, inner, outer if weight is None else outer * weight, z_grad[block]
        )
        if weight is not None and weights_grad is not None:
            torch.sum(outer * answer, -1, out=weights_grad[block])
            torch.mul(answer, weight, out=hidden[block])
        else:
            hidden[block] = answer
    return z_grad, hidden, weights_grad


def _both(activation: Activation, z: Tensor, grad: Tensor, z_grad: Tensor) -> Tensor:
    """The answer; the gradient is written into z_grad, whatever its precision."""
    assert activation.gradient is not None
    if activation.both is not None:
        return activation.both(z, grad, z_grad)
    z_grad.copy_(activation.gradient(z, grad))
    return activation.function(z)


def add_expert_rows_(
    rows: Tensor, values: Tensor, num_tokens_per_expert: Tensor, weights: Tensor | None = None
) -> Tensor:
    """rows[r] += values[expert of r], times a weight a row; in place: [a, o] -> same.

    Args:
        rows: [a, o], sorted by expert; dead ones stay as they are.
        values: [e, o], a bias each.
        num_tokens_per_expert: [e] int.
        weights: [a] or None for 1.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    live, expert = live_rows(num_tokens_per_expert, rows.shape[0])  # [a]
    for block in _blocks(rows):
        own = rows[block].to(wide)
        more = values.index_select(0, expert[block]).to(wide)
        if weights is not None:
            more = more * weights[block, None].to(wide)
        rows[block] = own + more.masked_fill_(~live[block, None], 0)
    return rows


def zero_tail_(rows: Tensor, num_live: Tensor) -> Tensor:
    """Rows at and past ``num_live`` become 0, whatever they hold; in place: [a, o] -> same.

    Args:
        rows: [a, o] or [a].
        num_live: [] int.
    """
    if rows.is_cpu:  # which may look; a GPU would wait for the number
        rows[int(num_live) :] = 0
        return rows
    dead = torch.arange(rows.shape[0], device=rows.device) >= num_live  # [a]
    return rows.masked_fill_(dead.view(-1, *(1,) * (rows.ndim - 1)), 0)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over columns of left · right: [a, o] twice -> [a] in fp32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) * right.to(wide)).sum(-1)


def _hidden_dim(z: Tensor, activation: Activation) -> int:
    return z.shape[1] // 2 if activation.gated else z.shape[1]


def _blocks(z: Tensor) -> Iterator[slice]:
    """Runs of rows: on a CPU so many that they stay in its cache, elsewhere all."""
    rows = z.shape[0]
    size = max(1, _BLOCK // max(1, z.shape[1])) if z.is_cpu else max(1, rows)
    return (slice(start, start + size) for start in range(0, rows, size))
