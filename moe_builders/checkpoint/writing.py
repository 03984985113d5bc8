"""Writing a folder of safetensors files: dealt out to the processes, shown when it is complete."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_builders.checkpoint.folder import INDEX_NAME, SINGLE_NAME, check_output_folder
from moe_builders.checkpoint.safetensors_file import read_header
from moe_builders.errors import InputError
from moe_builders.instantiate import first_line

MAX_FILE_BYTES = 5_000_000_000  # while it is written, all of a file is in its writer's memory
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_PT = {"format": "pt"}  # what transformers asks for


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
    tensors_of: Callable[[Sequence[list[str]]], dict[str, Tensor]],
    *,
    with_index: bool,
    rank: int = 0,
    size: int = 1,
    agree: Callable[[InputError | None], None] = raise_alone,
) -> None:
    """Write safetensors files, as many at a time as there are processes, one each.

    A process has its own file's tensors in memory and no other's. With more than one process all
    must call, and they must see the same folder.

    Args:
        folder: an existing folder.
        names_by_file: which tensors go into which file.
        tensors_of: given the tensors of each process's file (none: it has none), gives this
            process's; called on every process, as it may be collective.
        with_index: also write the index.
        rank: this process, 0 … size-1.
        size: number of processes that write.
        agree: called after each round with what went wrong here, to raise it (``raise_alone``, or
            ``raise_together`` where other processes would wait for this one).

    Raises:
        InputError: a file cannot be written, ``tensors_of`` raised one on any process, or the
            first process does not see what another has written.
    """
    files = list(names_by_file)
    for start in range(0, len(files), size):
        dealt = files[start : start + size]
        names = [names_by_file[file] for file in dealt] + [[]] * (size - len(dealt))
        error, tensors = None, {}  # the last file's are gone before these are asked for
        try:
            tensors = tensors_of(names)
            if rank < len(dealt):
                _write_file(folder / dealt[rank], tensors)
        except InputError as problem:
            error = problem
        agree(error)
    agree(_failure(folder, lambda: _finish(folder, names_by_file, size, with_index), rank))


@contextmanager
def publish(
    path: str | Path,
    *,
    rank: int = 0,
    agree: Callable[[InputError | None], None] = raise_alone,
) -> Iterator[Path]:
    """Write a model folder aside, move it to its name when complete; an older one is replaced then.

    Args:
        path: the folder's name.
        rank: this process; process 0 makes the folder and moves it.
        agree: see ``write_tensors``; with ``raise_together`` all processes must call.

    Yields:
        The folder to write into.

    Raises:
        InputError: the path is a file, or a folder that holds things but no model, or cannot be
            written.
    """
    path = Path(path).resolve()  # beside the folder itself, not beside a link to it
    aside, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")

    def check() -> None:
        check_output_folder(path)
        if path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors")):
            raise InputError(
                f"{path} would be replaced, but holds other files and no model: "
                "choose another output path"
            )

    def begin() -> None:
        check()
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

    agree(_failure(path, begin, rank))
    try:
        problem = None
        try:
            yield aside
        except OSError as error:  # of what the caller wrote itself
            problem = InputError(f"{path} cannot be written: {first_line(error)}")
        agree(problem)
    except BaseException:
        if rank == 0:  # after ``agree`` nobody else is at work in it
            shutil.rmtree(aside, ignore_errors=True)
        raise
    agree(_failure(path, move, rank))


def copy_other_files(origin: Path, folder: Path) -> None:
    """Copy what is neither weights nor hidden: configuration, tokenizer, licence."""
    for file in sorted(origin.iterdir()):
        skipped = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not skipped and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, _PT)
        # safetensors makes files that their owner alone may read; others may what the folder says
        path.chmod(path.parent.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {first_line(error)}") from error


def _finish(
    folder: Path, names_by_file: Mapping[str, list[str]], size: int, with_index: bool
) -> None:
    """Look at all files as the first process sees them, and write the index."""
    total = 0
    for number, file in enumerate(names_by_file):
        if not (folder / file).is_file():
            raise InputError(
                f"{folder / file} was written by process {number % size}, but is not there for "
                "process 0: choose an output folder on a file system that all processes share"
            )
        total += sum(place.stop - place.start for place in read_header(folder / file).values())
    if with_index:
        weight_map = {name: file for file, names in names_by_file.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _failure(path: Path, act: Callable[[], object], rank: int) -> InputError | None:
    """Act on the first process; what went wrong, as a sentence."""
    try:
        if rank == 0:
            act()
    except InputError as error:
        return error
    except OSError as error:
        return InputError(f"{path} cannot be written: {first_line(error)}")
    return None
