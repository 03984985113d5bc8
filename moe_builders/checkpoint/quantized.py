"""A quantised folder that looks like a bf16 one: its weights are dequantised as they are read.

* FP8 in blocks: ``X`` of type F8_E4M3 and ``X_scale_inv``, which multiplies despite its name; its
  last blocks may be partial. DeepSeek-V3, Kimi-K2, MiniMax-M2, Qwen3-FP8.
* MXFP4: ``X_blocks`` [e, out, in / 32, 16] and ``X_scales`` [e, out, in / 32] are ``X`` [e, in,
  out], which is how the bf16 release has it. gpt-oss.

Letters: e experts · in, out a matrix's sides, which are transposed in MXFP4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_builders.checkpoint.folder import Entry, TensorFolder, TensorSource
from moe_builders.errors import InputError
from moe_builders.ops.dequantize import (
    MXFP4_BLOCK,
    MXFP4_BYTES,
    dequantize_blocks,
    dequantize_mxfp4,
)

_REMEDY = "get the bf16 release, or convert the folder to bf16"
_ANY: Any = object()
# Values that are honoured of each field, by method; the first is what leaving it out means. Which
# modules are not quantised, and what scales are, the tensors say themselves.
_FIELDS: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": _ANY, "weight_block_size": _ANY, "modules_to_not_convert": _ANY,
        "ignored_layers": _ANY, "modules_to_convert": _ANY, "scale_fmt": _ANY, "dequantize": _ANY,
        "fmt": ("e4m3", "float8_e4m3fn"), "activation_scheme": ("dynamic",),
        "expert_dtype": ("fp8",),
    },
    "mxfp4": {"quant_method": _ANY, "modules_to_not_convert": _ANY, "dequantize": _ANY},
}  # fmt: skip
_SCALE_TYPES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
_CHUNK = 2**22  # values that are in fp32 at once


@dataclass(frozen=True)
class _Packed:
    """Two tensors on disk that are one weight; ``block``: of FP8, None of MXFP4."""

    values: str
    scales: str
    block: tuple[int, int] | None


class DequantizedFolder:
    """The tensors of a quantised folder as bf16; those that are not quantised as they are.

    Args:
        folder: what is on disk.
        quantization: config.json's ``quantization_config``.

    Raises:
        InputError: a method or field that is not honoured, a weight without its scale, a scale
            without its weight, or of another shape than the weight's.
    """

    def __init__(self, folder: TensorFolder, quantization: Mapping[str, Any]) -> None:
        self.path, self.has_index = folder.path, folder.has_index
        self._folder = folder
        try:
            block = _check_fields(quantization)
        except InputError as error:
            raise InputError(f"{folder.path}/config.json: {error}") from error
        try:
            found = _find_fp8(folder.entries, block) if block else _find_mxfp4(folder.entries)
        except InputError as error:
            raise InputError(f"{folder.path}: {error}") from error
        self.entries, self._packed = found
        if not self._packed:
            raise InputError(
                f"{folder.path} holds no quantised tensor, but config.json has a "
                f"quantization_config (quant_method={quantization['quant_method']!r}): take it out"
            )

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """The given region of a tensor; only the blocks that it touches are read."""
        if name not in self._packed:
            return self._folder.read(name, region)
        packed = self._packed[name]
        shape = self.entries[name].shape
        region = tuple(slice(*s.indices(n)[:2]) for s, n in zip(region, shape, strict=True))
        if packed.block is None:
            return self._read_mxfp4(packed, region)
        return self._read_fp8(packed, region, packed.block)

    def _read_fp8(
        self, packed: _Packed, region: tuple[slice, ...], block: tuple[int, int]
    ) -> Tensor:
        sides = tuple(zip(region[-2:], block, strict=True))
        touched = tuple(slice(s.start // size, ceil(s.stop / size)) for s, size in sides)
        values = self._folder.read(packed.values, region)
        scales = self._folder.read(packed.scales, (*region[:-2], *touched))
        first, second = (s.start % size for s, size in sides)
        return dequantize_blocks(values, scales, block=block, skipped=(first, second))

    def _read_mxfp4(self, packed: _Packed, region: tuple[slice, ...]) -> Tensor:
        experts, inner, outer = region
        touched = slice(inner.start // MXFP4_BLOCK, ceil(inner.stop / MXFP4_BLOCK))
        where = (experts, outer, touched)
        blocks = self._folder.read(packed.values, (*where, slice(0, MXFP4_BYTES)))
        scales = self._folder.read(packed.scales, where)
        skipped = inner.start - touched.start * MXFP4_BLOCK
        kept = slice(skipped, skipped + inner.stop - inner.start)
        sizes = [max(0, s.stop - s.start) for s in region]
        result = torch.empty(sizes, dtype=torch.bfloat16)  # [e, in, out]
        rows = max(1, _CHUNK // (MXFP4_BLOCK * max(1, scales.shape[-1])))
        for expert in range(sizes[0]):
            for first in range(0, sizes[2], rows):
                part = slice(first, first + rows)
                values = dequantize_mxfp4(blocks[expert, part], scales[expert, part])
                result[expert, :, part] = values[:, kept].T
        return result


def open_tensors(path: str | Path, config: Mapping[str, Any]) -> TensorSource:
    """The tensors of a folder as they can be trained: quantised ones as bf16.

    Args:
        path: folder.
        config: its config.json.

    Raises:
        InputError: see ``TensorFolder`` and ``DequantizedFolder``; or tensors are quantised and
            config.json does not say how.
    """
    folder = TensorFolder(path)
    quantization = config.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict):
            raise InputError(
                f"{path}/config.json: quantization_config is {quantization!r}, but must be a "
                "mapping or left out: download config.json again"
            )
        return DequantizedFolder(folder, quantization)
    marked = [
        f"{name} of type {entry.dtype}"
        for name, entry in folder.entries.items()
        if entry.dtype.startswith("F8_")
        or name.endswith("_scale_inv")
        or (name.endswith("_blocks") and entry.dtype == "U8")
    ]
    if marked:
        raise InputError(
            f"{path} holds quantised tensors ({_first(marked)}), but config.json has no "
            "quantization_config that says how: download config.json again"
        )
    return folder


def _check_fields(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size of FP8; None: MXFP4."""
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _FIELDS:
        raise InputError(
            f"quantization_config.quant_method is {method!r}, but only "
            f"{' and '.join(map(repr, _FIELDS))} can be dequantised: {_REMEDY}"
        )
    known = _FIELDS[method]
    refused = [
        f"{name}={value!r}" + (f" (only {known[name][0]!r})" if name in known else "")
        for name, value in quantization.items()
        if name not in known or (known[name] is not _ANY and value not in known[name])
    ]
    block: Any = quantization.get("weight_block_size", (128, 128))
    whole = isinstance(block, list | tuple) and len(block) == 2
    if not whole or not all(type(size) is int and size > 0 for size in block):
        refused.append(f"weight_block_size={block!r} (only two whole numbers above 0)")
    if refused:
        raise InputError(
            f"quantization_config of method {method!r} holds what is not supported: "
            f"{', '.join(refused)}; {_REMEDY}"
        )
    return (block[0], block[1]) if method == "fp8" else None


def _find_fp8(
    entries: Mapping[str, Entry], block: tuple[int, int]
) -> tuple[dict[str, Entry], dict[str, _Packed]]:
    seen, packed, wrong = dict(entries), {}, []
    for scales in [name for name in entries if name.endswith("_scale_inv")]:
        name = scales.removesuffix("_scale_inv")
        entry, grid = entries.get(name), seen.pop(scales)
        if entry is None or entry.dtype != "F8_E4M3":
            found = "is not there" if entry is None else f"is {entry.dtype}"
            wrong.append(f"{scales} is the scale of an F8_E4M3 weight, but {name} {found}")
            continue
        sides = zip(entry.shape[-2:], block, strict=False)
        shape = (*entry.shape[:-2], *(ceil(side / size) for side, size in sides))
        if grid.shape != shape or len(shape) < 2 or grid.dtype not in _SCALE_TYPES:
            wrong.append(
                f"{scales} is {grid.dtype} {list(grid.shape)}, but must be {list(shape)} of "
                f"{', '.join(_SCALE_TYPES)} for {name} {list(entry.shape)} in blocks of "
                f"{list(block)}"
            )
        seen[name] = Entry(entry.file, "BF16", entry.shape)
        packed[name] = _Packed(name, scales, block)
    wrong += [
        f"{name} is {entry.dtype}, " + (
            f"but its scale {name}_scale_inv is not there" if entry.dtype == "F8_E4M3"
            else "but weights must be F8_E4M3"
        )
        for name, entry in seen.items() if entry.dtype.startswith("F8_")
    ]  # fmt: skip
    _refuse(wrong)
    return seen, packed


def _find_mxfp4(
    entries: Mapping[str, Entry],
) -> tuple[dict[str, Entry], dict[str, _Packed]]:
    seen, packed, wrong = {}, {}, []
    for name, entry in entries.items():
        stem, mark, kind = name.rpartition("_")
        if entry.dtype != "U8" or not mark or kind not in ("blocks", "scales"):
            seen[name] = entry
            continue
        values, scales = f"{stem}_blocks", f"{stem}_scales"
        other = scales if kind == "blocks" else values
        if other not in entries:
            wrong.append(f"{name} goes with {other}, which is not there")
        elif stem in entries:
            wrong.append(f"{stem} is there twice, as itself and as {values}")
        elif kind == "blocks":
            shape, grid = entry.shape, entries[scales]
            if len(shape) != 4 or shape[3] != MXFP4_BYTES:
                wrong.append(f"{values} is {list(shape)}, but must be [e, out, in / 32, 16]")
                continue
            if (grid.dtype, grid.shape) != ("U8", shape[:3]):
                wrong.append(
                    f"{scales} is {grid.dtype} {list(grid.shape)}, but must be U8 "
                    f"{list(shape[:3])} for {values} {list(shape)}"
                )
            seen[stem] = Entry(entry.file, "BF16", (shape[0], shape[2] * MXFP4_BLOCK, shape[1]))
            packed[stem] = _Packed(values, scales, None)
    _refuse(wrong)
    return seen, packed


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise InputError(f"{_first(wrong)}: download the folder again, or {_REMEDY}")


def _first(found: list[str]) -> str:
    return found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else "")
