"""Whether all processes see the same output folder, found out before any work is done."""

import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path

from moe_builders.errors import InputError
from moe_builders.parallel.world import World

_PAUSE = 0.2  # seconds between two looks


def check_shared_folder(path: str | Path, world: World, *, patience: float = 60.0) -> None:
    """Refuse an output folder that is not the same one for all processes; all must call.

    Every process writes a part of it. The first process leaves a small file in it (or in the
    nearest folder above it that is there) and the others look for it; then it is removed. Its name
    and content are new each time, so a file that an earlier run has left is never taken for it.

    Args:
        path: of the folder, which need not be there yet.
        world: the processes.
        patience: seconds after which a process stops looking: a network's file system may show a
            new file late.

    Raises:
        InputError: on every process, if any does not see the file.
    """
    if world.size == 1:
        return
    token = world.gather_objects(uuid.uuid4().hex)[0]
    name, problem, left = f".moe_builders_{token}", None, _nearest(path)
    try:
        try:
            if world.is_first:
                (left / name).write_text(token)
        except OSError as error:
            problem = error.strerror
        problem = world.gather_objects(problem)[0]  # also: from here on the file is there
        if problem is not None:
            raise InputError(
                f"output_dir {path} cannot be written ({problem}): choose a folder that you may "
                "write to"
            )
        found = world.gather_objects((_appears(path, name, token, patience), platform.node()))
    finally:
        if world.is_first:
            with suppress(OSError):
                (left / name).unlink()
    for rank, (seen, machine) in enumerate(found):
        if not seen:
            raise InputError(
                f"output_dir {path} is another folder for process {rank} (on {machine}) than for "
                f"process 0 (on {found[0][1]}): choose one on a file system that all machines share"
            )


def _appears(path: str | Path, name: str, token: str, patience: float) -> bool:
    until = time.monotonic() + patience
    while True:
        try:
            if (_nearest(path) / name).read_text() == token:
                return True
        except OSError:
            pass  # not there, or not yet
        if time.monotonic() >= until:
            return False
        time.sleep(_PAUSE)


def _nearest(path: str | Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = Path(path).absolute()
    return next(part for part in (path, *path.parents) if part.exists())
