"""One true norm of all gradients, whatever mesh each parameter lives on, and clipping by it."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_builders.errors import InputError


class GradNorm:
    """The 2-norm of gradients as if they were one vector on one process, added up one by one.

    Squares are added in fp64 (within a row in fp32) over each process's own shards, then over just
    the mesh axes a parameter is sharded on: a replicated gradient counts once. No host sync.
    """

    def __init__(self) -> None:
        self._squares: dict[tuple, list[Tensor]] = defaultdict(list)  # by the groups to sum over

    def add(self, parameter: Tensor) -> None:
        """Count a parameter's gradient, if it has one; it may be freed afterwards."""
        if parameter.grad is None:
            return
        local, groups = _local_and_groups(parameter.grad)
        self._squares[groups].append(_sum_of_squares(local))

    def total(self) -> Tensor:
        """The norm of what was added since the last total; one collective for each mesh axis.

        Returns:
            Scalar fp64 tensor, the same on every process.

        Raises:
            InputError: nothing was added.
        """
        if not self._squares:
            raise InputError("there is no gradient to take the norm of: run backward first")
        total = None
        for groups, values in self._squares.items():
            part = torch.stack(values).sum()
            for group in groups:
                dist.all_reduce(part, group=group)
            total = part if total is None else total + part
        self._squares.clear()
        assert total is not None
        return total.sqrt()


def global_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients; see ``GradNorm``."""
    norm = GradNorm()
    for parameter in parameters:
        norm.add(parameter)
    return norm.total()


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


def _sum_of_squares(local: Tensor) -> Tensor:
    """Scalar fp64.

    A CPU needs ten times as long for it in fp64 throughout, a tenth of a whole step, and a GPU
    copies the gradient to fp64 first, four times its bytes in bf16. Rows are short enough to be
    added in fp32, and the rows' norms in fp64. Where what fp32 cannot square (below 1e-19) is all
    there is, or more than it can (above 1e19), a CPU takes fp64; a GPU would wait to be told, and
    its norm is 0 or infinite then.
    """
    if local.ndim > 1 and local.dtype != torch.float64:
        rows = torch.linalg.vector_norm(local, dim=-1, dtype=torch.float32)
        total = rows.double().square().sum()
        if local.device.type != "cpu" or 1e-20 < total < math.inf:
            return total
    return torch.linalg.vector_norm(local, dtype=torch.float64).square()


def _local_and_groups(grad: Tensor) -> tuple[Tensor, tuple]:
    if not isinstance(grad, DTensor):
        return grad, ()
    mesh = grad.device_mesh
    assert not any(p.is_partial() for p in grad.placements), grad.placements
    groups = tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(grad.placements)
        if not placement.is_replicate() and mesh.size(axis) > 1
    )
    return grad.to_local(), groups
