"""Boxes of sharded tensors for the processes that ask for them, sent point to point.

An all-gather gives everything to everybody. Here a process gets the box it asks for and not one
element more, from the processes that hold parts of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_builders.errors import InputError
from moe_builders.parallel.agree import num_processes
from moe_builders.parallel.boxes import (
    Box,
    box_shape,
    copies_of,
    held_box,
    holders,
    overlap,
    within,
)


@dataclass(frozen=True)
class Wanted:
    """A box of a tensor that a process asks for; plain tensors are the same on all processes."""

    tensor: Tensor
    box: Box


def gather_boxes(tensor: Tensor, wanted: Sequence[Box | None]) -> Tensor | None:
    """The box of one tensor that this process asks for; every process must call it.

    Args:
        tensor: sharded, replicated or plain (then it is sliced here).
        wanted: by process, the same table everywhere; None: nothing.

    Returns:
        See ``gather_wanted``.
    """
    return gather_wanted([None if box is None else Wanted(tensor, box) for box in wanted])


@torch.no_grad()
def gather_wanted(wanted: Sequence[Wanted | None]) -> Tensor | None:
    """What this process asks for; every process must call it, and all exchange at once.

    Args:
        wanted: by process, the same table everywhere (each with this process's own shards); one
            entry: of this process alone. The tensors' meshes may differ, but all lie on the same
            kind of device.

    Returns:
        The box's values, a tensor without mesh on the device of the shards: a view of this
        process's memory where that holds all of it, so it must not be written to. None where
        nothing was asked for.
    """
    alone = len(wanted) == 1  # of several processes, too: one may hold a model of its own
    assert alone or len(wanted) == num_processes(), "one entry a process"
    rank = 0 if alone else dist.get_rank()
    own, operations, arrivals = None, [], []
    for receiver, request in enumerate(wanted):
        if request is None:
            continue
        if receiver == rank:
            own, arrivals = _receive(request, rank, alone=alone)
            operations += [dist.P2POp(dist.irecv, _as_bytes(into), peer)
                           for peer, into, _ in arrivals]  # fmt: skip
        else:
            operations += _send(request, rank, receiver)
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for _, received, target in arrivals:
        if received is not target:
            target.copy_(received)
    return own


def _send(request: Wanted, rank: int, receiver: int) -> list[dist.P2POp]:
    """This process's part of what another asks for, if it is the one to send it."""
    tensor = request.tensor
    if not isinstance(tensor, DTensor):
        return []
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    assert place is not None, "this process has no part in the tensor's mesh"
    held = held_box(tensor)
    part = overlap(held, request.box)
    copies = copies_of(mesh, tensor.placements, place)
    if part is None or _sender(copies, receiver) != rank:
        return []
    values = tensor.to_local()[within(part, held)].contiguous()
    return [dist.P2POp(dist.isend, _as_bytes(values), receiver)]


def _receive(
    request: Wanted, rank: int, *, alone: bool
) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    """Memory for what this process asks for, and what it waits for.

    Returns:
        The box, filled with what this process holds itself, and for each of the others that send:
        who, into which memory, and where in the box that belongs (the same where it is in a row).
    """
    tensor, box = request.tensor, request.box
    if not isinstance(tensor, DTensor):
        return tensor.detach()[box], []
    local, held = tensor.to_local().detach(), held_box(tensor)
    if overlap(held, box) == box:
        return local[within(box, held)], []
    if alone:
        raise InputError(
            f"this process alone asks for a tensor that is sharded over {tensor.device_mesh.size()}"
            ": call on every process, and say which one it is (rank) of how many (size)"
        )
    result = local.new_empty(box_shape(box))
    arrivals = []
    for shard, ranks in holders(tensor):
        part, sender = overlap(shard, box), _sender(ranks, rank)
        if part is None:
            continue
        target = result[within(part, box)]
        if sender == rank:
            target.copy_(local[within(part, held)])
        else:
            into = target if target.is_contiguous() else target.new_empty(target.shape)
            arrivals.append((sender, into, target))
    return result, arrivals


def _sender(copies: Sequence[int], receiver: int) -> int:
    """Who of those that hold a shard sends it: the receiver to itself, else they take turns."""
    return receiver if receiver in copies else copies[receiver % len(copies)]


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: NCCL does not send every type."""
    return tensor.view(-1).view(torch.uint8)
