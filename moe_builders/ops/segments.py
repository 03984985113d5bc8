"""Sums over the tokens of each segment, the same bits whatever order they are added in.

Letters: t tokens · e columns.
"""

import torch
from torch import Tensor

RANGE = 2.0**62  # what a sum of whole numbers may reach in int64, with a bit to spare


def segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """Add up each segment's rows: [t, e] -> [t, e], row s = the sum over tokens of segment s.

    Floating-point atomics add in any order; whole numbers do not care. So each segment's column is
    written in units of its largest value / (2^62 / t), which is finer than fp32 by far, and added
    as int64. Segments do not touch each other, and NaN and infinity stay visible.

    Args:
        values: [t, e].
        segment: [t] int64 in [0, t); a segment without tokens has the sum 0.
    """
    return _SegmentSum.apply(values, segment)


def segment_spread(sums: Tensor, segment: Tensor) -> Tensor:
    """Give each token its segment's row: [t, e] -> [t, e]; its gradient is a ``segment_sum``."""
    return _SegmentSpread.apply(sums, segment)


def segment_max(values: Tensor, segment: Tensor) -> Tensor:
    """Largest of each segment's rows: [t, e] -> [t, e]; -inf without tokens; no gradient."""
    index = segment[:, None].expand_as(values)
    lowest = torch.full_like(values, float("-inf"))
    return lowest.scatter_reduce(0, index, values.detach(), "amax")


def segment_logsumexp(values: Tensor, segment: Tensor, live: Tensor | None = None) -> Tensor:
    """log Σ exp over each segment's rows: [t, e] -> [t, e].

    Args:
        values: [t, e], finite.
        segment: [t] int64 in [0, t).
        live: [t] bool, the tokens that count; None: all. A segment without any has the value 0.
    """
    if live is not None:
        values = torch.where(live[:, None], values, float("-inf"))
    top = segment_max(values, segment)
    top = torch.where(top.isfinite(), top, 0)  # [t, e]; not finite where a segment is empty
    sums = segment_sum((values - top[segment]).exp(), segment)
    empty = sums == 0
    return torch.where(empty, 0, torch.where(empty, 1, sums).log() + top)


def _sum(values: Tensor, segment: Tensor) -> Tensor:
    wide = values.double()
    largest = segment_max(wide.abs(), segment)  # [t, e]
    unit = largest * (values.shape[0] / RANGE)
    unit = torch.where(largest > 0, unit, 1)  # -inf: nobody there
    unit = torch.where(largest.isnan(), largest, unit)
    whole = (wide / unit[segment]).round().long()
    total = torch.zeros_like(whole).index_add(0, segment, whole)
    return (total * unit).to(values.dtype)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, segment: Tensor) -> Tensor:
        ctx.save_for_backward(segment)
        return _sum(values, segment)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (segment,) = ctx.saved_tensors
        return grad[segment], None


class _SegmentSpread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums: Tensor, segment: Tensor) -> Tensor:
        ctx.save_for_backward(segment)
        return sums[segment]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (segment,) = ctx.saved_tensors
        return _sum(grad, segment), None
