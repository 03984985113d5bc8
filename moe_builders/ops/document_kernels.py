"""Attention within documents on a GPU: torch's kernel for rows of many lengths.

Letters: t tokens · n heads · m key/value heads · u width of a head · x documents.
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

# to be told that k and v have fewer heads, from torch 2.12 on; until then their shapes say it
ASKS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_AMPERE = 8
_WIDEST = 256  # of a head, a multiple of 8
_HALVES = (torch.bfloat16, torch.float16)

flash_backward = torch.ops.aten._flash_attention_backward


def has_document_kernel(q: Tensor) -> bool:
    """Whether there is a kernel for queries [..., u] of this device, dtype and width."""
    return (
        q.is_cuda
        and torch.version.hip is None
        and takes_heads(q.dtype, q.shape[-1])
        and torch.cuda.get_device_properties(q.device).major >= _AMPERE
    )


def takes_heads(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel is made for heads of this dtype and u."""
    return dtype in _HALVES and width % 8 == 0 and width <= _WIDEST


def attend_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    *,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents; see ``attend_pieces``. Nothing is read on the host."""
    begins = _begins(ends)
    attend: Any = functools.partial(varlen_attn, enable_gqa=True) if ASKS else varlen_attn
    return attend(
        q, k, v, begins, begins, longest, longest,
        return_aux=AuxRequest(lse=True), scale=scale, window_size=(_left(window), 0),
    )  # fmt: skip


def attend_kernel_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor,
    *,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; see ``attend_pieces_backward``.

    torch's own backward takes no log Σ exp but that of its forward, which sinks change: so the
    kernel under it is called.
    """
    begins = _begins(ends)
    return flash_backward(
        grad, q, k, v, out, lse, begins, begins, longest, longest, 0.0, window is None,
        torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0),  # of dropout: none
        scale=scale, window_size_left=_left(window), window_size_right=0,
    )  # fmt: skip


def _begins(ends: Tensor) -> Tensor:
    return F.pad(ends, (1, 0))  # [x + 1], 0 first


def _left(window: int | None) -> int:
    """Positions before a query that it sees; -1: all."""
    return -1 if window is None else window - 1
