"""Rows copied, added up, added to, multiplied and blanked, as Triton kernels.

Letters: t tokens · k experts_per_token · a assignments (sorted by expert) · e experts · d dim ·
o columns.

Twins of ``ops.row_ops``. They compute in fp32 and round once. All are bound by memory: each warp
reads runs of 256 columns (bf16: 512 bytes, 16 a thread) of a row, and a block of 4 warps has enough
of them under way at a time to keep the memory busy without more warps than registers allow. Widths
are constants of a kernel, so that rows of a multiple of 16 bytes are read in words of 16 bytes;
others are read in smaller ones.
"""

# Triton's language is not Python to a type checker, and Triton is not everywhere:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 256
_TAKEN = 16  # rows of a block that copies: 4 loads of 16 bytes a thread
_ENDS = 128  # experts' ends that a row is compared with at once, one a thread
_SUMMED = 8  # tokens of a block that adds up: 2 such loads a thread and choice, all k unrolled
_TAILS = 512  # blocks that blank rows: about 4 on each of a large GPU's processors


def take_rows(x: Tensor, token_index: Tensor, weights: Tensor | None = None) -> Tensor:
    """Copy each assignment's token row, times its weight: [t, d] -> [a, d] in x.dtype.

    Args:
        x: [t, d].
        token_index: [a] int.
        weights: [a] or None for 1.
    """
    return _copied(x, token_index, weights, token_index.shape[0])


def weigh_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """rows · weights, row by row: [a, d] -> [a, d] in rows.dtype.

    Args:
        rows: [a, d].
        weights: [a].
    """
    return _copied(rows, None, weights, rows.shape[0])


def _copied(x: Tensor, token_index: Tensor | None, weights: Tensor | None, a: int) -> Tensor:
    d = x.shape[1]
    x = x.contiguous()
    rows = torch.empty(a, d, dtype=x.dtype, device=x.device)  # [a, d]
    if rows.numel() == 0:
        return rows
    # Runs of columns are the slow axis: all assignments' first 256 columns come before anyone's
    # second. A run of all t tokens (t 32k: 16 MB) stays in the GPU's second cache, so that a token
    # comes from memory once, not once for each of its k experts.
    grid = (triton.cdiv(a, _TAKEN), triton.cdiv(d, _COLUMNS))
    with torch.cuda.device_of(x):
        _take_kernel[grid](
            x, x if token_index is None else token_index.contiguous(),
            x if weights is None else weights.contiguous(), rows, a,
            D=d, GATHERED=token_index is not None, WEIGHTED=weights is not None,
            ROWS=_TAKEN, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return rows


def sum_slots(rows: Tensor, slot_of: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up each token's (weighted) rows, its first choice first: [a, d] -> [t, d] in rows.dtype.

    Args:
        rows: [a, d].
        slot_of: [t, k] int, where a token's rows stand.
        weights: [a] or None for 1.
    """
    (t, k), d = slot_of.shape, rows.shape[1]
    rows, slot_of = rows.contiguous(), slot_of.contiguous()
    out = torch.empty(t, d, dtype=rows.dtype, device=rows.device)  # [t, d]
    if out.numel() == 0:
        return out
    # every row is read once: columns are the fast axis, so that neighbours read one row's memory
    runs = triton.cdiv(d, _COLUMNS)
    with torch.cuda.device_of(rows):
        _sum_kernel[(triton.cdiv(t, _SUMMED) * runs,)](
            rows, slot_of, rows if weights is None else weights.contiguous(), out, t, runs,
            D=d, K=k, WEIGHTED=weights is not None, ROWS=_SUMMED, COLUMNS=_COLUMNS
        )  # fmt: skip
    return out


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over columns of left · right: [a, o] twice -> [a] in fp32, columns in a fixed order."""
    a, o = left.shape
    left, right = left.contiguous(), right.contiguous()
    out = torch.empty(a, dtype=torch.float32, device=left.device)  # [a]
    if a > 0:
        with torch.cuda.device_of(left):
            _product_kernel[(triton.cdiv(a, _SUMMED),)](
                left, right, out, a, WIDTH=o, ROWS=_SUMMED, COLUMNS=_COLUMNS
            )
    return out


def add_expert_rows_(
    rows: Tensor, values: Tensor, num_tokens_per_expert: Tensor, weights: Tensor | None = None
) -> Tensor:
    """rows[r] += values[expert of r], times a weight a row; in place: [a, o] -> same.

    A row's expert is the number of experts that end at or before it: a block compares its 8 rows
    with all ends, one load a thread for each 128 experts. A binary search would wait for log2(e)
    loads one after the other, and an index [a] made beforehand for two more launches.

    Args:
        rows: [a, o] with neighbouring columns, sorted by expert; dead ones are not touched.
        values: [e, o].
        num_tokens_per_expert: [e] int.
        weights: [a] or None for 1.
    """
    (a, o), e = rows.shape, values.shape[0]
    assert o <= 1 or rows.stride(1) == 1
    if rows.numel() == 0:
        return rows
    ends = num_tokens_per_expert.cumsum(0, dtype=torch.int32)  # [e]
    with torch.cuda.device_of(rows):
        _add_kernel[(triton.cdiv(a, _SUMMED),)](
            rows, values.contiguous(), ends, ends if weights is None else weights.contiguous(), a,
            WIDTH=o, STRIDE=rows.stride(0), E=e, WEIGHTED=weights is not None,
            ROWS=_SUMMED, COLUMNS=_COLUMNS, ENDS=_ENDS,
        )  # fmt: skip
    return rows


def zero_tail_(rows: Tensor, num_live: Tensor) -> Tensor:
    """Rows at and past ``num_live`` become 0, whatever they hold; in place: [a, o] -> same.

    Rows before are not touched: where all are live, nothing is read but the number.

    Args:
        rows: [a, o] with neighbouring columns (rows may be further apart), or [a].
        num_live: [] int.
    """
    a, o = rows.shape[0], rows.shape[1] if rows.ndim == 2 else 1
    assert o == 1 or rows.stride(1) == 1
    if rows.numel() > 0:
        with torch.cuda.device_of(rows):
            _tail_kernel[(min(a, _TAILS),)](
                rows, num_live, a, rows.stride(0), min(a, _TAILS),
                WIDTH=o, COLUMNS=1024
            )  # fmt: skip
    return rows


@triton.jit
def _take_kernel(
    x_ptr, token_ptr, weights_ptr, rows_ptr, num_rows, D: tl.constexpr,
    GATHERED: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # wide: a · d may pass 2³¹
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < num_rows
    mask = there[:, None] & (column < D)[None, :]
    token = row
    if GATHERED:
        token = tl.load(token_ptr + row, mask=there, other=0).to(tl.int64)
    value = tl.load(x_ptr + token[:, None] * D + column[None, :], mask=mask, other=0.0)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row, mask=there, other=0.0).to(tl.float32)
        value = value.to(tl.float32) * weight[:, None]
    value = value.to(rows_ptr.dtype.element_ty)
    # the copy is far larger than the cache: it shall not push out what others read again
    into = rows_ptr + row[:, None] * D + column[None, :]
    tl.store(into, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def _sum_kernel(
    rows_ptr, slot_ptr, weights_ptr, out_ptr, num_tokens, runs, D: tl.constexpr,
    K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // runs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % runs) * COLUMNS + tl.arange(0, COLUMNS)
    there = token < num_tokens
    mask = there[:, None] & (column < D)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for choice in tl.static_range(K):
        slot = tl.load(slot_ptr + token * K + choice, mask=there, other=0).to(tl.int64)
        part = tl.load(rows_ptr + slot[:, None] * D + column[None, :], mask=mask, other=0.0)
        part = part.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + slot, mask=there, other=0.0).to(tl.float32)
            part = part * weight[:, None]
        total += part
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token[:, None] * D + column[None, :], total, mask=mask)


@triton.jit
def _product_kernel(
    left_ptr, right_ptr, out_ptr, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = there[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        left = tl.load(left_ptr + place, mask=mask, other=0.0).to(tl.float32)
        total += left * tl.load(right_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, axis=1), mask=there)


@triton.jit
def _add_kernel(
    rows_ptr, values_ptr, ends_ptr, weights_ptr, num_rows, WIDTH: tl.constexpr,
    STRIDE: tl.constexpr, E: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.zeros((ROWS,), dtype=tl.int32)
    for first in range(0, E, ENDS):
        number = first + tl.arange(0, ENDS)
        end = tl.load(ends_ptr + number, mask=number < E, other=2147483647)
        expert += tl.sum((end[None, :] <= row[:, None]).to(tl.int32), axis=1)
    live = (row < num_rows) & (expert < E)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = live[:, None] & (column < WIDTH)[None, :]
        place = values_ptr + expert[:, None].to(tl.int64) * WIDTH + column[None, :]
        more = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            more = more * weight
        own = rows_ptr + row[:, None] * STRIDE + column[None, :]
        total = tl.load(own, mask=mask, other=0.0).to(tl.float32) + more
        tl.store(own, total.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tail_kernel(
    rows_ptr, live_ptr, num_rows, stride, programs, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    zeros = tl.zeros((COLUMNS,), dtype=rows_ptr.dtype.element_ty)
    row = tl.load(live_ptr).to(tl.int64) + tl.program_id(0)
    while row < num_rows:
        for first in range(0, WIDTH, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            tl.store(rows_ptr + row * stride + column, zeros, mask=column < WIDTH)
        row += programs
