"""Routed experts by Liger Kernel's fused Triton kernels. On a GPU not run by us yet.

Letters: t tokens · k experts_per_token · e experts · d dim · h hidden_dim of an expert.

Checked with liger-kernel 0.8.5 in Triton's interpreter. Its forward waits for one number, and the
gradients of the weights of a token's choices are added in no fixed order, in the tokens' dtype.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_builders.dispatch import Assigned
from moe_builders.errors import InputError
from moe_builders.ops.routed_experts import ExpertWeights
from moe_builders.ops.runs import expert_of_rows

_DEVICES = ("cuda",)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OTHERWISE = "set the back end to 'auto'"


def find_liger() -> Callable[..., Tensor]:
    """Liger's function of tokens, the two projections, ids and weights; see ``fused_experts``.

    Raises:
        InputError: the package is not installed, or too old to have it.
    """
    try:
        module = import_module("liger_kernel.ops.fused_moe")
    except ImportError as error:
        raise InputError(
            f"the back end 'liger' needs liger-kernel 0.8 or newer ({error}): pip install "
            f"liger-kernel, or {_OTHERWISE}"
        ) from error
    return module.LigerFusedMoEFunction.apply


def check_rows(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what its kernels do not take.

    Raises:
        InputError: no GPU, or fp64.
    """
    if device.type not in _DEVICES:
        raise InputError(
            f"the back end 'liger' needs a GPU, but the device is {device.type}: {_OTHERWISE}"
        )
    if dtype not in _DTYPES:
        raise InputError(
            f"the back end 'liger' computes in bf16, fp16 or fp32, but tokens are {dtype}: "
            f"{_OTHERWISE}"
        )


def fused_experts(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its SwiGLU experts' answers.

    Args:
        x: [t, d].
        up: [e, 2h, d], gate rows first.
        down: [e, d, h].
        ids: [t, k] int in [0, e).
        weights: [t, k].

    Returns:
        [t, d].
    """
    check_rows(x.device, x.dtype)
    return _eager(x, up, down, ids.to(torch.int32), weights)


def _call(*tensors: Tensor) -> Tensor:
    return find_liger()(*tensors)


_eager: Any = torch.compiler.disable(_call)  # it reads a number on the host and tunes its kernels


def liger_experts(x: Tensor, experts: ExpertWeights, assigned: Assigned | None) -> Tensor:
    """The same for a routing, some of whose choices may be dead: they cost as much as live ones.

    Args:
        x: [t, d].
        experts: up and down alone.
        assigned: of these tokens, k choices each, weighed after the experts.

    Returns:
        [t, d]; zero for a token without a live choice.

    Raises:
        InputError: a routing of another kind; see ``fused_experts``.
    """
    if assigned is None or assigned.slot_of is None:
        raise InputError(
            "the back end 'liger' takes tokens that each choose as many experts, all on this "
            f"process: {_OTHERWISE}, or take token choice without ep"
        )
    if assigned.input_weights is not None or assigned.row_weights is not None:
        raise InputError(
            f"the back end 'liger' weighs the experts' answers alone (score_position after): "
            f"{_OTHERWISE}"
        )
    counts, slot_of = assigned.num_tokens_per_expert, assigned.slot_of
    num_rows, num_experts = assigned.token_index.shape[0], counts.shape[0]
    ids = expert_of_rows(counts, num_rows)[slot_of]  # [t, k] e: dead
    live = ids < num_experts
    # dead choices go to one expert after the other and count nothing
    turn = torch.arange(ids.numel(), device=ids.device).view(ids.shape) % num_experts
    weights = assigned.output_weights
    weights = x.new_ones(num_rows) if weights is None else weights  # [a]
    weights = torch.where(live, weights[slot_of], 0)  # [t, k]
    # 0 · NaN is NaN: neither what a masked token holds nor its gradient may get there
    known = live.any(-1, keepdim=True)
    ids = torch.where(live, ids, turn)
    y = fused_experts(torch.where(known, x, 0), experts.up, experts.down, ids, weights)
    return torch.where(known, y, 0)
