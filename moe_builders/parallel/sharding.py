"""Apply a sharding plan to a model (FSDP2), and what a process holds of a sharded tensor.

Gradients are added up over processes, never averaged: each process's loss is its part of the
whole step's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_builders.parallel.agree import num_processes
from moe_builders.parallel.boxes import box_shape, held_box, whole_box
from moe_builders.parallel.expert_parallel import check_dispatcher, deal_out_experts
from moe_builders.parallel.gather import gather_boxes
from moe_builders.parallel.plan import Place, place_parameters, sharding_plan
from moe_builders.parallel.world import World
from moe_builders.routing import ROUTER_MODULE, is_router_parameter


@dataclass(frozen=True)
class LocalShard:
    """The part of a parameter that this process holds: ``tensor`` starts at ``offset``."""

    tensor: Tensor
    offset: tuple[int, ...]


def needs_sharding(model: nn.Module, world: World, *, compute_dtype: torch.dtype) -> bool:
    """Whether ``shard_model`` would change anything but the time a step takes.

    Where not, ``widen_router_inputs`` gives routers what sharding would.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    return sharding_changes(dtypes, size=world.size, compute_dtype=compute_dtype)


def sharding_changes(
    dtypes: Mapping[str, torch.dtype], *, size: int, compute_dtype: torch.dtype
) -> bool:
    """Whether FSDP2 has something to share out, or to cast.

    On one process it only copies every weight and gradient to where it computes and back (a fifth
    of a step on a CPU, see benchmarks/README.md), unless that copy is what changes the dtype: of
    weights stored wider than they compute, of routers stored narrower.

    Args:
        dtypes: of storage, of all parameters by name.
        size: processes of the run.
        compute_dtype: of forward and backward.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    return size > 1 or any(
        dtype != (wide if is_router_parameter(name) else compute_dtype)
        for name, dtype in dtypes.items()
    )


def widen_router_inputs(model: nn.Module) -> None:
    """Let routers see fp32 (fp64 in a model of fp64), as where FSDP2 casts what they are given."""
    for name, module in model.named_modules():
        if ROUTER_MODULE.fullmatch(name):
            module.register_forward_pre_hook(_widened)


def _widened(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = args
    return x.to(torch.promote_types(x.dtype, torch.float32)), *others


def group_modules(model: nn.Module) -> list[str]:
    """Names of modules that can be gathered by themselves.

    Containers have no forward to hook into: a plain list of experts, say, goes with its layer.
    """
    containers = (nn.ModuleList, nn.ModuleDict)
    return [name for name, module in model.named_modules() if not isinstance(module, containers)]


def shard_model(
    model: nn.Module,
    world: World,
    *,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    dispatcher: str = "all_to_all",
) -> None:
    """Shard a model (meta or real) over the world's mesh, in place; also with one process.

    Args:
        model: its parameters become DTensors, sharded as ``place_parameters`` says.
        world: gives the meshes.
        compute_dtype: of forward and backward; gradients are added over processes in fp32 or wider,
            routers compute in fp32 or wider.
        reshard_after_forward: free gathered layers between forward and backward.
        dispatcher: with ep, how tokens reach their experts: "all_to_all" or "all_gather".

    Raises:
        InputError: an unknown dispatcher, or experts that ep cannot deal out.
    """
    check_dispatcher(dispatcher)
    wide = torch.promote_types(compute_dtype, torch.float32)
    # one process has nothing to add up: its gradients need not be widened on their way
    other = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=wide if world.size > 1 else compute_dtype
    )
    policies = {
        "router": MixedPrecisionPolicy(
            param_dtype=wide, reduce_dtype=wide, cast_forward_inputs=True
        ),
        # their layer's tokens are cast already, and weights of rows must not be
        "experts": replace(other, cast_forward_inputs=False),
    }
    groups = sharding_plan(group_modules(model))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    places = place_parameters(shapes, groups, world.shape)
    meshes = {"experts": world.mesh}
    if world.expert_mesh is not None:
        meshes["experts"] = _sharding_axes(world.expert_mesh)
        for group in sharding_plan(name for name, _ in model.named_modules()):
            if group.kind == "experts":  # plain lists, too: they are refused
                deal_out_experts(
                    model, group.module, world.expert_mesh["ep"], dispatcher=dispatcher
                )
    for group in groups:
        module = model.get_submodule(group.module)
        if next(module.parameters(), None) is None:
            continue
        fully_shard(
            module,
            mesh=meshes.get(group.kind, world.mesh),
            mp_policy=policies.get(group.kind, other),
            # a router is small: kept gathered, it costs no second collective
            reshard_after_forward=reshard_after_forward and group.kind in ("experts", "layer"),
            shard_placement_fn=_dims(model, places).__getitem__,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to not divide


def _sharding_axes(mesh: DeviceMesh) -> DeviceMesh:
    """Those that FSDP2 shards a part of the experts over: without an axis for a single copy."""
    return mesh["dp_replicate", "dp_shard"] if mesh.shape[0] > 1 else mesh["dp_shard"]


def _dims(model: nn.Module, places: Mapping[str, Place]) -> dict[nn.Parameter, Shard]:
    """By parameter, as fully_shard asks; the model's own objects of now."""
    return {p: Shard(places[name].shard_dim) for name, p in model.named_parameters()}


def local_shard(tensor: Tensor) -> LocalShard:
    """What this process holds of a (possibly sharded) tensor."""
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor, (0,) * tensor.ndim)
    box, local = held_box(tensor), tensor.to_local()
    assert local.shape == box_shape(box), f"{tensor.placements} on {tensor.device_mesh}"
    return LocalShard(local, tuple(side.start for side in box))


def whole_tensor(tensor: Tensor) -> Tensor:
    """The full value; every process must call it, in the same order, and none may write to it."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = gather_boxes(tensor, [whole_box(tensor.shape)] * num_processes())
    assert whole is not None
    return whole
