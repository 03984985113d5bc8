"""Tensors of all processes into one folder and back: torch's distributed checkpoint (DCP).

DCP pickles its table of contents; it is read here through a list of the classes such a table is
made of, and everything else in it is refused. The tensors themselves are read with weights_only.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from moe_builders.errors import InputError
from moe_builders.instantiate import first_line

_TABLE = ".metadata"
_TABLE_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items()
                        if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this process's shards in the host's memory, sharded as the tensors are.

    Returns when the values have arrived: whoever owns the tensors may change them then.
    """
    return {name: _on_host(tensor.detach()) for name, tensor in tensors.items()}


def write_tensors_together(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    create: Callable[[Path], AbstractContextManager[Any]],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write tensors, sharded ones by all processes at once; every process must call.

    What is in the files depends on the tensors and on how they are sharded, on nothing else.

    Args:
        tensors: by name; a plain tensor under the same name on several processes is written once.
        folder: an existing, empty folder that all processes see.
        create: opens a new file, which is written from start to end; one may be renamed from
            ``x.tmp`` to ``x`` afterwards.
        group: over which the processes agree; None: the world's. A thread of its own needs a gloo
            group of its own.

    Raises:
        InputError: one process could not write; on every process, with that one's reason.
    """
    writer = _Writer(folder)
    writer.fs = _Files(create)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise _explained(error) from error


def read_tensors_together(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors in place from a folder; every process must call.

    Args:
        tensors: by name, of the shapes and dtypes that ``stored_tensors`` tells.
        folder: what ``write_tensors_together`` wrote, by any number of processes.

    Raises:
        InputError: a file is damaged; on every process.
    """
    try:
        dcp.load(dict(tensors), storage_reader=_Reader(folder))
    except CheckpointException as error:
        problem = _explained(error)
        raise InputError(f"the checkpoint {folder} cannot be read: {problem}") from error


def stored_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of every tensor in a folder, by name.

    Raises:
        InputError: the table of contents is missing, damaged or holds what it must not.
    """
    found = {}
    for name, entry in _read_table(folder / _TABLE).state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise InputError(f"{folder / _TABLE} holds {name}, which is not a tensor")
        found[name] = (tuple(entry.size), entry.properties.dtype)
    return found


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which tells what went wrong first: torch.save's own error hides a full disk."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise RuntimeError(first_line(_root(error))) from None

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # DCP's own names the folder and a random id


class _Files(FileSystem):
    """DCP's files, those that are written opened by a function."""

    def __init__(self, create: Callable[[Path], AbstractContextManager[Any]]) -> None:
        self.create = create

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with self.create(Path(path)) as file:
            yield file


class _Reader(dcp.FileSystemReader):
    """DCP's reader without its free unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_table(Path(self.path) / _TABLE)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _on_host(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    # around ``from_local``, which would move it back to the mesh's device
    names, context = tensor.__tensor_flatten__()
    inner: dict[str, Any] = {name: getattr(tensor, name) for name in names}
    for name, part in inner.items():
        if isinstance(part, Tensor):  # a mesh stays as it is
            inner[name] = part.to("cpu", copy=True)
    return DTensor.__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _TABLE_CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _read_table(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            table = _TableUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(
            f"{path} is not a checkpoint's table of contents: {first_line(error)}"
        ) from error
    if not isinstance(table, Metadata):
        raise InputError(f"{path} is not a checkpoint's table of contents")
    return table


def _explained(error: CheckpointException) -> InputError:
    """The first process's reason as a sentence; the others' are mostly its consequences."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, KeyboardInterrupt):  # DCP catches that too
        raise cause
    where = f"process {rank}: " if rank else ""
    return InputError(f"{where}{first_line(_root(cause))}")


def _root(error: BaseException) -> BaseException:
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error
