"""Grouped matrix product: each run of rows is multiplied by its own expert's matrix.

Letters: a rows (assignments, sorted by expert) · e experts · i in-features · o out-features.

Two registered operators, so that torch.compile sees one opaque node each (also in fp32, which
torch's own grouped product cannot be traced with) and autograd sees one backward:

* ``grouped_mm``              y[r] = weight[expert of r] @ x[r]
* ``grouped_mm_weight_grad``  dW[j] = Σ over rows r of expert j of grad[r] ⊗ x[r]

Both exist in two ways that tests hold equal: ``grouped`` (torch.nn.functional.grouped_mm) and
``loop`` (one matmul per expert; also serves fp64 and shapes that the grouped kernel refuses).
Both visit experts with rows only: nothing of an idle expert's weights is read. A third is in
``ops.padded_mm``, a fourth, without gradients, in ``ops.gathered_mm``. ``ops.product_ways``
decides between them.
Rows past the last expert's run belong to nobody: they are zero in the output and in the input
gradient, whatever the input holds there (NaN included).
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_builders.errors import InputError
from moe_builders.ops.gathered_mm import gathered_mm, takes_gathered
from moe_builders.ops.kernels import row_kernels
from moe_builders.ops.padded_mm import padded_mm, padded_weight_grad
from moe_builders.ops.product_ways import BACKENDS, way_of_groups, way_of_transposed
from moe_builders.ops.rounded_mm import rounded_mm, rounded_weight_grad


def grouped_mm(
    x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Multiply each expert's rows by that expert's matrix.

    Args:
        x: [a, i] rows sorted by expert; rows past ``num_tokens_per_expert.sum()`` are ignored.
        weight: [e, o, i], stored as ``nn.Linear`` stores it; any strides (a transposed view is
            not copied).
        num_tokens_per_expert: [e] int, rows of each expert; zeros are fine.
        backend: "auto" (on a GPU grouped where the kernel takes dtype and strides, else the loop,
            and without gradients and for few rows what ``ops.gathered_mm`` says; on a CPU the
            loop, in half precision that of ``ops.rounded_mm``), "grouped", "loop", "bmm"
            (``ops.padded_mm``: for small experts of about the same load; a GPU waits for the
            counts, so "auto" never takes it), or "gather" (any number of rows, no gradients).

    Returns:
        [a, o]; exact zeros in the ignored rows.

    Raises:
        InputError: unknown back end, shapes that do not fit each other, or "gather" where
            gradients are wanted.
    """
    check_products(x, weight, num_tokens_per_expert, backend)
    if takes_gathered(backend, x, weight):
        return gathered_mm(x, weight, num_tokens_per_expert)
    return _grouped_mm(x, weight, num_tokens_per_expert, backend)


def check_products(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor, backend: str) -> None:
    """Refuse what does not fit together, see ``grouped_mm``."""
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise InputError(
            f"grouped_mm takes x [a, i] and weight [e, o, i], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if num_tokens_per_expert.shape != weight.shape[:1]:
        raise InputError(
            f"num_tokens_per_expert has shape {tuple(num_tokens_per_expert.shape)}, but the "
            f"weight holds {weight.shape[0]} experts"
        )


def multiply_groups(
    x: Tensor,
    weight: Tensor,
    num_tokens_per_expert: Tensor,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    """``grouped_mm`` without gradients, for operators that have their own: [a, i] -> [a, o].

    Args:
        x, weight, num_tokens_per_expert, backend: of ``grouped_mm``.
        out: [a, o] to write into, where experts are multiplied one by one; None: in new memory.
    """
    way = way_of_groups(backend, x, weight).name
    if way == "loop":
        y = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out  # [a, o]
        counts = num_tokens_per_expert.tolist()
        matrices = weight.transpose(1, 2).unbind()  # [i, o] each
        own_rows = zip(_split(x, counts), matrices, _split(y, counts), strict=True)
        for rows, matrix, answers in own_rows:
            torch.mm(rows, matrix, out=answers)
        y[sum(counts) :] = 0
        return y
    assert out is None
    if way == "gather":
        return gathered_mm(x, weight, num_tokens_per_expert)
    if way == "bmm":
        return padded_mm(x, weight, num_tokens_per_expert)
    if way == "rounded":
        return rounded_mm(x, weight, _runs(num_tokens_per_expert))
    offsets = num_tokens_per_expert.cumsum(0, dtype=torch.int32)  # [e] end of each run
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)  # [a, o]
    y = row_kernels(y).zero_tail_(y, offsets[-1])  # the kernel leaves garbage there
    return y.contiguous()  # CUDA pads odd rows to 16 bytes; the fake promises dense ones


@torch.library.custom_op("moe_builders::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor, backend: str) -> Tensor:
    return multiply_groups(x, weight, num_tokens_per_expert, backend)


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def multiply_transposed(
    grad: Tensor,
    x: Tensor,
    num_tokens_per_expert: Tensor,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    """Each expert's Σ over its rows of grad ⊗ x: [a, o], [a, i] -> [e, o, i]; zero if idle.

    Args:
        grad, x, num_tokens_per_expert, backend: of the product whose weight's gradient it is.
        out: [e, o, i], as in ``multiply_groups``.
    """
    way = way_of_transposed(backend, grad, x).name
    if way == "loop":
        counts = num_tokens_per_expert.tolist()
        shape = (len(counts), grad.shape[1], x.shape[1])  # [e, o, i]
        weight_grad = x.new_empty(shape) if out is None else out
        own_rows = zip(_split(grad, counts), _split(x, counts), weight_grad.unbind(), strict=True)
        for left, right, own in own_rows:
            torch.mm(left.t(), right, out=own)
        return weight_grad
    assert out is None
    if way == "bmm":
        return padded_weight_grad(grad, x, num_tokens_per_expert)
    if way == "rounded":
        return rounded_weight_grad(grad, x, _runs(num_tokens_per_expert))
    offsets = num_tokens_per_expert.cumsum(0, dtype=torch.int32)  # [e]
    return F.grouped_mm(grad.t(), x, offs=offsets).contiguous()  # [e, o, i]


@torch.library.custom_op("moe_builders::grouped_mm_weight_grad", mutates_args=())
def _grouped_mm_weight_grad(
    grad: Tensor, x: Tensor, num_tokens_per_expert: Tensor, backend: str
) -> Tensor:
    return multiply_transposed(grad, x, num_tokens_per_expert, backend)


@_grouped_mm_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, num_tokens_per_expert: Tensor, backend: str) -> Tensor:
    return x.new_empty(num_tokens_per_expert.shape[0], grad.shape[1], x.shape[1])


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, num_tokens_per_expert, backend = inputs
    ctx.save_for_backward(x, weight, num_tokens_per_expert)
    ctx.backend = backend


def _backward(ctx, grad: Tensor):
    x, weight, num_tokens_per_expert = ctx.saved_tensors
    grad = grad.contiguous()  # a sum's gradient is expanded (stride 0), which kernels refuse
    x_grad = weight_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = _grouped_mm(grad, weight.transpose(1, 2), num_tokens_per_expert, ctx.backend)
    if ctx.needs_input_grad[1]:
        weight_grad = _grouped_mm_weight_grad(grad, x, num_tokens_per_expert, ctx.backend)
    return x_grad, weight_grad, None, None


_grouped_mm.register_autograd(_backward, setup_context=_save_for_backward)


# torch's FlopCounterMode sees an operator from outside: dead rows are rows like others to it
@register_flop_formula(torch.ops.moe_builders.grouped_mm)
def _grouped_mm_flops(x_shape, weight_shape, *_, out_shape=None) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.moe_builders.grouped_mm_weight_grad)
def _weight_grad_flops(grad_shape, x_shape, *_, out_shape=None) -> int:
    return 2 * x_shape[0] * grad_shape[1] * x_shape[1]


def _split(rows: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """Each expert's rows, without the dead ones."""
    return rows[: sum(counts)].split(counts)


def _runs(num_tokens_per_expert: Tensor) -> list[tuple[int, int]]:
    """(start, end) of each expert's rows; reads the counts on the host."""
    ends = list(accumulate(num_tokens_per_expert.tolist()))
    return list(zip([0, *ends[:-1]], ends, strict=True))
