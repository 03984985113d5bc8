"""Which element on disk is which element of a parameter: regions as numbers, without tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One region of one parameter and where its elements lie in one tensor on disk.

    Element i of the region is, in each dim j of the tensor, ``start[j] + step[j] * i[k]`` with k
    such that ``order[k]`` is j, or ``start[j]`` where no k is.

    Attributes:
        disk: the tensor's name on disk.
        ours: the parameter's name.
        offset: where the region starts, per dim of the parameter.
        size: how far it reaches, per dim.
        shape: of the whole tensor on disk.
        start: its first element, per dim of the tensor on disk.
        step: from one element to the next, per dim of the tensor on disk.
        order: per dim of the parameter, its dim on disk; None: disk has none, the size is 1.
        copy: the tensor may be missing; if not it must equal what other pieces bring.
    """

    disk: str
    ours: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    start: tuple[int, ...]
    step: tuple[int, ...]
    order: tuple[int | None, ...]
    copy: bool = False

    @property
    def region(self) -> tuple[slice, ...]:
        """The region as an index of the parameter."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))

    @property
    def span(self) -> tuple[slice, ...]:
        """The box on disk from its first element to its last, with those between its steps."""
        counts = [1] * len(self.shape)
        for dim, size in zip(self.order, self.size, strict=True):
            if dim is not None:
                counts[dim] = size
        reach = zip(self.start, self.step, counts, strict=True)
        return tuple(slice(first, first + (n - 1) * step + 1) for first, step, n in reach)

    def within(self, offset: Sequence[int], shape: Sequence[int]) -> "Piece | None":
        """The part of it inside a box of the parameter, its own offset counted from the box's.

        Args:
            offset: where the box starts.
            shape: the box's.

        Returns:
            None where they have nothing in common.
        """
        first = [max(a, b) for a, b in zip(self.offset, offset, strict=True)]
        ends = zip(self.offset, self.size, offset, shape, strict=True)
        size = [min(o + n, at + m) - a for a, (o, n, at, m) in zip(first, ends, strict=True)]
        if any(n <= 0 for n in size):
            return None
        start = list(self.start)
        for dim, a, o in zip(self.order, first, self.offset, strict=True):
            if dim is not None:
                start[dim] += (a - o) * self.step[dim]
        return Piece(
            self.disk, self.ours, tuple(a - at for a, at in zip(first, offset, strict=True)),
            tuple(size), self.shape, tuple(start), self.step, self.order, self.copy,
        )  # fmt: skip


def whole(disk: str, ours: str, shape: Shape, *, copy: bool = False) -> Piece:
    """A tensor that is a parameter as it stands."""
    return _piece(disk, ours, shape, tuple(range(len(shape))), copy=copy)


def unsqueezed(disk: str, ours: str, shape: Shape) -> Piece:
    """A tensor with one more dim, of size one, in front."""
    return _piece(disk, ours, (1, *shape), tuple(range(1, len(shape) + 1)))


def transposed(disk: str, ours: str, shape: Shape) -> Piece:
    """A tensor with the last two dims swapped.

    Raises:
        ValueError: there are no two.
    """
    order = _swapped(ours, shape)
    return _piece(disk, ours, tuple(shape[dim] for dim in order), order)


def interleaved(disk: str, ours: str, shape: Shape, *, swapped: bool) -> list[Piece]:
    """A tensor in which the halves of the parameter's second dim alternate.

    Args:
        disk: its name.
        ours: the parameter's name.
        shape: the parameter's, [a, 2h, ...].
        swapped: whether its last two dims are swapped, too.

    Raises:
        ValueError: the second dim has no halves.
    """
    half = _part(ours, shape, 2)
    order = _swapped(ours, shape) if swapped else tuple(range(len(shape)))
    on_disk = tuple(shape[dim] for dim in order)
    pieces = []
    for number in (0, 1):
        offset = (0, number * half, *(0 for _ in shape[2:]))
        start = tuple(number if dim == order[1] else 0 for dim in range(len(shape)))
        step = tuple(2 if dim == order[1] else 1 for dim in range(len(shape)))
        size = (shape[0], half, *shape[2:])
        pieces.append(Piece(disk, ours, offset, size, on_disk, start, step, order))
    return pieces


def split(disk: str, shapes: Mapping[str, Shape]) -> list[Piece]:
    """A tensor that is several parameters, one after the other along the first dim.

    Raises:
        ValueError: their other dims differ.
    """
    if len({shape[1:] for shape in shapes.values()}) > 1 or () in shapes.values():
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{disk} cannot be cut into {described}")
    rest = next(iter(shapes.values()))[1:]
    total, pieces = sum(shape[0] for shape in shapes.values()), []
    zeros, ones, dims = (0,) * len(rest), (1,) * len(rest), tuple(range(1 + len(rest)))
    first = 0
    for name, shape in shapes.items():
        pieces.append(
            Piece(disk, name, (0, *zeros), shape, (total, *rest), (first, *zeros), (1, *ones), dims)
        )
        first += shape[0]
    return pieces


def stacked(disk: Sequence[str], ours: str, shape: Shape) -> list[Piece]:
    """Many tensors: entry ``{e}`` of the first dim is one each of ``disk``, along the second dim.

    Raises:
        ValueError: the second dim cannot be cut so.
    """
    part = (_part(ours, shape, len(disk)), *shape[2:])
    zeros, ones, size = (0,) * len(part), (1,) * len(part), (1, *part)
    order = (None, *range(len(part)))
    return [
        Piece(
            name.replace("{e}", str(entry)), ours, (entry, number * part[0], *zeros[1:]), size,
            part, zeros, ones, order,
        )
        for entry, (number, name) in product(range(shape[0]), enumerate(disk))
    ]  # fmt: skip


def tiled(pieces: Sequence[Piece]) -> bool:
    """Whether pieces of one tensor on disk hold each of its elements exactly once."""
    shape = pieces[0].shape
    return (
        all(piece.shape == shape for piece in pieces)
        and sum(prod(piece.size) for piece in pieces) == prod(shape)
        and all(
            part.start >= 0 and part.stop <= size
            for piece in pieces
            for part, size in zip(piece.span, shape, strict=True)
        )
        and not any(_meet(a, b) for a, b in combinations(pieces, 2))
    )


def _meet(a: Piece, b: Piece) -> bool:
    """Whether they have elements in common; steps that differ are taken to do so."""
    dims = zip(a.span, b.span, a.step, b.step, strict=True)
    return all(
        x.start < y.stop and y.start < x.stop and (s != t or (x.start - y.start) % s == 0)
        for x, y, s, t in dims
    )


def _piece(
    disk: str, ours: str, shape: Shape, order: tuple[int, ...], *, copy: bool = False
) -> Piece:
    """All of a tensor on disk is all of a parameter."""
    size = tuple(shape[dim] for dim in order)
    zeros, ones = (0,) * len(shape), (1,) * len(shape)
    return Piece(disk, ours, (0,) * len(size), size, shape, zeros, ones, order, copy)


def _swapped(ours: str, shape: Shape) -> tuple[int, ...]:
    dims = tuple(range(len(shape)))
    if len(dims) < 2:
        raise ValueError(f"{ours} of shape {shape} cannot be transposed")
    return (*dims[:-2], dims[-1], dims[-2])


def _part(ours: str, shape: Shape, parts: int) -> int:
    """Size of one of equal parts of the second dim."""
    if len(shape) < 2 or shape[1] % parts:
        raise ValueError(f"{ours} of shape {shape} cannot be cut into {parts} parts")
    return shape[1] // parts
