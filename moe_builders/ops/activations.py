"""Activations between an expert's two projections.

Letters: a rows · h hidden_dim of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


def relu2(z: Tensor) -> Tensor:
    """relu(z)², ungated. Source: So et al. 2021 (2109.08668), Primer."""
    return F.relu(z).square()


def gelu_tanh(z: Tensor) -> Tensor:
    """GELU, tanh approximation, ungated."""
    return F.gelu(z, approximate="tanh")


ACTIVATIONS = {
    "swiglu": Activation("swiglu", gated=True, function=swiglu),
    "geglu": Activation("geglu", gated=True, function=geglu),
    "relu2": Activation("relu2", gated=False, function=relu2),
    "gelu_tanh": Activation("gelu_tanh", gated=False, function=gelu_tanh),
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
