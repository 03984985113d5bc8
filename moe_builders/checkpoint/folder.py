"""A folder of safetensors files: what is in it and a slice of one tensor; where one may be made."""

import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moe_builders.checkpoint.safetensors_file import Place, read_header, read_region
from moe_builders.errors import InputError, lfs_pointer
from moe_builders.instantiate import first_line

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is; dtype by safetensors' own name ("BF16")."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Tensors by name, of which slices can be read."""

    path: Path
    has_index: bool
    entries: dict[str, Entry]

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """The given region of a tensor."""
        ...


class TensorFolder:
    """The tensors of a folder by name; nothing is read until asked for.

    Args:
        path: a folder with ``model.safetensors`` or with shards and their index.

    Raises:
        InputError: no such folder, no safetensors in it, a listed file missing, truncated or
            corrupted, a tensor in two files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.has_index = (self.path / INDEX_NAME).is_file()
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, Place] = {}
        for file in self._files():
            places = read_header(self.path / file)
            self._places |= places
            for name, place in places.items():
                if name in self.entries:  # which of them is meant, nothing says
                    raise InputError(
                        f"{self.path} holds {name} twice, in {self.entries[name].file} and in "
                        f"{file}: download the folder again"
                    )
                self.entries[name] = Entry(file, place.dtype, place.shape)

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """The given region of a tensor; only its bytes are read, into memory of its own."""
        path = self.path / self.entries[name].file
        try:
            with io.FileIO(str(path)) as file:
                return read_region(file, self._places[name], region)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}") from error

    def _files(self) -> list[str]:
        if self.has_index:
            return self._indexed_files(self.path / INDEX_NAME)
        if (self.path / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        hint = (
            "is not a folder"
            if not self.path.is_dir()
            else (f"holds neither {SINGLE_NAME} nor {INDEX_NAME}")
        )
        if any(self.path.glob("*.bin")):
            hint += " (only pickled .bin weights, which are not read: convert them to safetensors)"
        raise InputError(f"{self.path} {hint}")

    def _indexed_files(self, path: Path) -> list[str]:
        try:
            files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            outside = [name for name in files if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                lfs_pointer(path)
                or f"{path} is not an index of safetensors files ({first_line(error)}): download "
                "it again"
            ) from error
        if SINGLE_NAME not in files and (self.path / SINGLE_NAME).is_file():
            raise InputError(
                f"{self.path} holds both {SINGLE_NAME} and {INDEX_NAME}, two models: remove one"
            )
        if outside:
            raise InputError(f"{path} names files outside its folder: {', '.join(outside)}")
        missing = [name for name in files if not (self.path / name).is_file()]
        if missing or not files:
            raise InputError(
                f"{path} names files that are not there: "
                f"{', '.join(missing) or 'none at all'}; download the folder again"
            )
        return files


def check_output_folder(path: str | Path) -> None:
    """Refuse an output path that is a file, or lies below one, before any work is done."""
    path = Path(path).absolute()
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise InputError(
                    f"{part} is a file, but a folder is to be written at {path}: "
                    "choose another output path"
                )
            return


def check_writable(path: str | Path) -> None:
    """Refuse an output folder that cannot be made or written into, before any work is done.

    A folder is made there (or in the nearest that exists) and removed again: permissions alone do
    not tell, as on a read-only disk.
    """
    path = Path(path).absolute()
    nearest = next(part for part in (path, *path.parents) if part.exists())
    try:
        tempfile.TemporaryDirectory(dir=nearest, prefix=".moe_builders_").cleanup()
    except OSError as error:
        raise InputError(
            f"output_dir {path} cannot be written ({error.strerror}): choose a folder that you "
            "may write to"
        ) from error
