"""The ways to the cross-entropy of a decoder's output: our own, torch's, Liger's.

Letters: t tokens · d dim · v vocabulary.
"""

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from moe_builders.errors import InputError
from moe_builders.ops.cross_entropy import IGNORE_INDEX
from moe_builders.ops.linear_cross_entropy import linear_cross_entropy_sum

# none: whole logits, [t, v]
WAYS = ("chunked", "torch", "liger", "none")


def check_way(way: str, device: torch.device) -> str:
    """The way, if it can be gone here.

    Raises:
        InputError: an unknown way, a torch without the function, Liger that is not installed, or
            Liger without a GPU.
    """
    if way not in WAYS:
        raise InputError(f"linear_cross_entropy {way!r} is not one of {', '.join(WAYS)}")
    if way == "torch" and not hasattr(F, "linear_cross_entropy"):
        raise InputError(
            f"linear_cross_entropy=torch needs torch 2.13 or newer, and this is "
            f"{torch.__version__}: set linear_cross_entropy=chunked"
        )
    if way == "liger" and device.type != "cuda":
        raise InputError(
            f"linear_cross_entropy=liger needs a GPU, but the device is {device.type}: set "
            "linear_cross_entropy=chunked"
        )
    if way == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            "linear_cross_entropy=liger needs a package that is not installed: pip install "
            "liger-kernel, or set linear_cross_entropy=chunked"
        )
    return way


def weight_and_bias(output: Any) -> tuple[Tensor, Tensor | None]:
    """[v, d] and [v] of a decoder's output layer.

    Raises:
        InputError: a layer of one's own, whose logits nobody else can make.
    """
    if isinstance(output, TiedLinear):
        return output.tied_module.weight, None  # pyright: ignore[reportReturnType]
    if not isinstance(output, nn.Linear):
        raise InputError(
            f"the output is a {type(output).__name__}, but without logits it must be a Linear or a "
            "TiedLinear: set linear_cross_entropy=none"
        )
    return output.weight, output.bias


def output_cross_entropy_sum(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    way: str,
    scale: float = 1.0,
    divisor: Tensor | None = None,
) -> Tensor:
    """Sum over labelled tokens of -log softmax(scale · (weight h + bias))[label], in nats.

    Args:
        h: [t, d].
        weight: [v, d].
        bias: [v] or None.
        labels: [t] int; IGNORE_INDEX = none.
        way: "chunked" (``linear_cross_entropy_sum``), "torch"
            (``torch.nn.functional.linear_cross_entropy`` in chunks; its sum is in h's dtype: two or
            three digits in bf16; gradients suffer less), or "liger" (its Triton kernels).
        scale: multiplies the logits; torch and Liger get it multiplied into h and bias.
        divisor: [] a number the sum is divided by.

    Returns:
        [] in fp32, or fp64 for fp64.
    """
    if way == "chunked":
        return linear_cross_entropy_sum(h, weight, bias, labels, scale=scale, divisor=divisor)
    # selected: the others multiply what has no label by zero, and NaN stays
    h = torch.where(labels[:, None] != IGNORE_INDEX, h, 0)  # [t, d]
    if scale != 1.0:
        h, bias = h * scale, None if bias is None else bias * scale
    total = _BY_WAY[way](h, weight, bias, labels)
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    return total if divisor is None else total / divisor


def _torch(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    function: Any = getattr(F, "linear_cross_entropy")  # noqa: B009 (torch 2.11 lacks it)
    options: Any = getattr(nn, "LinearCrossEntropyOptions")  # noqa: B009
    return function(
        h, weight, labels, linear_bias=bias, reduction="sum", ignore_index=IGNORE_INDEX,
        options=options(),
    )  # fmt: skip


def _liger(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
    )
    return loss(weight, h, labels, bias)


_BY_WAY = {"torch": _torch, "liger": _liger}
