"""Activations between an expert's two projections.

Letters: a rows · h hidden_dim of one expert.
"""

import functools
from collections.abc import Callable, Sequence
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
        gradient: (z, gradient of what ``function`` gives [a, h]) -> gradient of z. None: one of
            your own, which autograd differentiates; the fused op (``ops.routed_experts``) takes
            activations with a gradient only.
        numbers: what the function was made with, in the order of its arguments.
        both: (z, gradient [a, h], where to write that of z) -> [a, h] what ``function`` gives: the
            two in fewer passes than one after the other; None: one after the other.
    """

    name: str
    gated: bool
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    numbers: tuple[float, ...] = ()
    both: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def swiglu(z: Tensor) -> Tensor:
    """silu(gate) · up. Source: Shazeer 2020 (2002.05202), SwiGLU without biases."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """Of ``swiglu``."""
    gate, up = z.chunk(2, dim=-1)
    return torch.cat((_silu_gradient(grad * up, gate), grad * F.silu(gate)), dim=-1)


def swiglu_both(z: Tensor, grad: Tensor, z_grad: Tensor) -> Tensor:
    """``swiglu``, and its gradient into z_grad."""
    gate, up = z.chunk(2, dim=-1)
    gate_grad, up_grad = z_grad.chunk(2, dim=-1)
    share = F.silu(gate)
    torch.mul(grad, share, out=up_grad)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
    return share.mul_(up)


def geglu(z: Tensor) -> Tensor:
    """gelu_tanh(gate) · up. Source: Shazeer 2020 (2002.05202), GEGLU, tanh approximation."""
    gate, up = z.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def geglu_exact(z: Tensor) -> Tensor:
    """gelu(gate) · up, without the approximation. Source: Shazeer 2020 (2002.05202), GEGLU."""
    gate, up = z.chunk(2, dim=-1)
    return F.gelu(gate) * up


def geglu_gradient(z: Tensor, grad: Tensor, *, approximate: str) -> Tensor:
    """Of ``geglu`` ("tanh") and ``geglu_exact`` ("none")."""
    gate, up = z.chunk(2, dim=-1)
    gate_grad = _gelu_gradient(grad * up, gate, approximate=approximate)
    return torch.cat((gate_grad, grad * F.gelu(gate, approximate=approximate)), dim=-1)


def clamped_swiglu(z: Tensor, *, limit: float, alpha: float) -> Tensor:
    """(up + 1) · gate · sigmoid(alpha · gate), gate ≤ limit and |up| ≤ limit (gpt-oss)."""
    gate, up = z.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * (gate * alpha).sigmoid())


def clamped_swiglu_gradient(z: Tensor, grad: Tensor, *, limit: float, alpha: float) -> Tensor:
    """Of ``clamped_swiglu``; zero where a half is clamped."""
    gate, up = z.chunk(2, dim=-1)
    free_gate, free_up = gate <= limit, (up >= -limit) & (up <= limit)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    share = (gate * alpha).sigmoid()
    gate_grad = grad * (up + 1) * share * (1 + alpha * gate * (1 - share))
    up_grad = grad * gate * share
    return torch.cat((gate_grad * free_gate, up_grad * free_up), dim=-1)


def swiglu_within(z: Tensor, *, limit: float) -> Tensor:
    """silu(gate) · up with gate ≤ limit and |up| ≤ limit, in fp32 or wider."""
    gate, up = z.to(torch.promote_types(z.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(z.dtype)


def swiglu_within_gradient(z: Tensor, grad: Tensor, *, limit: float) -> Tensor:
    """Of ``swiglu_within``; zero where a half is clamped."""
    gate, up = z.chunk(2, dim=-1)
    free = torch.cat((gate <= limit, (up >= -limit) & (up <= limit)), dim=-1)
    held = torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit)), dim=-1)
    return swiglu_gradient(held, grad) * free


def relu2(z: Tensor) -> Tensor:
    """relu(z)², ungated. Source: So et al. 2021 (2109.08668), Primer."""
    return F.relu(z).square()


def relu2_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """Of ``relu2``."""
    return 2 * grad * F.relu(z)


def gelu_tanh(z: Tensor) -> Tensor:
    """GELU, tanh approximation, ungated."""
    return F.gelu(z, approximate="tanh")


def gelu_tanh_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """Of ``gelu_tanh``."""
    return _gelu_gradient(grad, z, approximate="tanh")


def gelu(z: Tensor) -> Tensor:
    """GELU without the approximation, ungated. Source: Hendrycks, Gimpel 2016 (1606.08415)."""
    return F.gelu(z)


def gelu_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """Of ``gelu``."""
    return _gelu_gradient(grad, z, approximate="none")


def silu(z: Tensor) -> Tensor:
    """z · sigmoid(z), ungated."""
    return F.silu(z)


def silu_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """Of ``silu``."""
    return _silu_gradient(grad, z)


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
    return Activation(
        "gpt_oss",
        gated=True,
        function=functools.partial(clamped_swiglu, limit=limit, alpha=alpha),
        gradient=functools.partial(clamped_swiglu_gradient, limit=limit, alpha=alpha),
        numbers=(limit, alpha),
    )


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
    return Activation(
        "limited_swiglu",
        gated=True,
        function=functools.partial(swiglu_within, limit=limit),
        gradient=functools.partial(swiglu_within_gradient, limit=limit),
        numbers=(limit,),
    )


_silu_gradient = torch.ops.aten.silu_backward.default  # (gradient, z)
_gelu_gradient = torch.ops.aten.gelu_backward.default  # (gradient, z, approximate=)
_NUMBERS = {"gpt_oss": 2, "limited_swiglu": 1}  # how many numbers an activation is made with

ACTIVATIONS = {
    "swiglu": Activation("swiglu", True, swiglu, swiglu_gradient, both=swiglu_both),
    "geglu": Activation(
        "geglu", True, geglu, functools.partial(geglu_gradient, approximate="tanh")
    ),
    "geglu_exact": Activation(
        "geglu_exact", True, geglu_exact, functools.partial(geglu_gradient, approximate="none")
    ),
    "gpt_oss": gpt_oss_swiglu(),
    "relu2": Activation("relu2", False, relu2, relu2_gradient),
    "gelu_tanh": Activation("gelu_tanh", False, gelu_tanh, gelu_tanh_gradient),
    "gelu": Activation("gelu", False, gelu, gelu_gradient),
    "silu": Activation("silu", False, silu, silu_gradient),
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


def made_with(name: str, numbers: Sequence[float]) -> Activation:
    """The activation of that name made with those numbers: what an operator is told of it."""
    if name == "gpt_oss":
        limit, alpha = numbers
        return gpt_oss_swiglu(limit=limit, alpha=alpha)
    if name == "limited_swiglu":
        return limited_swiglu(limit=numbers[0])
    return ACTIVATIONS[name]


def is_named(activation: Activation) -> bool:
    """Whether ``made_with`` gives it back; not so for an activation of one's own."""
    name, numbers = activation.name, activation.numbers
    if name not in (*ACTIVATIONS, *_NUMBERS) or len(numbers) != _NUMBERS.get(name, 0):
        return False
    known = made_with(name, numbers)
    same = _unbound(activation.function) == _unbound(known.function)
    return same and activation.gated == known.gated


def _unbound(function: Callable) -> tuple[Callable, dict[str, float]]:
    """The function and what it was given: two ``functools.partial`` are never equal."""
    return getattr(function, "func", function), getattr(function, "keywords", {})
