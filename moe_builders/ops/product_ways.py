"""Which way a grouped product goes, and why: decided here, for those that multiply or tell of it.

Letters: a rows sorted by expert · e experts · i in-features · o out-features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.ops.rounded_mm import takes_rounded

BACKENDS = ("auto", "grouped", "loop", "bmm", "gather")
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Way(NamedTuple):
    """How a product is computed.

    Attributes:
        name: "grouped", "rounded", "loop", "bmm" or "gather".
        reason: why, as the end of a sentence.
    """

    name: str
    reason: str


_NO_ROWS = Way("loop", "there are no rows")
_ONE_BY_ONE = Way("loop", "a CPU multiplies one expert after the other")
_FITS = Way("grouped", "it takes dtype and strides")
_ROUNDED = Way("rounded", "a CPU computes half precision fastest in few shapes")
_ASKED = {name: Way(name, f"the back end is {name}") for name in BACKENDS[1:]}


def way_of_groups(
    backend: str, x: Tensor, weight: Tensor, *, device: torch.device | None = None
) -> Way:
    """Of the product of rows [a, i] with matrices [e, o, i].

    Args:
        backend: one of ``BACKENDS``.
        x: [a, i].
        weight: [e, o, i], any strides.
        device: where it will be computed, if x has no values (as on the meta device).

    Raises:
        InputError: "grouped" where the kernel does not take these.
    """
    return _find_way(backend, x, weight.transpose(1, 2), device)


def way_of_transposed(
    backend: str, grad: Tensor, x: Tensor, *, device: torch.device | None = None
) -> Way:
    """Of each expert's sum of outer products, [a, o] and [a, i]; see ``way_of_groups``."""
    return _find_way(backend, grad.t(), x, device)


def _find_way(backend: str, first: Tensor, second: Tensor, device: torch.device | None) -> Way:
    if backend in ("loop", "bmm", "gather"):
        return _ASKED[backend]
    if first.numel() == 0:
        return _NO_ROWS
    if backend == "auto" and (device or first.device).type == "cpu":
        return _ROUNDED if takes_rounded(first.dtype) else _ONE_BY_ONE
    reason = _unfit(first, second)
    if backend == "grouped":
        if reason is not None:
            raise InputError(
                "the grouped kernel takes fp32, bf16 or fp16 with rows of a multiple of 16 bytes, "
                f"got {first.dtype} with strides {first.stride()} and {second.stride()}; use 'auto'"
            )
        return _ASKED[backend]
    return _FITS if reason is None else Way("loop", reason)


def _unfit(first: Tensor, second: Tensor) -> str | None:
    """Why torch's grouped product does not take them; None: it does."""
    if first.dtype != second.dtype or first.dtype not in _GROUPED_DTYPES:
        return f"torch's grouped product takes no {_name(first.dtype)}"
    return _unaligned(first) or _unaligned(second)


def _unaligned(t: Tensor) -> str | None:
    """One of the last two strides must be 1, the others and the start a multiple of 16 bytes."""
    outer, inner = sorted(t.stride()[-2:], reverse=True)
    size = t.element_size()
    if inner != 1:
        return "neither rows nor columns are dense"
    for what, stride in (("rows", outer), ("matrices", t.stride(0) if t.ndim == 3 else 0)):
        if stride * size % 16:
            numbers = f"{stride} numbers in {_name(t.dtype)}"
            return f"{what} of {numbers} are no multiple of 16 bytes"
    return "it starts at no multiple of 16 bytes" if t.data_ptr() % 16 else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
