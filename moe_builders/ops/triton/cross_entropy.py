"""Cross-entropy of a chunk of logits and its gradient in place, as one Triton kernel.

Letters: c tokens of a chunk · v vocabulary.

The twin of ``ops.cross_entropy``. A program takes a row and passes over it twice: once for the
largest logit and, relative to the largest so far, the sum of exponentials; once to write. That is
6 bytes a logit in bf16. The label's own logit is left out of the sum, so that
softmax - 1 = -(sum of the others) / (sum of all) is exact to fp32 where softmax is near 1.
"""

# Triton's language is not Python to a type checker, and Triton is not everywhere:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_builders.ops.cross_entropy import IGNORE_INDEX

# 16 numbers a thread: in bf16 two loads of 16 bytes under way, and registers for four programs on a
# processor
_COLUMNS, _WARPS = 4096, 8


def cross_entropy_(
    logits: Tensor, labels: Tensor, factor: float | Tensor, *, learns: bool
) -> Tensor:
    """-log softmax(logits)[label] of each row; the logits become factor · (softmax - 1 there).

    A row without a label has loss 0 and gradient 0, whatever it holds (NaN included); one whose
    label is outside [0, v) becomes NaN, since a GPU cannot raise.

    Args:
        logits: [c, v], contiguous; overwritten if learns.
        labels: [c] int in [0, v); IGNORE_INDEX = none.
        factor: a number or [].
        learns: gradients are wanted.

    Returns:
        [c] in fp32.
    """
    c, v = logits.shape
    assert logits.is_contiguous()
    losses = torch.empty(c, dtype=torch.float32, device=logits.device)  # [c]
    if logits.numel() == 0:
        return losses
    factor = factor.to(losses) if isinstance(factor, Tensor) else losses.new_full((), factor)
    with torch.cuda.device_of(logits):
        _softmax_kernel[(c,)](
            logits, labels.contiguous(), factor, losses, V=v, IGNORED=IGNORE_INDEX,
            LEARNS=learns, COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return losses


@triton.jit
def _softmax_kernel(
    logits_ptr, labels_ptr, factor_ptr, losses_ptr,
    V: tl.constexpr, IGNORED: tl.constexpr, LEARNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # wide: c · v may pass 2³¹
    label = tl.load(labels_ptr + row)
    own = logits_ptr + row * V
    if label == IGNORED:
        tl.store(losses_ptr + row, 0.0)
        if LEARNS:
            zeros = tl.zeros((COLUMNS,), dtype=logits_ptr.dtype.element_ty)
            for first in range(0, V, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                tl.store(own + column, zeros, mask=column < V)
    else:
        known = (label >= 0) & (label < V)
        at_label = tl.load(own + label, mask=known, other=float("nan")).to(tl.float32)
        # finite from the start: -inf - -inf would be NaN where all logits so far are -inf
        top = tl.maximum(at_label, -3.4028234663852886e38)
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        for first in range(0, V, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            value = tl.load(own + column, mask=column < V, other=-float("inf")).to(tl.float32)
            value = tl.where(column == label, -float("inf"), value)
            higher = tl.maximum(top, tl.max(value, axis=0))
            total = total * tl.exp(top - higher) + tl.exp(value - higher)
            top = higher
        others = tl.sum(total, axis=0)
        both = others + tl.exp(at_label - top)
        tl.store(losses_ptr + row, tl.log(both) - (at_label - top))
        if LEARNS:
            share = tl.load(factor_ptr) / both
            for first in range(0, V, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                value = tl.load(own + column, mask=column < V, other=0.0).to(tl.float32)
                value = tl.where(column == label, -others, tl.exp(value - top)) * share
                tl.store(own + column, value.to(logits_ptr.dtype.element_ty), mask=column < V)
