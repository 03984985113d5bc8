"""Tensors laid out over real processes in many ways, and what each is told and sent."""

import functools
import logging
import operator
from collections.abc import Iterator

import torch
import torch.distributed as dist
from helpers_weights import count_received
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from moe_builders.parallel.boxes import (
    Box,
    box_elements,
    box_shape,
    held_box,
    holders,
    overlap,
    whole_box,
)
from moe_builders.parallel.gather import Wanted, gather_boxes, gather_wanted
from moe_builders.parallel.sharding import local_shard, whole_tensor

SHAPES = [(6, 4, 3), (4, 4, 3), (2, 6, 4)]  # experts: uneven parts, even ones, none for some


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape).to(dtype)


def laid_out(whole: Tensor, mesh: DeviceMesh, places: list[Placement]) -> DTensor:
    """Without messages, of which gloo cannot send all types."""
    return distribute_tensor(whole, mesh, places, src_data_rank=None)


def experts_of_fsdp(shape: tuple[int, ...], dim: int, copies: int) -> DTensor:
    """A parameter [e, ...] over an axis of experts, then sharded by FSDP2 over the other axes."""
    sizes, names = (copies, 4 // (2 * copies), 2), ("dp_replicate", "dp_shard", "ep")
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    whole = nn.Parameter(laid_out(numbered(shape), mesh["ep"], [Shard(0)]))
    module = nn.Module()
    module.weight = whole
    axes = mesh["dp_replicate", "dp_shard"] if copies > 1 else mesh["dp_shard"]
    fully_shard(module, mesh=axes, shard_placement_fn=lambda _: Shard(dim))
    return module.weight


def all_layouts() -> Iterator[tuple[str, Tensor, Tensor]]:
    """What it is, the tensor over 4 processes, and its values."""
    for shape in SHAPES:
        for dim in (0, 1):
            for copies in (1, 2):
                tensor = experts_of_fsdp(shape, dim, copies)
                yield f"experts {shape} {dim} {copies}", tensor, numbered(shape)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for places in ([Replicate(), Shard(0)], [Shard(0), Shard(0)], [Shard(1), Shard(0)],
                   [Shard(0), Replicate()], [Replicate(), Replicate()]):  # fmt: skip
        whole = numbered((5, 3), torch.bfloat16)
        yield f"{places}", laid_out(whole, mesh, places), whole
    line = init_device_mesh("cpu", (4,))
    for dtype in (torch.int64, torch.float8_e4m3fn, torch.bool):
        whole = torch.arange(21).remainder(2).reshape(7, 3).to(dtype)
        yield f"{dtype}", laid_out(whole, line, [Shard(0)]), whole
    yield "plain", numbered((5, 3)), numbered((5, 3))
    yield "scalar", laid_out(torch.tensor(3.0), mesh, [Replicate()] * 2), torch.tensor(3.0)


def equal(found: Tensor | None, wanted: Tensor) -> bool:
    return (
        found is not None
        and not isinstance(found, DTensor)
        and found.dtype == wanted.dtype
        and torch.equal(found.float(), wanted.float())
    )


def boxes_on_processes() -> dict[str, list[str]]:
    """What was found wrong in any layout, by kind of mistake."""
    rank, wrong, warned = dist.get_rank(), [], []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("torch").addHandler(handler)
    layouts = list(all_layouts())
    with count_received() as received:
        for name, tensor, values in layouts:
            if isinstance(tensor, DTensor):
                box, shard = held_box(tensor), local_shard(tensor.detach())
                if not equal(shard.tensor, values[box]):
                    wrong.append(f"{name}: local values")
                if box_shape(box) != shard.tensor.shape or sum(1 for _ in holders(tensor)) > 4:
                    wrong.append(f"{name}: boxes")
            if not equal(whole_tensor(tensor), values):
                wrong.append(f"{name}: whole")
            for number, table in enumerate(_tables(tuple(values.shape))):
                received.clear()
                found = gather_boxes(tensor, table)
                own = table[rank]
                if (own is None) is not (found is None) or (own and not equal(found, values[own])):
                    wrong.append(f"{name}: table {number}")
                if sum(received) != _lacking(tensor, values, own):
                    wrong.append(f"{name}: table {number} sent {sum(received)}")
        wrong += _different_tensors(layouts, rank)
    logging.getLogger("torch").removeHandler(handler)
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, wrong)
    return {"wrong": functools.reduce(operator.iadd, everybody, []), "warned": warned}


def _lacking(tensor: Tensor, values: Tensor, own: Box | None) -> int:
    """Bytes of a box that this process does not hold itself."""
    if own is None or not isinstance(tensor, DTensor):
        return 0
    here = overlap(held_box(tensor), own)
    size = box_elements(own) - (0 if here is None else box_elements(here))
    return size * values.element_size()


def _different_tensors(layouts: list[tuple[str, Tensor, Tensor]], rank: int) -> list[str]:
    """At once: each asks for a part of another tensor."""
    wrong = []
    for start in range(len(layouts) - 5):  # the last is a scalar
        four = layouts[start : start + 4]
        wanted = [Wanted(t, (slice(0, 1), *whole_box(v.shape)[1:])) for _, t, v in four]
        found = gather_wanted(wanted)
        if not equal(found, four[rank][2][:1]):
            wrong.append(f"different tensors from {start}")
    return wrong


def _tables(shape: tuple[int, ...]) -> Iterator[list[Box | None]]:
    if not shape:
        yield [(), None, (), ()]
        return
    whole = whole_box(shape)
    yield [whole, None, None, None]
    yield [None, None, None, whole]
    yield [None] * 4
    rows = [slice(n * shape[0] // 4, (n + 1) * shape[0] // 4) for n in range(4)]
    yield [(row, *whole[1:]) for row in rows]
    yield [(*whole[:-1], slice(1, shape[-1])), None, (slice(1, shape[0]), *whole[1:]), whole]
    yield [(slice(2, 2), *whole[1:]), (slice(0, 1), *whole[1:]), None, None]
