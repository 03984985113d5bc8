"""Fill a (sharded) model from a folder piece by piece: each process reads its own slices."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_builders.checkpoint.folder import Entry, TensorSource
from moe_builders.checkpoint.layout import copy_values, laid_out
from moe_builders.errors import InputError
from moe_builders.parallel.agree import raise_together
from moe_builders.parallel.boxes import around, box_elements
from moe_builders.parallel.sharding import LocalShard, local_shard
from moe_builders.pieces import Piece

_LISTED = 20  # names shown of each kind of mistake
_AT_ONCE = 2**24  # values on their way from the folder into a parameter, unless a row has more
_QUICK = 2.0  # seconds that need no progress bar


def model_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter and persistent buffer."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a model that was built on the meta device memory, filled with NaN.

    Raises:
        InputError: a module keeps a non-persistent buffer that nothing would fill again.
    """
    persistent = set(model.state_dict())
    for name, _ in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name not in persistent and not hasattr(owner, "rope_init"):
            raise InputError(
                f"buffer {name} is neither saved nor recomputed: make it persistent, or give "
                f"{type(owner).__name__} a rope_init() that fills it"
            )
    model.to_empty(device=device)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            local_shard(tensor).tensor.fill_(float("nan"))
    for module in model.modules():
        rope_init = getattr(module, "rope_init", None)
        if rope_init is not None:
            rope_init()


def check_complete(
    plan: Sequence[Piece],
    present: Mapping[str, Entry],
    where: str | Path,
    carried: Collection[str] = (),
) -> None:
    """Compare a plan with a folder's contents.

    Args:
        plan: what the model needs.
        present: the tensors on disk.
        where: the folder, for the message.
        carried: tensors on disk that are left alone.

    Raises:
        InputError: one error that lists all missing, surplus and mis-shaped tensors.
    """
    planned = {piece.disk: piece for piece in plan}
    known = planned.keys() | set(carried)
    missing = [n for n, piece in planned.items() if n not in present and not piece.copy]
    surplus = [name for name in present if name not in known]
    misshaped = [
        f"{name} {list(present[name].shape)} instead of {list(piece.shape)}"
        for name, piece in planned.items()
        if name in present and present[name].shape != piece.shape
    ]
    kinds = {"missing": missing, "surplus": surplus, "mis-shaped": misshaped}
    found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if found:
        raise InputError(
            f"{where} does not fit the model: {'; '.join(found)}; take weights and config "
            "from one release"
        )


def load_pieces(
    model: nn.Module, plan: Sequence[Piece], folder: TensorSource, *, show: bool = False
) -> None:
    """Copy each piece's overlap with this process's shards; nothing else is read.

    Args:
        model: has memory (``materialize``).
        plan: what fills it.
        folder: where from.
        show: draw a progress bar if this is a terminal and takes a while.

    Raises:
        InputError: a parameter still holds NaN afterwards, or a copy of one is not its equal.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in plan:
        pieces[piece.ours].append(piece)
    spoiled, unequal, error = [], [], None
    shards = {name: local_shard(tensor) for name, tensor in model.state_dict().items()}
    bar = tqdm(
        total=sum(shard.tensor.nbytes for shard in shards.values()), desc="loading", unit="B",
        unit_scale=True, delay=_QUICK, dynamic_ncols=True, leave=False,
        disable=None if show else True,
    )  # fmt: skip
    try:
        for name, shard in shards.items():
            with torch.no_grad():
                for group in _by_disk(piece for piece in pieces[name] if not piece.copy):
                    _copy_overlap(group, folder, shard)
            bar.update(shard.tensor.nbytes)
            if _has_nan(shard.tensor):
                spoiled.append(name)
                continue
            copies = (piece for piece in pieces[name] if piece.copy)
            unequal += [copy for copy in copies if not _all_equal(copy, folder, shard)]
    except InputError as damaged:
        error = damaged
    finally:
        bar.close()
    if unequal:
        error = InputError(
            f"{folder.path} holds other values in {_listed([copy.disk for copy in unequal])} than "
            f"in {_listed([_source_of(copy, plan) for copy in unequal])}, but the model has one "
            "parameter for both: untie them in config.json or remove the copy from the folder"
        )
    if spoiled:
        error = InputError(
            f"{folder.path} left NaN in {len(spoiled)} parameters: {_listed(spoiled)}; the files "
            "are damaged (download them again) or the model itself is"
        )
    raise_together(error)


def _by_disk(pieces: Iterable[Piece]) -> list[list[Piece]]:
    groups: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.disk].append(piece)
    return list(groups.values())


def _copy_overlap(pieces: Sequence[Piece], folder: TensorSource, shard: LocalShard) -> None:
    """Fill the shard's part of some pieces of one tensor on disk."""
    overlaps = (piece.within(shard.offset, shard.tensor.shape) for piece in pieces)
    parts = [part for part in overlaps if part is not None]
    if not parts:
        return
    box = around([part.span for part in parts])
    rows = shard.tensor.shape[0] if shard.tensor.ndim else 1
    if box_elements(box) > _AT_ONCE and rows > 1:
        for half in (slice(0, rows // 2), slice(rows // 2, rows)):
            offset = (shard.offset[0] + half.start, *shard.offset[1:])
            _copy_overlap(pieces, folder, LocalShard(shard.tensor[half], offset))
        return
    # what alternates is read once; what lies apart without the bytes between
    if box_elements(box) > sum(box_elements(part.span) for part in parts):
        for part in parts:
            _fill_parts([part], part.span, folder, shard.tensor)
    else:
        _fill_parts(parts, box, folder, shard.tensor)


def _fill_parts(
    parts: Sequence[Piece], box: tuple[slice, ...], folder: TensorSource, local: Tensor
) -> None:
    value, first = folder.read(parts[0].disk, box), tuple(side.start for side in box)
    for part in parts:
        copy_values(local[part.region], laid_out(part, value, first))


def _has_nan(tensor: Tensor) -> bool:
    """Without a mask as large as the tensor: its largest value is NaN if any is."""
    return tensor.is_floating_point() and tensor.numel() > 0 and bool(tensor.max().isnan())


def _all_equal(copy: Piece, folder: TensorSource, shard: LocalShard) -> bool:
    """Whether the shard's part of a copy on disk holds what the shard does."""
    count = max(1, _AT_ONCE // max(1, shard.tensor.shape[1:].numel()))
    return all(
        _equal(copy, folder, LocalShard(rows, (shard.offset[0] + n * count, *shard.offset[1:])))
        for n, rows in enumerate(shard.tensor.split(count))
    )


def _equal(piece: Piece, folder: TensorSource, shard: LocalShard) -> bool:
    part = piece.within(shard.offset, shard.tensor.shape)
    if part is None:
        return True
    value = laid_out(part, folder.read(part.disk, part.span), tuple(s.start for s in part.span))
    mine = shard.tensor[part.region]
    return torch.equal(value.to(mine), mine)


def _source_of(copy: Piece, plan: Iterable[Piece]) -> str:
    return next(piece.disk for piece in plan if piece.ours == copy.ours and not piece.copy)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
