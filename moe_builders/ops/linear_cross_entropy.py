"""The output's product and its cross-entropy in one, a chunk of tokens at a time.

Letters: t tokens · c tokens of a chunk · d dim · v vocabulary.

A chunk's logits become, in place, the gradient that reaches them, and this is multiplied into the
gradients of tokens and weight at once, while the forward runs: three products in all, and backward
has only to multiply by what arrives there. The chunks have c = 4d / (bytes of a number) tokens at
most, so that their logits take no more than the weight in fp32: with fewer, adding to the weight's
gradient again and again would cost more than it saves. What happens to a chunk's logits between the
products is ``ops.cross_entropy``. Sums are in fp32, or fp64 for fp64.

Source: gradients in forward and chunks of tokens as in Liger Kernel (arXiv 2410.10989, section
3.2), with another size of the chunks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_builders.errors import InputError
from moe_builders.ops.cross_entropy import IGNORE_INDEX, block_rows, cross_entropy_of

_LEAST_LOGITS = 1 << 20  # of a chunk: fewer are not worth splitting
# numbers of the weight's gradient that a CPU adds, or multiplies, at once where they are narrow
_SLICE, _CAST = 1 << 18, 1 << 16


def linear_cross_entropy_sum(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    scale: float = 1.0,
    divisor: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over labelled tokens of -log softmax(scale · (weight h + bias))[label], in nats.

    Gradients are computed only where they are wanted, and once: a second time (``create_graph``)
    is refused. What tokens without a label hold (NaN included) reaches nothing; their gradient is
    zero.

    Args:
        h: [t, d].
        weight: [v, d], of h's dtype.
        bias: [v], of h's dtype, or None.
        labels: [t] int; IGNORE_INDEX = none.
        scale: multiplies the logits.
        divisor: [] a number the sum is divided by. Dividing here, not afterwards, rounds
            gradients once instead of twice (and on a CPU spares a pass over the weight's).
        chunk: tokens of a chunk at most; None: see above.

    Returns:
        [] in fp32, or fp64 for fp64; 0 without labels.

    Raises:
        InputError: shapes or dtypes that do not fit each other, or a chunk below 1.
    """
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1]:
        raise InputError(
            "linear_cross_entropy_sum takes h [t, d] and weight [v, d], got "
            f"{tuple(h.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != h.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError(
            f"for {h.shape[0]} tokens and {weight.shape[0]} words, labels have shape "
            f"{tuple(labels.shape)} and the bias {None if bias is None else tuple(bias.shape)}"
        )
    if len({t.dtype for t in (h, weight, bias) if t is not None}) > 1:
        raise InputError(
            f"h is {h.dtype}, weight {weight.dtype}, bias {None if bias is None else bias.dtype}: "
            "give all the same dtype"
        )
    if chunk is None:
        chunk = chunk_size(dim=h.shape[1], vocab_size=weight.shape[0], dtype=h.dtype)
    elif chunk < 1:
        raise InputError(f"chunk is {chunk} tokens, but must be at least 1")
    learns = torch.is_grad_enabled()  # not known inside
    return _LinearCrossEntropy.apply(h, weight, bias, labels, divisor, scale, chunk, learns)


def chunk_size(*, dim: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk at most."""
    wide = torch.promote_types(dtype, torch.float32)
    return max(dim * wide.itemsize // dtype.itemsize, _LEAST_LOGITS // vocab_size, 1)


def working_bytes(
    *, num_tokens: int, dim: int, vocab_size: int, dtype: torch.dtype, on_cpu: bool = False
) -> int:
    """The most that one loss with its gradients holds at once, its inputs aside.

    A chunk's logits, blocks and tokens beside the gradients; at the end, where the weight's is
    rounded or multiplied by what arrives in backward, that twice. Blocks are plain torch's:
    Triton's kernel has none.

    Args:
        num_tokens, dim, vocab_size: t, d, v.
        dtype: of h and weight.
        on_cpu: blocks are smaller.
    """
    size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    most = chunk_size(dim=dim, vocab_size=vocab_size, dtype=dtype)
    chunks = -(-num_tokens // most)
    rows = -(-num_tokens // max(chunks, 1))
    block = min(block_rows(vocab_size, on_cpu=on_cpu), rows) * vocab_size
    blocks = block * wide * (1 if size == wide else 2)
    total = dim * vocab_size * (wide if chunks > 1 else size)
    if on_cpu and chunks > 1 and size < wide:
        blocks = max(blocks, min(dim * vocab_size, _SLICE) * (size + wide))
    own = rows * (vocab_size + dim) * size + blocks
    return num_tokens * dim * size + total + max(own, dim * vocab_size * size)


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients from the operator below to where backward asks for them."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        divisor: Tensor | None, scale: float, chunk: int, learns: bool,
    ) -> Tensor:  # fmt: skip
        wanted = [learns and needed for needed in ctx.needs_input_grad[:3]]
        loss, *grads = _linear_cross_entropy(
            h, weight, bias, labels, divisor, scale, chunk, *wanted
        )
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise InputError("backward with create_graph=True needs linear_cross_entropy=none")
        (grad,), grads = grad_outputs, ctx.saved_tensors
        # a CPU may look, and spare the product; a GPU would wait for it, a fake tensor cannot say
        looks = not torch.compiler.is_compiling() and grad.is_cpu and type(grad) is Tensor
        one = looks and bool(grad == 1)
        scaled = [saved if one else _times(saved, grad) for saved in grads]
        wanted = ctx.needs_input_grad[:3]
        given = [own if need else None for own, need in zip(scaled, wanted, strict=True)]
        return (*given, None, None, None, None, None)


def _times(saved: Tensor, factor: Tensor) -> Tensor:
    """Their product in saved's dtype, rounded once: a factor [] would be rounded to it first."""
    product = torch.empty_like(saved)
    rows = max(1, saved.shape[0])
    if saved.is_cpu:  # which multiplies mixed dtypes by way of wide copies
        rows = max(1, _CAST * rows // max(1, saved.numel()))
    factor = factor.reshape((1,) * saved.ndim)
    for own, out in zip(saved.split(rows), product.split(rows), strict=True):
        torch.mul(own, factor, out=out)
    return product


@torch.library.custom_op("moe_builders::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor | None,
    scale: float, chunk: int, for_h: bool, for_weight: bool, for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, its gradients); those that are not wanted are empty."""
    t, v = h.shape[0], weight.shape[0]
    wide = torch.promote_types(h.dtype, torch.float32)
    learns = for_h or for_weight or for_bias
    chunks = -(-t // chunk)
    chunk = max(1, -(-t // max(chunks, 1)))  # all of one size, or nearly
    live = labels != IGNORE_INDEX  # [t]
    factor = scale if divisor is None else scale / divisor.to(wide)

    logits = z = h.new_empty(min(chunk, t), v)  # [c, v]
    cross_entropy_ = cross_entropy_of(logits)
    losses = h.new_empty(t, dtype=wide)  # [t]
    h_grad = torch.empty_like(h) if for_h else h.new_empty(0)  # [t, d]
    weight_grad = _Sum(weight, wide, chunks) if for_weight else None
    bias_grad = h.new_zeros(v if for_bias else 0, dtype=wide)  # [v]
    for start in range(0, t, chunk):
        own = slice(start, min(start + chunk, t))
        keep = live[own, None]  # [c, 1]
        # selected: times their zero gradient, NaN would reach the weight's
        x = torch.where(keep, h[own], 0)  # [c, d]
        z = logits[: x.shape[0]]
        if bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(bias, x, weight.t(), out=z)
        if scale != 1.0:
            z.mul_(scale)
        losses[own] = cross_entropy_(z, labels[own], factor, learns=learns)
        if for_h:
            torch.mm(z, weight, out=h_grad[own])
            h_grad[own] = torch.where(keep, h_grad[own], 0)
        if weight_grad is not None:
            weight_grad.add(z.t(), x)
        if for_bias:
            bias_grad += z.sum(0, dtype=wide)
    loss = losses.sum()
    if divisor is not None:
        loss = loss / divisor.to(wide)
    del logits, z  # before the weight's gradient is there twice
    weight_sum = h.new_empty(0) if weight_grad is None else weight_grad.take()
    return loss, h_grad, weight_sum, bias_grad.to(h.dtype, copy=True)


@_linear_cross_entropy.register_fake
def _(h, weight, bias, labels, divisor, scale, chunk, for_h, for_weight, for_bias):
    loss = h.new_empty((), dtype=torch.promote_types(h.dtype, torch.float32))
    return (
        loss,
        torch.empty_like(h) if for_h else h.new_empty(0),
        torch.empty_like(weight) if for_weight else h.new_empty(0),
        h.new_empty(weight.shape[0] if for_bias else 0),
    )


class _Sum:
    """The weight's gradient: a product, or a sum of them in the wider dtype."""

    def __init__(self, weight: Tensor, wide: torch.dtype, products: int) -> None:
        self.dtype = weight.dtype
        self.total = torch.empty_like(weight, dtype=wide if products > 1 else weight.dtype)
        self.total = self.total.zero_() if products == 0 else self.total  # [v, d]
        self.begun = False

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add [v, c] times [c, d]."""
        total, first, self.begun = self.total, not self.begun, True
        beta = 0 if first else 1
        if total.dtype == left.dtype:
            total.addmm_(left, right, beta=beta)
        elif not total.is_cpu:
            torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)  # pyright: ignore[reportCallIssue]
        else:  # a CPU's products of narrow numbers are narrow
            rows = max(1, _SLICE // right.shape[1])
            for start in range(0, total.shape[0], rows):
                own = slice(start, start + rows)
                part = left[own] @ right  # [rows, d]
                total[own].copy_(part) if first else total[own].add_(part)

    def take(self) -> Tensor:
        """[v, d] in the weight's dtype."""
        return self.total.to(self.dtype)


@register_flop_formula(torch.ops.moe_builders.linear_cross_entropy)
def _flops(h_shape, weight_shape, *args, out_shape=None) -> int:
    """One product forward; those for h and for the weight where they are wanted."""
    for_h, for_weight = args[-3], args[-2]
    return 2 * h_shape[0] * weight_shape[0] * weight_shape[1] * (1 + for_h + for_weight)
