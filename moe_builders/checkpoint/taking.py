"""Take the tensors of a (sharded) model out again, as they go to disk: each process its own."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from moe_builders.checkpoint.layout import copy_values, laid_out
from moe_builders.parallel.boxes import Box, in_rows, merged, overlap
from moe_builders.parallel.gather import Wanted, gather_wanted
from moe_builders.pieces import Piece

_AT_ONCE = 2**26  # values on their way from the parameters to a process, unless a row has more


@dataclass(frozen=True)
class _Request:
    """A box of a parameter that a process needs, and the pieces that it fills."""

    ours: str
    box: Box
    pieces: list[Piece]


def take_pieces(
    model: nn.Module, plan: Sequence[Piece], dtypes: Mapping[str, torch.dtype], *, rank: int = 0
) -> Callable[[Sequence[Sequence[str]]], dict[str, Tensor]]:
    """A function that gives tensors as they go to disk.

    It is told the names that each process wants, the same on all; every process must call it, and
    each gets its own. What a process needs of its shards comes from those that hold it, a box of a
    parameter at a time, and all processes are served at once: beside the tensors that it asked
    for, a process holds one box.

    Args:
        model: sharded or not.
        plan: which region of which parameter each tensor on disk is.
        dtypes: of the tensors on disk.
        rank: this process.
    """
    by_disk: dict[str, list[Piece]] = defaultdict(list)
    for piece in plan:
        by_disk[piece.disk].append(piece)
    state = model.state_dict()

    def tensors_of(names_by_process: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        requests = [_requests(names, by_disk) for names in names_by_process]
        taken = {
            name: torch.empty(by_disk[name][0].shape, dtype=dtypes[name])
            for name in names_by_process[rank]
        }
        for together in zip_longest(*requests):
            values = gather_wanted(
                [None if r is None else Wanted(state[r.ours], r.box) for r in together]
            )
            own = together[rank]
            if own is not None and values is not None:
                _put(own, values, taken)
        return taken

    return tensors_of


def put_piece(piece: Piece, whole: Tensor, on_disk: Tensor) -> None:
    """Write a piece of a whole parameter (or a box of it) into its tensor as it goes to disk."""
    copy_values(laid_out(piece, on_disk, (0,) * on_disk.ndim), whole[piece.region])


def _put(request: _Request, values: Tensor, taken: dict[str, Tensor]) -> None:
    """Write a box of a parameter into the tensors that want it."""
    for piece in request.pieces:
        part = piece.within([side.start for side in request.box], values.shape)
        assert part is not None, "it was chosen because it overlaps the box"
        put_piece(part, values, taken[piece.disk])


def _requests(names: Sequence[str], by_disk: Mapping[str, list[Piece]]) -> list[_Request]:
    """What a process needs for its tensors: boxes, parameter by parameter."""
    by_parameter: dict[str, list[Piece]] = defaultdict(list)
    for name in names:
        for piece in by_disk[name]:
            by_parameter[piece.ours].append(piece)
    return [
        _Request(
            ours, box, [pieces[n] for n in inside if overlap(box, pieces[n].region) is not None]
        )
        for ours, pieces in by_parameter.items()
        for joined, inside in merged([piece.region for piece in pieces], _AT_ONCE)
        for box in in_rows(joined, _AT_ONCE)
    ]
