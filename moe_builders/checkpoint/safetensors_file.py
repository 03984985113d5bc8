"""One safetensors file: its header, and slices of its tensors by plain reads.

A memory-mapped file would stay in the process's resident memory for as long as it is open, all of
it that was touched; what is read here is in memory once.
"""

import io
import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moe_builders.errors import InputError, lfs_pointer

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_CHUNK = 2**24  # bytes read at once where not all of them are kept


@dataclass(frozen=True)
class Place:
    """Where in its file a tensor lies: bytes ``start`` to ``stop``; dtype by safetensors' name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Place]:
    """8 bytes of length, then JSON with each tensor's place in the file.

    Raises:
        InputError: not such a file, or one that is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        raw = file.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        places = {}
        for name, tensor in header.items():
            start, stop = (8 + length + int(offset) for offset in tensor["data_offsets"])
            shape = tuple(map(int, tensor["shape"]))
            places[name] = Place(str(tensor["dtype"]), shape, start, stop)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            lfs_pointer(path)
            or f"{path} is truncated or not a safetensors file (its header cannot be read); "
            "download it again"
        ) from error
    promised = max((place.stop for place in places.values()), default=8 + length)
    if promised != size:
        raise InputError(
            f"{path} is truncated or damaged: {size} bytes, but its header promises {promised}; "
            "download it again"
        )
    for name, place in places.items():
        known = place.dtype in _DTYPES
        needed = prod(place.shape) * _DTYPES[place.dtype].itemsize if known else None
        if place.start < 8 + length or needed not in (None, place.stop - place.start):
            raise InputError(
                f"{path} is damaged and cannot be read: its header gives {name}, {place.dtype} "
                f"{list(place.shape)}, {place.stop - place.start} bytes; download it again"
            )
    return places


def read_region(file: io.FileIO, place: Place, region: tuple[slice, ...]) -> Tensor:
    """A slice of a tensor, in memory of its own.

    Args:
        file: opened without a buffer.
        place: of the tensor.
        region: one slice a dim, without steps.

    Raises:
        OSError: the file ends early, or holds a type that torch does not have.
    """
    if place.dtype not in _DTYPES:
        raise OSError(f"its type {place.dtype} is not known")
    dtype, shape, start = _DTYPES[place.dtype], place.shape, place.start
    ends = [side.indices(size)[:2] for side, size in zip(region, shape, strict=True)]
    sizes = [max(0, last - first) for first, last in ends]
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    inner = place.stop - place.start  # bytes of one row of what is left of the shape
    while shape:  # what is one row wide is only a place to start from
        inner //= shape[0]
        if sizes[len(sizes) - len(shape)] > 1:
            break
        start += ends[len(sizes) - len(shape)][0] * inner
        shape = shape[1:]
    if not shape:
        return _read(file, start, dtype.itemsize, dtype).reshape(sizes)
    first, last = ends[-len(shape)]
    if sizes[-len(shape) + 1 :] == list(shape[1:]) or len(shape) == 1:
        return _read(file, start + first * inner, (last - first) * inner, dtype).reshape(sizes)
    result = torch.empty(sizes[-len(shape) :], dtype=dtype)
    inside = tuple(slice(*end) for end in ends[-len(shape) + 1 :])
    rows = max(1, _CHUNK // inner)
    for row in range(first, last, rows):
        count = min(rows, last - row)
        part = _read(file, start + row * inner, count * inner, dtype).reshape(count, *shape[1:])
        result[row - first : row - first + count] = part[(slice(None), *inside)]
    return result.reshape(sizes)


def _read(file: io.FileIO, start: int, length: int, dtype: torch.dtype) -> Tensor:
    buffer = bytearray(length)
    file.seek(start)
    rest = memoryview(buffer)
    while rest:  # the system gives 2 GiB at most
        count = file.readinto(rest)
        if not count:
            raise OSError(f"it ends {len(rest)} bytes early")
        rest = rest[count:]
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)
