"""Values on disk seen as a region of a parameter, and copies between the two."""

from torch import Tensor

from moe_builders.pieces import Piece

_STRIP = 128  # columns turned at a time, see ``copy_values``


def laid_out(piece: Piece, value: Tensor, first: tuple[int, ...]) -> Tensor:
    """A view of values on disk, the box of them that starts at ``first``, shaped as the region."""
    steps = zip(piece.span, piece.step, first, strict=True)
    index = tuple(slice(side.start - at, side.stop - at, step) for side, step, at in steps)
    dims = [dim for dim in piece.order if dim is not None]
    alone = [dim for dim in range(value.ndim) if dim not in dims]  # of size one
    return value[index].permute([*dims, *alone]).view(piece.size)


def copy_values(target: Tensor, source: Tensor) -> None:
    """Copy; strip by strip where the two run through memory in different directions.

    Whole matrices would miss the cache at every element: five times as long on a CPU.
    """
    last_two = range(target.ndim)[-2:]
    along = min(last_two, key=target.stride, default=None)
    if along is None or along == min(last_two, key=source.stride):
        target.copy_(source)
        return
    strips = target.split(_STRIP, along), source.to(target.device).split(_STRIP, along)
    for into, strip in zip(*strips, strict=True):
        into.copy_(strip)
