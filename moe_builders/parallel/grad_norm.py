"""One true norm of all gradients, whatever mesh each parameter lives on, and clipping by it."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_builders.errors import InputError


def global_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients as if they were one vector on one process.

    Squares are added in fp64 over each process's own shards, then over just the mesh axes a
    parameter is sharded on: a replicated gradient counts once. No host sync.

    Returns:
        Scalar fp64 tensor, the same on every process.
    """
    squares: dict[tuple, list[Tensor]] = defaultdict(list)  # by the groups to sum over
    for parameter in parameters:
        if parameter.grad is None:
            continue
        local, groups = _local_and_groups(parameter.grad)
        squares[groups].append(torch.linalg.vector_norm(local, dtype=torch.float64).square())
    if not squares:
        raise InputError("there is no gradient to take the norm of: run backward first")
    total = None
    for groups, values in squares.items():
        part = torch.stack(values).sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    assert total is not None
    return total.sqrt()


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where the norm is larger; no host sync.

    Args:
        parameters: those the norm was taken of.
        norm: from ``global_grad_norm``.
        max_norm: > 0; ``inf`` leaves everything as it is.
    """
    if not max_norm > 0:
        raise InputError(f"clip_grad_norm is {max_norm}, but must be above 0 (null: no clipping)")
    if math.isinf(max_norm):
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local, _ = _local_and_groups(parameter.grad)
            local.mul_(factor.to(local.dtype))


def _local_and_groups(grad: Tensor) -> tuple[Tensor, tuple]:
    if not isinstance(grad, DTensor):
        return grad, ()
    mesh = grad.device_mesh
    assert all(p.is_shard() or p.is_replicate() for p in grad.placements), grad.placements
    groups = tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(grad.placements)
        if placement.is_shard() and mesh.size(axis) > 1
    )
    return grad.to_local(), groups
