"""Activations between an expert's two projections.

Letters: a rows · h hidden_dim of one expert.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_builders.errors import InputError


@dataclass(frozen=True)
class Activation:
    """What happens between up and down projection.

    Attributes:
        name: as written in a config.
        gated: True if the first projection has 2h outputs (gate rows first, then up rows).
        function: [a, 2h] -> [a, h] if gated, else [a, h] -> [a, h].
    """

    name: str
    gated: bool
    function: Callable[[Tensor], Tensor]


def swiglu(z: Tensor) -> Tensor:
    """silu(gate) · up. Source: Shazeer 2020 (2002.05202), SwiGLU without biases."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(z: Tensor) -> Tensor:
    """gelu_tanh(gate) · up. Source: Shazeer 2020 (2002.05202), GEGLU, tanh approximation."""
    gate, up = z.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def geglu_exact(z: Tensor) -> Tensor:
    """gelu(gate) · up, without the approximation. Source: Shazeer 2020 (2002.05202), GEGLU."""
    gate, up = z.chunk(2, dim=-1)
    return F.gelu(gate) * up


def clamped_swiglu(z: Tensor, *, limit: float, alpha: float) -> Tensor:
    """(up + 1) · gate · sigmoid(alpha · gate), gate ≤ limit and |up| ≤ limit (gpt-oss)."""
    gate, up = z.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * (gate * alpha).sigmoid())


def swiglu_within(z: Tensor, *, limit: float) -> Tensor:
    """silu(gate) · up with gate ≤ limit and |up| ≤ limit, in fp32 or wider."""
    gate, up = z.to(torch.promote_types(z.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(z.dtype)


def relu2(z: Tensor) -> Tensor:
    """relu(z)², ungated. Source: So et al. 2021 (2109.08668), Primer."""
    return F.relu(z).square()


def gelu_tanh(z: Tensor) -> Tensor:
    """GELU, tanh approximation, ungated."""
    return F.gelu(z, approximate="tanh")


def gelu(z: Tensor) -> Tensor:
    """GELU without the approximation, ungated. Source: Hendrycks, Gimpel 2016 (1606.08415)."""
    return F.gelu(z)


def silu(z: Tensor) -> Tensor:
    """z · sigmoid(z), ungated."""
    return F.silu(z)


def gpt_oss_swiglu(*, limit: float = 7.0, alpha: float = 1.702) -> Activation:
    """gpt-oss' gated form with clamped halves.

    On disk gate and up rows take turns; here gate rows come first, as everywhere.

    Args:
        limit: the gate's highest value; the up half lies within ± limit. [swiglu_limit]
        alpha: steepness of the gate's sigmoid. [swiglu_alpha]

    Raises:
        InputError: limit is not above 0: a clamp there leaves nothing to learn from.

    Source: transformers ``GptOssExperts``; OpenAI 2025 (2508.10925).
    """
    if not limit > 0:
        raise InputError(f"limit is {limit}, but must be above 0 (gpt-oss: 7.0)")
    function = functools.partial(clamped_swiglu, limit=limit, alpha=alpha)
    return Activation("gpt_oss", gated=True, function=function)


def limited_swiglu(*, limit: float) -> Activation:
    """SwiGLU with clamped halves.

    Args:
        limit: the gate's highest value; the up half lies within ± limit. [swiglu_limit]

    Raises:
        InputError: limit is not above 0.

    Source: DeepSeek-V4's ``swiglu_limit``, as NeMo Automodel 0.7.0 states it.
    """
    if not limit > 0:
        raise InputError(f"limit is {limit}, but must be above 0; without one, use 'swiglu'")
    function = functools.partial(swiglu_within, limit=limit)
    return Activation("limited_swiglu", gated=True, function=function)


ACTIVATIONS = {
    "swiglu": Activation("swiglu", gated=True, function=swiglu),
    "geglu": Activation("geglu", gated=True, function=geglu),
    "geglu_exact": Activation("geglu_exact", gated=True, function=geglu_exact),
    "gpt_oss": gpt_oss_swiglu(),
    "relu2": Activation("relu2", gated=False, function=relu2),
    "gelu_tanh": Activation("gelu_tanh", gated=False, function=gelu_tanh),
    "gelu": Activation("gelu", gated=False, function=gelu),
    "silu": Activation("silu", gated=False, function=silu),
}


def find_activation(activation: str | Activation) -> Activation:
    """The activation itself, or the one of that name.

    Raises:
        InputError: unknown name; the known ones are listed.
    """
    if isinstance(activation, Activation):
        return activation
    if activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]
