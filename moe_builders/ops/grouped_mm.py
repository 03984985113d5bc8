"""Grouped matrix product: each run of rows is multiplied by its own expert's matrix.

Letters: a rows (assignments, sorted by expert) · e experts · i in-features · o out-features.

Two registered operators, so that torch.compile sees one opaque node each (also in fp32, which
torch's own grouped product cannot be traced with) and autograd sees one backward:

* ``grouped_mm``              y[r] = weight[expert of r] @ x[r]
* ``grouped_mm_weight_grad``  dW[j] = Σ over rows r of expert j of grad[r] ⊗ x[r]

Both exist in two ways that tests hold equal: ``grouped`` (torch.nn.functional.grouped_mm) and
``loop`` (one matmul per expert; also serves fp64 and shapes that the grouped kernel refuses).
Both visit experts with rows only: nothing of an idle expert's weights is read. A third, without
gradients, is in ``ops.gathered_mm``.
Rows past the last expert's run belong to nobody: they are zero in the output and in the input
gradient, whatever the input holds there (NaN included).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_builders.errors import InputError
from moe_builders.ops.gathered_mm import gathered_mm, takes_gathered
from moe_builders.ops.rounded_mm import rounded_mm, rounded_weight_grad, takes_rounded

BACKENDS = ("auto", "grouped", "loop", "gather")
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mm(
    x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Multiply each expert's rows by that expert's matrix.

    Args:
        x: [a, i] rows sorted by expert; rows past ``num_tokens_per_expert.sum()`` are ignored.
        weight: [e, o, i], stored as ``nn.Linear`` stores it; any strides (a transposed view is
            not copied).
        num_tokens_per_expert: [e] int, rows of each expert; zeros are fine.
        backend: "auto" (grouped where the kernel takes dtype and strides, else the loop; in half
            precision on a CPU the loop of ``ops.rounded_mm``; on a GPU without gradients and for
            few rows what ``ops.gathered_mm`` says), "grouped", "loop", or "gather" (any number of
            rows, no gradients).

    Returns:
        [a, o]; exact zeros in the ignored rows.

    Raises:
        InputError: unknown back end, shapes that do not fit each other, or "gather" where
            gradients are wanted.
    """
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
    if takes_gathered(backend, x, weight):
        return gathered_mm(x, weight, num_tokens_per_expert)
    return _grouped_mm(x, weight, num_tokens_per_expert, backend)


@torch.library.custom_op("moe_builders::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor, backend: str) -> Tensor:
    offsets = num_tokens_per_expert.cumsum(0, dtype=torch.int32)  # [e] end of each run
    if backend == "auto" and takes_rounded(x):
        return rounded_mm(x, weight, _runs(offsets))
    if _takes_grouped(backend, x, weight.transpose(1, 2)):
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)  # [a, o]
        if not y.is_cpu or offsets[-1] < y.shape[0]:  # a CPU may look; a GPU would wait for it
            dead = torch.arange(x.shape[0], device=x.device) >= offsets[-1]  # [a]
            y = y.masked_fill_(dead[:, None], 0)  # a selection: the kernel leaves garbage there
        return y.contiguous()  # CUDA pads odd rows to 16 bytes; the fake promises dense ones
    y = x.new_zeros(x.shape[0], weight.shape[1])  # [a, o]
    for expert, (start, end) in enumerate(_runs(offsets)):
        torch.mm(x[start:end], weight[expert].t(), out=y[start:end])
    return y


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("moe_builders::grouped_mm_weight_grad", mutates_args=())
def _grouped_mm_weight_grad(
    grad: Tensor, x: Tensor, num_tokens_per_expert: Tensor, backend: str
) -> Tensor:
    offsets = num_tokens_per_expert.cumsum(0, dtype=torch.int32)  # [e]
    if backend == "auto" and takes_rounded(x):
        return rounded_weight_grad(grad, x, _runs(offsets))
    if _takes_grouped(backend, grad.t(), x):
        return F.grouped_mm(grad.t(), x, offs=offsets).contiguous()  # [e, o, i]
    weight_grad = x.new_zeros(offsets.shape[0], grad.shape[1], x.shape[1])  # [e, o, i]
    for expert, (start, end) in enumerate(_runs(offsets)):
        torch.mm(grad[start:end].t(), x[start:end], out=weight_grad[expert])
    return weight_grad


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


def _runs(offsets: Tensor) -> list[tuple[int, int]]:
    """(start, end) of each expert's rows; reads the counts on the host."""
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _takes_grouped(backend: str, first: Tensor, second: Tensor) -> bool:
    if backend == "loop" or first.numel() == 0:
        return False
    fits = (
        first.dtype == second.dtype
        and first.dtype in _GROUPED_DTYPES
        and _aligned(first)
        and _aligned(second)
    )
    if backend == "grouped" and not fits:
        raise InputError(
            f"the grouped kernel takes fp32, bf16 or fp16 with rows of a multiple of 16 bytes, got "
            f"{first.dtype} with strides {first.stride()} and {second.stride()}; use 'auto'"
        )
    return fits


def _aligned(t: Tensor) -> bool:
    """Whether one of the last two strides is 1 and the other a multiple of 16 bytes."""
    outer, inner = sorted(t.stride()[-2:], reverse=True)
    matrix = t.stride(0) if t.ndim == 3 else 0
    size = t.element_size()
    return (
        inner == 1
        and (outer * size) % 16 == 0
        and (matrix * size) % 16 == 0
        and t.data_ptr() % 16 == 0
    )
