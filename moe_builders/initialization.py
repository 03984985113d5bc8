"""Fresh weights: of a name and a seed alone, so that neither order nor sharding matters."""

import zlib

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.experts.expert_list import ExpertList
from moe_builders.experts.stacking import common_kind, stacked_parts


def initial_value(name: str, like: Tensor, *, seed: int, std: float = 0.02) -> Tensor:
    """A fresh value of one parameter or buffer on the CPU: the same on any number of processes.

    Matrices N(0, std); norm weights and hidden_scale 1; biases and buffers 0. Each
    name has a random stream of its own, so that neither order nor sharding matters.

    Args:
        name: dotted parameter name.
        like: gives global shape and dtype.
        seed: of the run.
        std: of the matrices.
    """
    value = torch.zeros(like.shape, dtype=like.dtype)
    # torch's RMSNorm, one after a branch, torchtune's RMSNorm, experts'
    if name.endswith(("norm.weight", "_scale.weight", ".scale", "hidden_scale")):
        return value.fill_(1)
    if name.endswith("bias"):
        return value
    stream = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 20) ^ seed)
    return value.normal_(0, std, generator=stream)


def initialize(model: nn.Module, *, seed: int, std: float | None) -> None:
    """Give every matrix of a model on the CPU its ``initial_value``.

    What has fewer than two dims (norm weights, biases, a router's temperature) and all buffers
    stay as their modules made them. Experts in an ``ExpertList`` that could be stacked get what the
    stacked ones would (biases 0): the arrangement of weights is no part of a seed.

    Args:
        model: real, not on the meta device.
        seed: of the run.
        std: of the matrices; None: keep what the modules drew when they were built.
    """
    if std is None:
        return
    with torch.no_grad():
        listed = _initialize_lists(model, seed=seed, std=std)
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or parameter in listed:
                continue
            parameter.copy_(initial_value(name, parameter, seed=seed, std=std))


def _initialize_lists(model: nn.Module, *, seed: int, std: float) -> set[nn.Parameter]:
    """Fill lists of experts of one kind; the parameters that have their values now."""
    done: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        if not isinstance(module, ExpertList):
            continue
        try:
            common_kind(module)
        except InputError:  # experts of several kinds: by their own names
            continue
        for stacked, networks in stacked_parts(module).items():
            like = torch.stack([torch.cat([p.detach() for p in own]) for own in networks])
            name = f"{path}.{stacked}" if path else stacked
            values = initial_value(name, like, seed=seed, std=std)  # [e, ..]
            for value, parts in zip(values, networks, strict=True):
                rows = value.split([len(part) for part in parts])
                for part, own in zip(parts, rows, strict=True):
                    part.copy_(own)
                    done.add(part)
    return done
