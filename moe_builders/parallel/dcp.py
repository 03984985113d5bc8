"""Tensors of all processes into one folder and back: torch's distributed checkpoint (DCP).

DCP pickles its table of contents; it is read here through a list of the classes such a table is
made of, and everything else in it is refused. The tensors themselves are read with weights_only.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

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


def write_tensors_together(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors, sharded ones by all processes at once; every process must call.

    Args:
        tensors: by name; a plain tensor under the same name on several processes is written once.
        folder: an existing, empty folder that all processes see.

    Raises:
        InputError: one process could not write; on every process, with that one's reason.
    """
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(folder))
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


class _Reader(dcp.FileSystemReader):
    """DCP's reader without its free unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_table(Path(self.path) / _TABLE)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
