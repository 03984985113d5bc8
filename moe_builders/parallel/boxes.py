"""Which box of a tensor each process of a mesh holds: numbers, and their use on DTensors."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

Box = tuple[slice, ...]  # one slice with start and stop, without a step, per dim of a tensor


def shard_box(
    shape: Sequence[int],
    mesh_sizes: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
) -> Box:
    """The box of a tensor that one process holds.

    Each mesh axis that shards a dim cuts what the axes applied before it have left, as
    ``torch.chunk`` does: parts of ⌈n / processes⌉, the last ones smaller or empty. Axes are applied
    from left to right. A strided axis comes later than it stands: it cuts what the axes behind it
    that shard the same dim have left, as many of them as multiply to its ``split_factor``.

    Args:
        shape: the whole tensor's.
        mesh_sizes: processes along each mesh axis.
        placements: how the tensor lies along each mesh axis.
        coordinate: the process's place on each mesh axis.

    Returns:
        One slice a dim; an empty shard's starts where the ones before it end.
    """
    starts, stops = [0] * len(shape), list(shape)
    for dim, axes in _axes_by_dim(mesh_sizes, placements).items():
        for axis in axes:
            part = -(-(stops[dim] - starts[dim]) // mesh_sizes[axis])
            starts[dim] = min(starts[dim] + coordinate[axis] * part, stops[dim])
            stops[dim] = min(starts[dim] + part, stops[dim])
    return tuple(map(slice, starts, stops))


def held_box(tensor: DTensor, coordinate: Sequence[int] | None = None) -> Box:
    """The box of a sharded tensor that a process holds.

    Args:
        tensor: sharded or replicated.
        coordinate: of the process in the tensor's mesh; None: this process's.
    """
    mesh = tensor.device_mesh
    place = mesh.get_coordinate() if coordinate is None else coordinate
    assert place is not None, "this process has no part in the tensor's mesh"
    return shard_box(tensor.shape, mesh.shape, tensor.placements, place)


def holders(tensor: DTensor) -> Iterator[tuple[Box, list[int]]]:
    """The boxes that make up a tensor, each once, and the processes that hold each.

    Yields:
        A box and the global ranks of its holders, of which there are several where the tensor is
        replicated; empty boxes are left out.
    """
    mesh = tensor.device_mesh
    cut = [0 if p.is_replicate() else n for p, n in zip(tensor.placements, mesh.shape, strict=True)]
    for place in torch.cartesian_prod(*(torch.arange(max(n, 1)) for n in cut)).view(-1, mesh.ndim):
        box = held_box(tensor, place.tolist())
        if box_elements(box):
            yield box, copies_of(mesh, tensor.placements, place.tolist())


def copies_of(
    mesh: DeviceMesh, placements: Sequence[Placement], coordinate: Sequence[int]
) -> list[int]:
    """Global ranks of the processes that hold the same shard as the one at a coordinate."""
    index = tuple(
        slice(None) if placement.is_replicate() else at
        for placement, at in zip(placements, coordinate, strict=True)
    )
    return mesh.mesh[index].flatten().tolist()


def overlap(first: Box, second: Box) -> Box | None:
    """What two boxes have in common; None: not one element."""
    pairs = list(zip(first, second, strict=True))
    box = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)
    return None if any(side.stop <= side.start for side in box) else box


def within(box: Box, outer: Box) -> Box:
    """A box as an index of the tensor that holds ``outer``."""
    sides = zip(box, outer, strict=True)
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in sides)


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Sizes of a box."""
    return tuple(side.stop - side.start for side in box)


def box_elements(box: Box) -> int:
    """How many elements a box has."""
    return prod(box_shape(box))


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of some boxes."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def merged(boxes: Sequence[Box], max_elements: int) -> list[tuple[Box, list[int]]]:
    """Boxes joined where that adds no element that none of them has asked for.

    Neighbours in the order of their starts are joined as long as the box around two has no more
    elements than both together: what is asked for twice is held once.

    Args:
        boxes: of one tensor.
        max_elements: of a joined box, unless one of the two has as many by itself.

    Returns:
        Each joined box, and the numbers of those inside it.
    """
    done: list[tuple[Box, list[int]]] = []
    for number in sorted(range(len(boxes)), key=lambda n: [side.start for side in boxes[n]]):
        done.append((boxes[number], [number]))
        while len(done) > 1:
            (first, members), (second, more) = done[-2:]
            joined, sizes = around([first, second]), [box_elements(first), box_elements(second)]
            if box_elements(joined) > min(sum(sizes), max(max_elements, *sizes)):
                break
            done[-2:] = [(joined, members + more)]
    return done


def in_rows(box: Box, max_elements: int) -> list[Box]:
    """A box cut along its first dim into parts of so many elements, or of one row that has more."""
    if not box:
        return [box]
    rows, rest = box[0], box[1:]
    count = max(1, max_elements // max(1, box_elements(rest)))
    starts = range(rows.start, rows.stop, count)
    return [(slice(start, min(start + count, rows.stop)), *rest) for start in starts]


def _axes_by_dim(
    mesh_sizes: Sequence[int], placements: Sequence[Placement]
) -> dict[int, list[int]]:
    """The mesh axes that shard each dim, in the order in which they are applied."""
    by_dim: dict[int, list[int]] = {}
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if isinstance(placement, Replicate):
            continue
        assert isinstance(placement, Shard | _StridedShard), f"{placement} holds no values"
        axes = by_dim.setdefault(placement.dim, [])
        before = getattr(placement, "split_factor", 1)  # product of the axes applied earlier
        count = next(
            (n for n in range(len(axes) + 1) if prod(mesh_sizes[a] for a in axes[:n]) == before),
            None,
        )
        assert count is not None, f"{placements} on {mesh_sizes}: split_factor of axis {axis}"
        axes.insert(count, axis)
    return by_dim
