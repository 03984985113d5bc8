"""Attention within documents on a CPU: a piece of the rows at a time, by torch's fused kernel.

Letters: t tokens · n heads · m key/value heads · u width of a head · x documents · i queries and
j keys of a piece.

A long document is a piece, causal, without a mask. Short neighbours share one, so that many tiny
documents do not mean many tiny products; a document longer than a window is cut into pieces of its
queries, each with the keys that they see. Such pieces have masks of their own, [i, j].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.ops.documents import document_of_tokens

SHARED = 64  # tokens of documents that share a piece: about what the kernel takes at once
LARGEST = 512  # queries of a piece where there is a window

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Piece(NamedTuple):
    """Queries begin … end - 1, which see nothing before ``first``; ``plain``: causal says all."""

    begin: int
    end: int
    first: int
    plain: bool


def pieces(ends: list[int], window: int | None) -> list[Piece]:
    """Every token's query in one piece, in order; see the head of this file."""
    found, begin, shared, count = [], 0, 0, 0  # count documents from ``shared`` on wait
    for end in ends:
        if end == begin:
            continue
        if end - shared > SHARED and count:
            found += _waiting(shared, begin, count, window)
            shared, count = begin, 0
        begin, count = end, count + 1
    return found + (_waiting(shared, begin, count, window) if count else [])


def attend_pieces(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents.

    Args:
        q: [t, n, u].
        k, v: [t, m, u]; m divides n.
        ends: [x] int32, rising; the last is t.
        scale: of the scores.
        window: a query sees this many positions at most, itself included; None: all before it.

    Returns:
        [t, n, u] and [n, t], log Σ exp of the scores, in fp32 or wider.

    Raises:
        InputError: the last end is not t.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # [t, n, u]
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for piece, mask in _masked(ends, q, window):
        i, j = slice(piece.begin, piece.end), slice(piece.first, piece.end)
        part, part_lse = _attend(
            *(_heads(t) for t in (q[i], k[j], v[j])), 0.0, piece.plain, attn_mask=mask, scale=scale
        )  # [1, n, i, u], [1, n, i]
        out[i], lse[:, i] = part[0].transpose(0, 1), part_lse[0]
    return out, lse


def attend_pieces_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; what pieces share is added up in their order.

    Args:
        grad: [t, n, u].
        q, k, v, ends, scale, window: as they went into ``attend_pieces``.
        out, lse: what came out.
    """
    dense = torch.contiguous_format
    q_grad = torch.empty_like(q, memory_format=dense)  # [t, n, u]
    k_grad, v_grad = (torch.zeros_like(t, memory_format=dense) for t in (k, v))  # [t, m, u]
    for piece, mask in _masked(ends, q, window):
        i, j = slice(piece.begin, piece.end), slice(piece.first, piece.end)
        parts = _attend_backward(
            *(_heads(t) for t in (grad[i], q[i], k[j], v[j], out[i])), lse[None, :, i],
            0.0, piece.plain, attn_mask=mask, scale=scale,
        )  # fmt: skip
        q_part, k_part, v_part = (part[0].transpose(0, 1) for part in parts)
        q_grad[i] = q_part
        k_grad[j] += k_part
        v_grad[j] += v_part
    return q_grad, k_grad, v_grad


def _waiting(begin: int, end: int, count: int, window: int | None) -> list[Piece]:
    """Pieces of the documents from begin to end: several short ones, or one."""
    if count > 1:
        return [Piece(begin, end, begin, plain=False)]
    if window is None or end - begin <= window:
        return [Piece(begin, end, begin, plain=True)]
    step = min(max(window, SHARED), LARGEST)
    return [
        Piece(at, min(at + step, end), max(begin, at - window + 1), plain=False)
        for at in range(begin, end, step)
    ]


def _masked(ends: Tensor, q: Tensor, window: int | None) -> list[tuple[Piece, Tensor | None]]:
    """Each piece and its mask [i, j]: 0 where a query sees a key, else -inf; None: causal."""
    t, places = q.shape[0], ends.tolist()
    if places[-1] != t:
        raise InputError(
            f"documents end at token {places[-1]}, but there are {t} tokens: both must be equal"
        )
    numbers = document_of_tokens(ends, t)  # [t]
    return [
        (piece, None if piece.plain else _mask(piece, numbers, window, q.dtype))
        for piece in pieces(places, window)
    ]


def _mask(piece: Piece, numbers: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    queries = torch.arange(piece.begin, piece.end)[:, None]  # [i, 1]
    keys = torch.arange(piece.first, piece.end)[None]  # [1, j]
    seen = (numbers[queries] == numbers[keys]) & (keys <= queries)  # [i, j]
    if window is not None:
        seen &= queries - keys < window
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _heads(tokens: Tensor) -> Tensor:
    """[i, n, u] -> [1, n, i, u]."""
    return tokens.transpose(0, 1)[None]
