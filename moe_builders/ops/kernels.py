"""Which functions pass over rows: Triton kernels where they run, else plain torch."""

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.ops import row_ops
from moe_builders.ops.triton import DTYPES, missing_for

Kernels = Literal["auto", "torch", "triton"]


def row_kernels(x: Tensor, wanted: str = "auto") -> ModuleType:
    """The module whose functions to call: ``ops.row_ops`` or one with the same functions.

    Args:
        x: the rows, for their device and dtype.
        wanted: "auto" (Triton on a GPU, in fp32, bf16 and fp16), "torch", or "triton" (on a CPU in
            Triton's interpreter).

    Raises:
        InputError: another word, or Triton where it is not installed or has no kernel.
    """
    if why_kernels(x.dtype, x.device, wanted)[0] == "torch":
        return row_ops
    from moe_builders.ops.triton import row_ops as on_triton  # needs Triton, which CPUs do not

    return on_triton


def why_kernels(dtype: torch.dtype, device: torch.device, wanted: str = "auto") -> tuple[str, str]:
    """Which of them, "torch" or "triton", and why; see ``row_kernels``."""
    if wanted not in get_args(Kernels):
        raise InputError(f"kernels {wanted!r} is not one of {', '.join(get_args(Kernels))}")
    fits = dtype in DTYPES
    if wanted == "triton" and not fits:
        raise InputError(f"Triton's kernels take bf16, fp16 or fp32, but rows are {dtype}")
    if wanted != "auto":
        return wanted, f"kernels are {wanted}"
    if not fits:
        return "torch", f"there are no kernels for {dtype}"
    missing = missing_for(device)
    return ("triton", "there is a GPU") if missing is None else ("torch", missing)
