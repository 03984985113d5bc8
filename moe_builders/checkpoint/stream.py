"""Fill a (sharded) model from a folder piece by piece, and take pieces out of it again."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_builders.checkpoint.folder import Entry, TensorFolder
from moe_builders.errors import InputError
from moe_builders.parallel.sharding import local_shard, raise_together, whole_tensor
from moe_builders.weights import Piece

_LISTED = 20  # names shown of each kind of mistake


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
    passes_through: Callable[[str], bool],
) -> None:
    """Compare a plan with a folder's contents.

    Args:
        plan: what the model needs.
        present: the tensors on disk.
        where: the folder, for the message.
        passes_through: whether a tensor without a place in the model is to be left alone.

    Raises:
        InputError: one error that lists all missing, surplus and mis-shaped tensors.
    """
    planned = {piece.disk: piece for piece in plan}
    missing = [name for name in planned if name not in present]
    surplus = [name for name in present if name not in planned and not passes_through(name)]
    misshaped = [
        f"{name} {list(present[name].shape)} instead of {list(piece.shape)}"
        for name, piece in planned.items()
        if name in present and present[name].shape != piece.shape
    ]
    kinds = {"missing": missing, "surplus": surplus, "mis-shaped": misshaped}
    found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if found:
        raise InputError(f"{where} does not fit the model: {'; '.join(found)}")


def load_pieces(model: nn.Module, plan: Sequence[Piece], folder: TensorFolder) -> None:
    """Copy each piece's overlap with this process's shards; nothing else is read.

    Raises:
        InputError: a parameter still holds NaN afterwards.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in plan:
        pieces[piece.ours].append(piece)
    spoiled, error = [], None
    try:
        for name, tensor in model.state_dict().items():
            shard = local_shard(tensor)
            with torch.no_grad():
                for piece in pieces[name]:
                    _copy_overlap(piece, folder, shard.tensor, shard.offset)
            if tensor.is_floating_point() and shard.tensor.isnan().any():
                spoiled.append(name)
    except InputError as damaged:
        error = damaged
    if spoiled:
        error = InputError(
            f"{folder.path} left NaN in {len(spoiled)} parameters: {_listed(spoiled)}; the files "
            "are damaged (download them again) or the model itself is"
        )
    raise_together(error)


def take_pieces(
    model: nn.Module, plan: Sequence[Piece], dtypes: Mapping[str, torch.dtype], *, keep: bool
) -> Callable[[list[str]], dict[str, Tensor]]:
    """A function that gives the named tensors as they go to disk.

    Sharded parameters are gathered one at a time, on every process; ``keep`` is False where the
    answer is not written and nothing is kept.
    """
    by_disk = {piece.disk: piece for piece in plan}
    state = model.state_dict()

    def tensors_of(names: list[str]) -> dict[str, Tensor]:
        by_parameter: dict[str, list[Piece]] = defaultdict(list)
        for name in names:
            by_parameter[by_disk[name].ours].append(by_disk[name])
        taken = {}
        for ours, pieces in by_parameter.items():
            whole = whole_tensor(state[ours]).detach()
            if not keep:
                continue
            for piece in pieces:
                region = tuple(
                    slice(o, o + s) for o, s in zip(piece.offset, piece.size, strict=True)
                )
                part = whole[region].reshape(piece.shape).to("cpu", dtypes[piece.disk])
                taken[piece.disk] = part.contiguous().clone()
        return taken

    return tensors_of


def _copy_overlap(
    piece: Piece, folder: TensorFolder, local: Tensor, offset: tuple[int, ...]
) -> None:
    source, target = [], []  # slices of the tensor on disk, of the local shard
    for start, size, shard_start, shard_size in zip(
        piece.offset, piece.size, offset, local.shape, strict=True
    ):
        first, last = max(start, shard_start), min(start + size, shard_start + shard_size)
        if first >= last:
            return
        source.append(slice(first - start, last - start))
        target.append(slice(first - shard_start, last - shard_start))
    # on disk an expert's tensor lacks the expert dim, whose slice is always 0:1
    source = source[len(source) - len(piece.shape) :]
    value = folder.read(piece.disk, tuple(source))
    view = local[tuple(target)]
    view.copy_(value.reshape(view.shape))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
