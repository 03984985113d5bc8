"""Causal attention within documents, as one registered operator: no mask, nothing between them.

Letters: b rows · s positions · t = b·s tokens · n heads · m key/value heads · u width of a head ·
x documents.

A CPU goes through the rows in pieces (``ops.document_pieces``), a GPU has a kernel
(``ops.document_kernels``). torch.compile sees one node whatever the documents are.
"""

import torch
from torch import Tensor

from moe_builders.ops.document_kernels import (
    attend_kernel,
    attend_kernel_backward,
    has_document_kernel,
)
from moe_builders.ops.document_pieces import attend_pieces, attend_pieces_backward
from moe_builders.ops.documents import Documents, runs


def can_attend_documents(q: Tensor) -> bool:
    """Whether there is a way for queries [..., u] of this device, dtype and width."""
    return q.is_cpu or has_document_kernel(q)


def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each token attends to its document's past and itself.

    Args:
        q: [b, n, s, u].
        k, v: [b, m, s, u]; m divides n.
        documents: of the t tokens.
        scale: of the scores; None: u^-½.
        window: a query sees this many positions at most, itself included; None: all before it.
        chunk: a query sees its own run of this many positions only, the first begins with the
            document; None: all.
        sinks: [n] scores of a key of value 0 that every query of a head sees; None: none.

    Returns:
        [b, n, s, u], as a view of [b, s, n, u].
    """
    b, n, s, u = q.shape
    out, _ = _attend_documents(
        *(t.transpose(1, 2).flatten(0, 1).contiguous() for t in (q, k, v)),  # [t, n|m, u]
        documents.ends, documents.counts, u**-0.5 if scale is None else scale, window, chunk, sinks,
    )  # fmt: skip
    return out.view(b, s, n, u).transpose(1, 2)


@torch.library.custom_op("moe_builders::attend_documents", mutates_args=())
def _attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    counts: Tensor | None,
    scale: float,
    window: int | None,
    chunk: int | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    ends, longest = runs(ends, counts, num_tokens=q.shape[0], chunk=chunk)
    if q.is_cpu:
        out, lse = attend_pieces(q, k, v, ends, scale=scale, window=window)
    else:
        out, lse = attend_kernel(q, k, v, ends, longest=longest, scale=scale, window=window)
    if sinks is None:
        return out, lse
    joined = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])  # [n, t]
    share = (lse - joined).exp().t()[..., None]  # [t, n, 1], of the keys that are tokens
    return (out * share).to(out.dtype), joined


@_attend_documents.register_fake
def _(q, k, v, ends, counts, scale, window, chunk, sinks) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@torch.library.custom_op("moe_builders::attend_documents_backward", mutates_args=())
def _attend_documents_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor,
    counts: Tensor | None,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ends, longest = runs(ends, counts, num_tokens=q.shape[0], chunk=chunk)
    given = (grad, q, k, v, out, lse, ends)
    if q.is_cpu:
        return attend_pieces_backward(*given, scale=scale, window=window)
    return attend_kernel_backward(*given, longest=longest, scale=scale, window=window)


@_attend_documents_backward.register_fake
def _(grad, q, k, v, out, lse, ends, counts, scale, window, chunk) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, counts, ctx.scale, ctx.window, ctx.chunk, sinks = inputs
    ctx.save_for_backward(q, k, v, ends, counts, sinks, *output)


def _backward(ctx, grad: Tensor, _lse_grad: Tensor | None):
    """A softmax's gradient needs its log Σ exp and grad · out alone, whatever else is in the sum.

    So kernels that know no sinks give q, k and v the right gradients once sinks are in both.

    Source: Dao et al. 2022 (2205.14135) appendix B.2.
    """
    q, k, v, ends, counts, sinks, out, lse = ctx.saved_tensors
    grad = grad.contiguous()
    q_grad, k_grad, v_grad = _attend_documents_backward(
        grad, q, k, v, out, lse, ends, counts, ctx.scale, ctx.window, ctx.chunk
    )
    sinks_grad = None
    if sinks is not None:
        inner = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()  # [n, t]
        share = (sinks.to(lse.dtype)[:, None] - lse).exp()  # [n, t]
        sinks_grad = -(share * inner).sum(1).to(sinks.dtype)  # [n]
    return q_grad, k_grad, v_grad, None, None, None, None, None, sinks_grad


_attend_documents.register_autograd(_backward, setup_context=_save_for_backward)
