"""An expert's activation and all that its backward needs, one Triton kernel each.

Letters: a rows (assignments) · h hidden_dim of one expert.

Twins of ``ops.row_ops``: fp32 within, one rounding at the end. Every gated form is
f(gate) · (up + shift), maybe of clamped halves, and every ungated one f(z), so that the kernels
know four curves f. Backward reads z and the gradient once and writes all three answers; a row
belongs to one block, which adds up its columns in a fixed order.
"""

# Triton's language is not Python to a type checker, and Triton is not everywhere:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_builders.ops.activations import Activation, is_named

# f of each activation by its name; what a name needs beside it is in ``_numbers``
_CURVES = {
    "swiglu": "silu",
    "geglu": "gelu_tanh",
    "geglu_exact": "gelu",
    "gpt_oss": "silu",
    "limited_swiglu": "silu",
    "relu2": "relu2",
    "gelu_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
}

# 4 rows of 256 columns, a warp to a row: backward has three loads of 16 bytes a thread under way,
# and its 8 columns a thread of fp32 values leave room for 8 and more blocks on a processor
_ROWS, _COLUMNS = 4, 256


def serves(activation: Activation) -> bool:
    """Whether the kernels know it; one of a user's own they do not."""
    return activation.name in _CURVES and is_named(activation) and activation.gradient is not None


def activate(z: Tensor, activation: Activation, weights: Tensor | None = None) -> Tensor:
    """activation(z), times a weight a row: [a, 2h] (ungated: [a, h]) -> [a, h] in z.dtype.

    Args:
        z: what the first product gave.
        activation: one that the kernels serve.
        weights: [a] or None for 1.
    """
    assert serves(activation)
    a, h = z.shape[0], z.shape[1] // 2 if activation.gated else z.shape[1]
    z = z.contiguous()
    hidden = torch.empty(a, h, dtype=z.dtype, device=z.device)  # [a, h]
    if hidden.numel() == 0:
        return hidden
    limit, alpha, shift = _numbers(activation.name, activation.numbers)
    with torch.cuda.device_of(z):
        _forward_kernel[(triton.cdiv(a, _ROWS), triton.cdiv(h, _COLUMNS))](
            z, z if weights is None else weights.contiguous(), hidden, a, limit, alpha, shift,
            H=h, CURVE=_CURVES[activation.name], GATED=activation.gated, CLAMPED=limit > 0,
            WEIGHTED=weights is not None, ROWS=_ROWS, COLUMNS=_COLUMNS
        )  # fmt: skip
    return hidden


def activate_backward(
    z: Tensor, grad: Tensor, activation: Activation, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``activate``'s backward needs, and its answer once more.

    Args:
        z: [a, 2h] (ungated: [a, h]).
        grad: [a, h] of the answer.
        activation: one that the kernels serve.
        weights: [a] or None for 1.

    Returns:
        Gradient of z like z; [a, h] the answer, weights and all, in z.dtype; [a] the gradient of
        the weights in fp32, or None without weights.
    """
    assert serves(activation)
    a, h = grad.shape
    z, grad = z.contiguous(), grad.contiguous()
    z_grad = torch.empty_like(z)  # [a, 2h]
    hidden = torch.empty(a, h, dtype=z.dtype, device=z.device)  # [a, h]
    weights_grad = None
    if weights is not None:
        weights_grad = torch.empty(a, dtype=torch.float32, device=z.device)  # [a]
    if a == 0:
        return z_grad, hidden, weights_grad
    limit, alpha, shift = _numbers(activation.name, activation.numbers)
    with torch.cuda.device_of(z):
        _backward_kernel[(triton.cdiv(a, _ROWS),)](
            z, grad, z if weights is None else weights.contiguous(), z_grad, hidden,
            z if weights_grad is None else weights_grad, a, limit, alpha, shift,
            H=h, CURVE=_CURVES[activation.name], GATED=activation.gated, CLAMPED=limit > 0,
            WEIGHTED=weights is not None, ROWS=_ROWS, COLUMNS=_COLUMNS
        )  # fmt: skip
    return z_grad, hidden, weights_grad


def _numbers(name: str, numbers: Sequence[float]) -> tuple[float, float, float]:
    """(limit, or 0 for none; alpha in the silu; what is added to up)."""
    if name == "gpt_oss":
        limit, alpha = numbers
        return limit, alpha, 1.0
    if name == "limited_swiglu":
        return numbers[0], 1.0, 0.0
    return 0.0, 1.0, 0.0


@triton.jit
def _curve(x, alpha, CURVE: tl.constexpr):
    """f(x) and f'(x)."""
    if CURVE == "silu":  # x · sigmoid(alpha · x)
        share = tl.sigmoid(alpha * x)
        value = x * share
        slope = share * (1.0 + alpha * x * (1.0 - share))
    elif CURVE == "gelu":  # x · Φ(x); constants: sqrt(1/2), sqrt(1/(2π))
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif CURVE == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2/π) (x + 0.044715 x³)
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        value = x * share
        rise = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = share + x * share * (1.0 - share) * rise
    else:  # relu2
        share = tl.where(x < 0.0, 0.0, x)  # a selection that keeps NaN
        value = share * share
        slope = 2.0 * share
    return value, slope


@triton.jit
def _apply(gate, up, limit, alpha, shift, CURVE: tl.constexpr, GATED: tl.constexpr,
           CLAMPED: tl.constexpr):  # fmt: skip
    """The answer and its slopes by gate and by up; ungated, ``up`` counts for nothing."""
    if CLAMPED:  # by selections, which keep NaN
        high, outside = gate > limit, (up > limit) | (up < -limit)
        gate = tl.where(high, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value, slope = _curve(gate, alpha, CURVE)
    answer, by_gate, by_up = value, slope, value
    if GATED:
        answer, by_gate = value * (up + shift), slope * (up + shift)
    if CLAMPED:
        by_gate = tl.where(high, 0.0, by_gate)
        by_up = tl.where(outside, 0.0, by_up)
    return answer, by_gate, by_up


@triton.jit
def _forward_kernel(
    z_ptr, weights_ptr, hidden_ptr, num_rows, limit, alpha, shift,
    H: tl.constexpr, CURVE: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # wide: a · h may pass 2³¹
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < num_rows
    mask = there[:, None] & (column < H)[None, :]
    place = row[:, None] * H + column[None, :]
    if GATED:
        z_place = place + row[:, None] * H
        gate = tl.load(z_ptr + z_place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(z_ptr + z_place + H, mask=mask, other=0.0).to(tl.float32)
    else:
        gate = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
        up = gate
    answer, _, _ = _apply(gate, up, limit, alpha, shift, CURVE, GATED, CLAMPED)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row, mask=there, other=0.0).to(tl.float32)
        answer = answer * weight[:, None]
    tl.store(hidden_ptr + place, answer.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    z_ptr, grad_ptr, weights_ptr, z_grad_ptr, hidden_ptr, weights_grad_ptr, num_rows,
    limit, alpha, shift,
    H: tl.constexpr, CURVE: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row, mask=there, other=0.0).to(tl.float32)[:, None]
    for first in range(0, H, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = there[:, None] & (column < H)[None, :]
        place = row[:, None] * H + column[None, :]
        z_place = place
        if GATED:
            z_place = place + row[:, None] * H
        gate = tl.load(z_ptr + z_place, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(z_ptr + z_place + H, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        answer, by_gate, by_up = _apply(gate, up, limit, alpha, shift, CURVE, GATED, CLAMPED)
        if WEIGHTED:
            total += grad * answer
            answer, grad = answer * weight, grad * weight
        tl.store(hidden_ptr + place, answer.to(hidden_ptr.dtype.element_ty), mask=mask)
        gate_grad = (grad * by_gate).to(z_grad_ptr.dtype.element_ty)
        tl.store(z_grad_ptr + z_place, gate_grad, mask=mask)
        if GATED:
            up_grad = (grad * by_up).to(z_grad_ptr.dtype.element_ty)
            tl.store(z_grad_ptr + z_place + H, up_grad, mask=mask)
    if WEIGHTED:
        tl.store(weights_grad_ptr + row, tl.sum(total, axis=1), mask=there)
