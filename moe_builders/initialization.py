"""Fresh weights: of a name and a seed alone, so that neither order nor sharding matters."""

import zlib

import torch
from torch import Tensor, nn


def initial_value(name: str, like: Tensor, *, seed: int, std: float = 0.02) -> Tensor:
    """A fresh value of one parameter or buffer on the CPU: the same on any number of processes.

    Matrices N(0, std); norm weights 1; biases and buffers 0. Each name has a random stream of its
    own, so that neither order nor sharding matters.

    Args:
        name: dotted parameter name.
        like: gives global shape and dtype.
        seed: of the run.
        std: of the matrices.
    """
    value = torch.zeros(like.shape, dtype=like.dtype)
    # torch's RMSNorm, one after a branch, torchtune's RMSNorm
    if name.endswith(("norm.weight", "_scale.weight", ".scale")):
        return value.fill_(1)
    if name.endswith("bias"):
        return value
    stream = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 20) ^ seed)
    return value.normal_(0, std, generator=stream)


def initialize(model: nn.Module, *, seed: int, std: float | None) -> None:
    """Give every matrix of a model on the CPU its ``initial_value``.

    What has fewer than two dims (norm weights, biases, a router's temperature) and all buffers
    stay as their modules made them.

    Args:
        model: real, not on the meta device.
        seed: of the run.
        std: of the matrices; None: keep what the modules drew when they were built.
    """
    if std is None:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            parameter.copy_(initial_value(name, parameter, seed=seed, std=std))
