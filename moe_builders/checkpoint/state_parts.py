"""Optimizer states that are no plain sharded tensors: their parts in a checkpoint, and back.

A quantised entry is stored as the tensors it is made of, each process's part under a name that
says which box of the parameter it is: ``…exp_avg.codes[0:4]`` has rows 0 to 3, and where further
dims are sharded ``[0:4,16:32]`` their columns 16 to 31 too. An entry that is a plain tensor beside
a sharded parameter, this process's own, is stored likewise (``…momentum[0:4]``).

On other processes there are other boxes. Parts are put together again then: blocks that stay whole
move as they are, all others are dequantised and quantised again, which rounds.

Letters: n values of a part · a block of values shares one scale.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_builders.parallel.boxes import Box, box_elements, box_shape, overlap, whole_box, within
from moe_builders.parallel.sharding import local_shard
from moe_builders.training.shards import like_sharded

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name
_INNER = {"codes", "scale", "qmap"}  # of torchao's states
_PART = re.compile(r"(.+?)(?:\.(\w+))?\[(\d+:\d+(?:,\d+:\d+)*)\]")


@dataclass(frozen=True)
class Entry:
    """An optimizer's state of one parameter.

    Attributes:
        name: of the entry in a checkpoint.
        value: as the optimizer holds it.
        parameter: whose it is.
    """

    name: str
    value: Tensor
    parameter: Tensor

    @property
    def local(self) -> Tensor:
        """What this process holds of it, perhaps quantised."""
        return local_shard(self.value).tensor

    @property
    def box(self) -> Box:
        """Of the parameter, that this process holds."""
        shard = local_shard(self.parameter)
        sides = zip(shard.offset, shard.tensor.shape, strict=True)
        return tuple(slice(start, start + count) for start, count in sides)

    def tensors(self) -> dict[str, Tensor]:
        """The plain tensors it is made of, by the names that a checkpoint gives them."""
        local, shard = self.local, local_shard(self.parameter)
        if _is_quantised(local):
            inner, _ = local.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            part = self._part_name()
            return {f"{self.name}.{key}{part}": getattr(local, key) for key in inner}
        # a plain tensor beside a sharded parameter is this process's own
        alone = self.value.ndim > 0 and local is self.value and shard.tensor is not self.parameter
        return {f"{self.name}{self._part_name()}" if alone else self.name: self.value}

    def _part_name(self) -> str:
        shape, box = tuple(self.parameter.shape), self.box
        if not shape:
            return "[0:1]"
        sharded = [dim for dim, count in enumerate(box_shape(box)) if shape[dim] != count]
        named = box[: max(sharded, default=0) + 1]
        return "[" + ",".join(f"{side.start}:{side.stop}" for side in named) + "]"


class StoredParts:
    """What a checkpoint holds in parts.

    Args:
        stored: ``parallel.dcp.stored_tensors`` of it.
    """

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self._parts: dict[str, dict[str, dict[str, str]]] = {}  # entry, spans, inner name: name
        for name in stored:
            if (match := _PART.fullmatch(name)) is not None:
                base, inner, spans = match.groups()
                if inner is not None and inner not in _INNER:
                    base, inner = f"{base}.{inner}", None
                self._parts.setdefault(base, {}).setdefault(spans, {})[inner or ""] = name

    def names(self, entry: str) -> set[str]:
        """All names under which something of an entry is stored."""
        parts = self._parts.get(entry, {}).values()
        whole = {entry} if entry in self.stored else set()
        return whole | {name for inner in parts for name in inner.values()}

    def can_refill(self, entry: Entry) -> bool:
        """Whether what is stored tells all values of an entry, on whatever processes it was."""
        shape, local = tuple(entry.parameter.shape), entry.local
        if tuple(local.shape) != box_shape(entry.box):
            return False
        dtype = None if _is_quantised(local) else local.dtype
        if entry.name in self.stored:
            there, stored_dtype = self.stored[entry.name]
            return there == shape and dtype in (None, stored_dtype)
        boxes = self._boxes(entry)
        fit = all(self._fits(box, names, dtype) for box, names in boxes)
        inside = all(overlap(box, whole_box(shape)) == box for box, _ in boxes)
        return bool(boxes) and fit and inside and (
            sum(box_elements(box) for box, _ in boxes) == math.prod(shape)
        )  # fmt: skip

    def refill(self, entry: Entry, read: Callable[[Mapping[str, Tensor]], None]) -> bool:
        """Give an entry the stored values; every process calls for the same entries in order.

        Args:
            entry: that ``can_refill``.
            read: fills tensors in place, together with the other processes.

        Returns:
            Whether values were quantised anew.
        """
        local, own = entry.local, entry.box
        if entry.name in self.stored:
            dtype = self.stored[entry.name][1]
            empty = torch.empty(box_shape(own), dtype=dtype, device=local.device)
            whole = like_sharded(empty, entry.parameter)
            read({entry.name: whole})
            local.copy_(local_shard(whole).tensor)
            return _is_quantised(local)
        needed = [
            (box, common, names)
            for box, names in self._boxes(entry)
            if (common := overlap(box, own)) is not None
        ]
        tensors = {}
        for _, _, names in needed:
            for name in names.values():
                shape, dtype = self.stored[name]
                tensors[name] = torch.empty(shape, dtype=dtype)
        read(tensors)
        parts = [
            (box, common, {key: tensors[name] for key, name in names.items()})
            for box, common, names in needed
        ]
        if not parts:
            return False
        if _is_quantised(local) and _move_blocks(entry, parts):
            return False
        plain = next(iter(parts[0][2].values())).dtype if "" in parts[0][2] else torch.float32
        values = torch.empty(box_shape(own), dtype=plain)
        for box, common, inner in parts:
            values[within(common, own)] = _values(box, inner)[within(common, box)]
        local.copy_(values.to(local.device))
        return _is_quantised(local)

    def _boxes(self, entry: Entry) -> list[tuple[Box, dict[str, str]]]:
        """Not empty ones, of the parameter's dims; dims that a name leaves out are whole."""
        shape, found = tuple(entry.parameter.shape), []
        for spans, names in self._parts.get(entry.name, {}).items():
            ends = [tuple(map(int, span.split(":"))) for span in spans.split(",")][: len(shape)]
            ends += [(0, count) for count in shape[len(ends) :]]
            box = tuple(slice(start, stop) for start, stop in ends)
            if box_elements(box):
                found.append((box, names))
        return found

    def _fits(self, box: Box, names: Mapping[str, str], dtype: torch.dtype | None) -> bool:
        n = box_elements(box)
        if set(names) == {""}:
            shape, stored_dtype = self.stored[names[""]]
            return shape == box_shape(box) and dtype in (None, stored_dtype)
        if set(names) != _INNER:
            return False
        sizes = {key: math.prod(self.stored[name][0]) for key, name in names.items()}
        blocks = sizes["scale"]
        return sizes["codes"] in (n, n // 2) and blocks > 0 and n % blocks == 0


def _run_of(box: Box, outer: Box, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """First value and number of values of a box in ``outer``'s list of values, if in one piece.

    Args:
        box: inside ``outer``.
        outer: of a parameter.
        shape: of that.
    """
    rows = math.prod(shape[1:])
    if box_shape(box)[1:] != shape[1:] or box_shape(outer)[1:] != shape[1:]:
        return None
    return (box[0].start - outer[0].start) * rows, box_shape(box)[0] * rows


def _is_quantised(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _values(box: Box, inner: Mapping[str, Tensor]) -> Tensor:
    """A part's values, as torchao has them: the code's place in the map times the block's scale."""
    if "" in inner:
        return inner[""]
    codes, scale, n = inner["codes"].flatten(), inner["scale"], box_elements(box)
    if codes.numel() != n:  # two values a byte
        codes = torch.stack([codes >> 4, codes & 15], dim=-1)  # [n / 2, 2]
    blocks = inner["qmap"][codes.flatten().int()].view(len(scale), -1)  # [n / block, block]
    return (blocks * scale[:, None]).view(box_shape(box))


def _move_blocks(entry: Entry, parts: list[tuple[Box, Box, dict[str, Tensor]]]) -> bool:
    """Take over codes and scales as they are, if a new part is made of whole blocks of old ones."""
    local: Any = entry.local
    n, shape, moves = box_elements(entry.box), tuple(entry.parameter.shape), []
    block = n // len(local.scale)
    for box, common, inner in parts:
        theirs, ours = _run_of(common, box, shape), _run_of(common, entry.box, shape)
        if theirs is None or ours is None or "" in inner:
            return False
        numel, fits = box_elements(box), torch.equal(inner["qmap"], local.qmap.cpu())
        fits &= block * len(inner["scale"]) == numel
        if not fits or any(number % block for number in (theirs[0], ours[0], ours[1])):
            return False
        moves.append((theirs[0], *ours, inner))
    for theirs, ours, count, inner in moves:
        for key, per in (("scale", block), ("codes", n // local.codes.numel())):
            source = inner[key].flatten()[theirs // per : (theirs + count) // per]
            getattr(local, key).view(-1)[ours // per : (ours + count) // per].copy_(source)
    return True
