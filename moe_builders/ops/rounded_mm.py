"""The grouped product of half-precision rows on a CPU, in few shapes.

Letters: a rows sorted by expert · e experts · i in-features · o out-features.

torch multiplies bf16 and fp16 on a CPU with oneDNN, which writes a program for every shape it has
not seen lately: ten times as long as an expert's product takes, and each step's experts have new
numbers of rows. Here they are rounded up to one of eight numbers an octave, which soon are all
known. Same answers as the loop; torch's own grouped product has the same handicap.
"""

import torch
from torch import Tensor

_LEAST = 32  # rows


def takes_rounded(dtype: torch.dtype) -> bool:
    """Whether rounding is what helps on a CPU: half precision."""
    return dtype in (torch.bfloat16, torch.float16)


def rounded(rows: int) -> int:
    """The next of eight numbers an octave, and a multiple of 32: at most an eighth or 31 more."""
    step = max(_LEAST, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step


def rounded_mm(x: Tensor, weight: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """y[r] = weight[expert of r] @ x[r]; zero past the last run.

    Args:
        x: [a, i].
        weight: [e, o, i], any strides.
        runs: (start, end) of each expert's rows, ascending and without gaps.

    Returns:
        [a, o].
    """
    y = x.new_empty(x.shape[0], weight.shape[1])  # [a, o]
    for expert, (start, end) in enumerate(runs):
        size = rounded(end - start)
        if start + size <= x.shape[0]:
            # reaches into the next experts' rows, whose own turn comes later
            window = slice(start, start + size)
            torch.mm(x[window], weight[expert].t(), out=y[window])
        else:
            padded = torch.mm(_pad(x[start:end], size), weight[expert].t())
            y[start:end] = padded[: end - start]
    y[runs[-1][1] :] = 0
    return y


def rounded_weight_grad(grad: Tensor, x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """dW[j] = Σ over rows r of expert j of grad[r] ⊗ x[r]; zero for one without rows.

    Args:
        grad: [a, o].
        x: [a, i].
        runs: as in ``rounded_mm``.

    Returns:
        [e, o, i].
    """
    result = x.new_empty(len(runs), grad.shape[1], x.shape[1])  # [e, o, i]
    for expert, (start, end) in enumerate(runs):
        if start == end:
            result[expert] = 0
            continue
        size = rounded(end - start)
        # rows of zeros add nothing; the neighbours' would
        left, right = (_pad(t[start:end], size) for t in (grad, x))
        torch.mm(left.t(), right, out=result[expert])
    return result


def _pad(rows: Tensor, size: int) -> Tensor:
    """With rows of zeros up to a number of them; ``F.pad`` would write every element twice."""
    padded = rows.new_empty(size, rows.shape[1])
    padded[: rows.shape[0]] = rows
    padded[rows.shape[0] :] = 0
    return padded
