"""Cross-entropy of a chunk of logits, which become the gradient that reaches them, in place.

Letters: c tokens of a chunk · r tokens of a block · v vocabulary.

Plain torch; ``ops.triton.cross_entropy`` is the same as a kernel, and ``cross_entropy_of`` says
which is called. Numbers are taken as they are stored, computed with in fp32 or wider, and rounded
once at the end.
"""

from typing import Protocol

import torch
from torch import Tensor

from moe_builders.ops.triton import DTYPES, available

IGNORE_INDEX = -100  # torchtune's CROSS_ENTROPY_IGNORE_IDX: a position that is not trained on
_CPU_BLOCK, _GPU_BLOCK = 1 << 19, 1 << 25  # numbers of a block: a cache's worth; a launch's


class CrossEntropy(Protocol):
    """What ``cross_entropy_`` here and its twin are."""

    def __call__(
        self, logits: Tensor, labels: Tensor, factor: float | Tensor, *, learns: bool
    ) -> Tensor:
        """Losses [c]."""
        ...


def cross_entropy_of(logits: Tensor) -> CrossEntropy:
    """The function to call for these logits: Triton's where it runs and takes their dtype."""
    if logits.dtype not in DTYPES or not available(logits.device):
        return cross_entropy_
    from moe_builders.ops.triton.cross_entropy import cross_entropy_ as on_triton

    return on_triton


def cross_entropy_(
    logits: Tensor, labels: Tensor, factor: float | Tensor, *, learns: bool
) -> Tensor:
    """-log softmax(logits)[label] of each row; the logits become factor · (softmax - 1 there).

    A row without a label has loss 0 and gradient 0, whatever it holds (NaN included).

    Args:
        logits: [c, v], overwritten if learns.
        labels: [c] int in [0, v); IGNORE_INDEX = none.
        factor: a number or [].
        learns: gradients are wanted.

    Returns:
        [c] in fp32, or fp64 for fp64.
    """
    c, v = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    dead = (labels == IGNORE_INDEX)[:, None]  # [c, 1]
    target = labels[:, None].masked_fill(dead, 0)  # [c, 1]
    losses = logits.new_empty(c, 1, dtype=wide)  # [c, 1]
    rows = max(1, min(block_rows(v, on_cpu=logits.is_cpu), c))
    log_p = logits.new_empty(rows, v, dtype=wide)  # [r, v]
    # logits in the wider dtype, where theirs is narrower
    copy = torch.empty_like(log_p) if logits.dtype != wide else None
    for start in range(0, c, rows):
        own = slice(start, start + rows)
        block, label = logits[own], target[own]  # [r, v], [r, 1]
        values = log_p[: block.shape[0]]
        source = block if copy is None else copy[: block.shape[0]].copy_(block)
        torch.log_softmax(source, -1, out=values)
        at_label = values.gather(1, label)  # [r, 1]
        torch.neg(at_label, out=losses[own])
        if not learns:
            continue
        grads = torch.exp(values, out=block) if copy is None else values.exp_()
        if isinstance(factor, Tensor) or factor != 1.0:
            grads.mul_(factor)
        # one number a row is overwritten: nothing is added up, in whatever order
        grads.scatter_(1, label, torch.expm1(at_label) * factor)
        grads.masked_fill_(dead[own], 0)
        if copy is not None:
            block.copy_(grads)
    return losses.masked_fill_(dead, 0)[:, 0]


def block_rows(vocab_size: int, *, on_cpu: bool) -> int:
    """Tokens of a block: what plain torch passes over several times before it goes on."""
    return max(1, (_CPU_BLOCK if on_cpu else _GPU_BLOCK) // vocab_size)
