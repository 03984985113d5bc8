"""A folder of safetensors files: what is in it, a slice of one tensor, and writing a new one."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_builders.checkpoint.safetensors_file import Place, read_header, read_region
from moe_builders.errors import InputError, lfs_pointer
from moe_builders.instantiate import first_line

INDEX_NAME = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000  # while it is written, all of a file is in memory
SINGLE_NAME = "model.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_PT = {"format": "pt"}  # what transformers asks for


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


def split_into_files(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File names as transformers has them, and the tensors of each in order.

    Args:
        sizes: bytes of each tensor.
        max_bytes: of a file, unless a single tensor has more; what fits is one file.
    """
    files: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    if len(files) == 1:
        return {SINGLE_NAME: files[0]}
    total = len(files)
    return {f"model-{n:05d}-of-{total:05d}.safetensors": found for n, found in enumerate(files, 1)}


def raise_alone(error: InputError | None) -> None:
    """Raise the error, if there is one."""
    if error is not None:
        raise error


def write_tensors(
    folder: Path,
    names_by_file: Mapping[str, list[str]],
    tensors_of: Callable[[list[str]], dict[str, Tensor]],
    *,
    with_index: bool,
    write: bool,
    agree: Callable[[InputError | None], None] = raise_alone,
) -> None:
    """Write safetensors files one at a time, so that one file's tensors are in memory at most.

    Args:
        folder: an existing folder.
        names_by_file: which tensors go into which file.
        tensors_of: gives a file's tensors; called on every process, as it may be collective.
        with_index: also write the index.
        write: False on processes that only take part in ``tensors_of``.
        agree: called after each file with what went wrong here, to raise it (``raise_alone``, or
            ``raise_together`` where other processes would wait for this one).

    Raises:
        InputError: a file cannot be written, or ``tensors_of`` raised one on any process.
    """
    total = 0
    for file, names in names_by_file.items():
        error, tensors = None, {}
        try:
            tensors = tensors_of(names)
        except InputError as problem:  # a file that only the writing process reads
            error = problem
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        save = partial(save_file, tensors, folder / file, _PT)
        agree(error or _failure(folder / file, write, save))
        del tensors, save  # or the next file's would stand beside them in memory
    if with_index:
        weight_map = {name: file for file, names in names_by_file.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = folder / INDEX_NAME
        agree(_failure(path, write, lambda: path.write_text(json.dumps(index, indent=2) + "\n")))


def _failure(path: Path, write: bool, act: Callable[[], object]) -> InputError | None:
    """Act where this process writes; what went wrong, as a sentence."""
    try:
        if write:
            act()
    except (OSError, SafetensorError) as error:
        return InputError(f"{path} cannot be written: {first_line(error)}")
    return None


@contextmanager
def publish(
    path: str | Path,
    *,
    write: bool = True,
    agree: Callable[[InputError | None], None] = raise_alone,
) -> Iterator[Path]:
    """Write a model folder aside, move it to its name when complete; an older one is replaced then.

    Args:
        path: the folder's name.
        write: False on processes that write nothing.
        agree: see ``write_tensors``; with ``raise_together`` all processes must call.

    Yields:
        The folder to write into (with ``write`` False: a path that must not be touched).

    Raises:
        InputError: the path is a file, or a folder that holds things but no model, or cannot be
            written.
    """
    path = Path(path).resolve()  # beside the folder itself, not beside a link to it
    check_output_folder(path)
    if path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors")):
        raise InputError(
            f"{path} would be replaced, but holds other files and no model: "
            "choose another output path"
        )
    aside, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")

    def begin() -> None:
        if old.exists() and not path.exists():
            os.replace(old, path)  # stopped between the two moves below: old is all there is
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)

    def move() -> None:
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old, ignore_errors=True)

    agree(_failure(path, write, begin))
    problem = None
    try:
        yield aside
    except OSError as error:  # of what the caller wrote itself
        problem = InputError(f"{path} cannot be written: {first_line(error)}")
    except BaseException:
        if write:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if problem is not None:
        shutil.rmtree(aside, ignore_errors=True)
    agree(problem)
    agree(_failure(path, write, move))


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


def copy_other_files(origin: Path, folder: Path) -> None:
    """Copy what is neither weights nor hidden: configuration, tokenizer, licence."""
    for file in sorted(origin.iterdir()):
        skipped = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not skipped and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)
