"""Which parameters are gathered together, as data made from names, and its application (FSDP2).

Three kinds of groups, because their rules differ: a router computes in fp32 whatever the rest
does (as part of a bf16 layer its gate would be cast); experts are a group of their own, so that an
odd-sized neighbour cannot misalign their matrices; a layer takes what remains.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_builders.errors import InputError
from moe_builders.parallel.world import World
from moe_builders.routing import ROUTER_MODULE

_KINDS = (
    ("router", ROUTER_MODULE),
    ("experts", re.compile(r"layers\.\d+\.(.+\.)?experts")),
    ("layer", re.compile(r"layers\.\d+")),
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # without a forward there is nothing to hook into


@dataclass(frozen=True)
class ShardGroup:
    """A module whose remaining parameters are gathered and reduced together."""

    module: str
    kind: Literal["router", "experts", "layer", "root"]


@dataclass(frozen=True)
class LocalShard:
    """The part of a parameter that this process holds: ``tensor`` starts at ``offset``."""

    tensor: Tensor
    offset: tuple[int, ...]


def sharding_plan(module_names: Iterable[str]) -> list[ShardGroup]:
    """Groups in the order they must be applied: inner modules first, the root last."""
    names = list(module_names)
    groups = [
        ShardGroup(name, kind)  # pyright: ignore[reportArgumentType]
        for kind, pattern in _KINDS
        for name in names
        if pattern.fullmatch(name)
    ]
    return [*groups, ShardGroup("", "root")]


def needs_sharding(model: nn.Module, world: World, *, compute_dtype: torch.dtype) -> bool:
    """Whether ``shard_model`` would change anything but the time a step takes.

    On one process FSDP2 only copies every weight and gradient to where it computes and back (a
    fifth of a step on a CPU, see benchmarks/README.md), unless that copy is what changes the
    dtype: of weights stored wider than they compute, of routers in a model that computes in bf16.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    casts = any(p.dtype != compute_dtype for p in model.parameters()) or compute_dtype != wide
    return world.size > 1 or casts


def shard_model(
    model: nn.Module, world: World, *, compute_dtype: torch.dtype, reshard_after_forward: bool
) -> None:
    """Shard a model (meta or real) over the world's mesh, in place; also with one process.

    Args:
        model: its parameters become DTensors, sharded on dim 0.
        world: gives the mesh.
        compute_dtype: of forward and backward; gradients are added over processes in fp32 or wider,
            routers compute in fp32 or wider.
        reshard_after_forward: free gathered layers between forward and backward.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    policies = {
        "router": MixedPrecisionPolicy(
            param_dtype=wide, reduce_dtype=wide, cast_forward_inputs=True
        ),
        # one process has nothing to add up: its gradients need not be widened on their way
        "other": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=wide if world.size > 1 else compute_dtype
        ),
    }
    for group in sharding_plan(name for name, _ in model.named_modules()):
        module = model.get_submodule(group.module)
        if next(module.parameters(), None) is None or isinstance(module, _CONTAINERS):
            continue  # a plain list of experts, say, is gathered with its layer
        fully_shard(
            module,
            mesh=world.mesh,
            mp_policy=policies.get(group.kind, policies["other"]),
            # a router is small: kept gathered, it costs no second collective
            reshard_after_forward=reshard_after_forward and group.kind in ("experts", "layer"),
        )


def local_shard(tensor: Tensor) -> LocalShard:
    """What this process holds of a (possibly sharded) tensor."""
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor, (0,) * tensor.ndim)
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return LocalShard(tensor.to_local(), tuple(offset))


def raise_together(error: InputError | None) -> None:
    """Raise on every process if any has an error: none is left waiting for one that stopped."""
    messages = [None if error is None else str(error)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        own, messages = messages[0], [None] * dist.get_world_size()
        dist.all_gather_object(messages, own)
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise InputError(first) from error


def whole_tensor(tensor: Tensor) -> Tensor:
    """The full value; every process must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
