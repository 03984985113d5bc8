"""Tiny random Qwen3-MoE folders as transformers writes them; tensors of such folders."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers_parity import all_cases, load_reference, write_folder
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TINY = all_cases()["qwen3_moe"].tiny


def write_hf_folder(path: Path, *, seed: int = 0, shard_size: str = "5GB", **fields: Any) -> Path:
    """A folder as transformers writes it; ``fields`` change the case's, ``dtype`` the storage."""
    return write_folder(all_cases()["qwen3_moe"], path, seed=seed, shard_size=shard_size, **fields)


def load_hf(path: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The reference: eager attention, eager experts; every key of the folder used, none missing."""
    return load_reference(all_cases()["qwen3_moe"], path, dtype=dtype)


def read_tensors(files: Iterable[Path]) -> dict[str, tuple[str, Tensor]]:
    """Every tensor of some safetensors files: name -> (file name, tensor)."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found[name] = (path.name, file.get_tensor(name))
    return found


def rewrite(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, (_, tensor) in read_tensors([path]).items()}
    tensors |= changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


def assert_equal_tensors(first: Path, second: Path) -> None:
    """Same names in the same files, same dtypes, same bits."""
    expected, found = (read_tensors(p.glob("*.safetensors")) for p in (first, second))
    assert found.keys() == expected.keys()
    for name, (file, tensor) in expected.items():
        assert found[name][0] == file, name
        assert found[name][1].dtype == tensor.dtype, name
        assert torch.equal(found[name][1], tensor), name
