"""One checkpoint on its way to the disk: written aside by all processes, then given its name.

What is done here is done by the main thread, or while training goes on by a thread of its own; the
processes agree over a ``Channel`` that only this thread uses meanwhile.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from moe_builders.checkpoint.folder import check_output_folder
from moe_builders.checkpoint.manifest import FACTS, RECORD, FileSums, named, sealed, survey
from moe_builders.errors import InputError
from moe_builders.instantiate import first_line
from moe_builders.parallel.channel import Channel
from moe_builders.parallel.dcp import write_tensors_together


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of, as it was when it was asked for.

    Attributes:
        step: optimizer steps done.
        tensors: see ``write_tensors_together``; nobody changes them until all is written.
        facts: JSON as text, the same on every process; likewise the others.
        rank_facts: this process's own.
        record: long.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: str
    rank_facts: str
    record: str


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: of the run's checkpoints; made when the first is written.
        keep_last: older ones are removed when a new one is complete; None: never.
    """

    def __init__(self, folder: Path, *, keep_last: int | None) -> None:
        self.folder, self.keep_last = folder, keep_last
        self.notes: list[str] = []  # sentences on what could not be tidied up

    def write(self, contents: Contents, channel: Channel) -> None:
        """Every process calls, on the thread whose channel it is.

        Raises:
            InputError: a process could not write; on every process. What was complete stays.
        """
        target = named(self.folder, contents.step)
        partial = self.folder / f".{target.name}.partial"
        sums = FileSums()

        def write_own() -> None:
            with sums.create(partial / rank_file(channel.rank)) as file:
                _write_text(file, contents.rank_facts)

        try:
            _on_first(channel, lambda: self._begin(partial))
            write_tensors_together(
                contents.tensors, partial, create=sums.create, group=channel.group
            )
            _on_all(channel, write_own)
            files = channel.gather_objects(sums.files)
            _on_first(channel, lambda: self._publish(partial, target, contents, files))
        except InputError as error:
            if channel.is_first:  # makes room on a full disk
                shutil.rmtree(partial, ignore_errors=True)
            last = channel.gather_objects(self._last() if channel.is_first else None)[0]
            raise InputError(
                f"the checkpoint {target} cannot be written: {error}; {last}: make room or mend "
                "the folder, then launch the same command again"
            ) from error
        if channel.is_first:
            self._prune()

    def _last(self) -> str:
        whole = (folder for folder, problem in survey(self.folder) if problem is None)
        newest = next(whole, None)
        return "there is no earlier one" if newest is None else f"{newest} is the last"

    def _begin(self, partial: Path) -> None:
        check_output_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*"):  # of a run that was killed
            self._remove(leftover)
        partial.mkdir()

    def _publish(
        self, partial: Path, target: Path, contents: Contents, files: list[dict[str, Any]]
    ) -> None:
        sums = FileSums()
        with sums.create(partial / RECORD) as file:
            _write_text(file, contents.record)
        entries = {name: e for part in (*files, sums.files) for name, e in part.items()}
        text = sealed(contents.step, dict(sorted(entries.items())), json.loads(contents.facts))
        with sums.create(partial / FACTS) as file:
            _write_text(file, text)
        _flush_folder(partial)
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        _flush_folder(self.folder)
        if replaced.exists():
            self._remove(replaced)

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        complete = [folder for folder, problem in survey(self.folder) if problem is None]
        for folder in complete[self.keep_last :]:
            doomed = folder.with_name(f".{folder.name}.removed")
            try:
                os.replace(folder, doomed)  # first the name: half a folder must not look whole
            except OSError as error:
                self._note(folder, error)
            else:
                self._remove(doomed)

    def _remove(self, folder: Path) -> None:
        """Delete; what cannot be deleted is no reason to end a healthy run."""
        try:
            shutil.rmtree(folder)
        except OSError as error:
            self._note(folder, error)

    def _note(self, folder: Path, error: OSError) -> None:
        note = f"{folder} cannot be removed: {first_line(error)}"
        if note not in self.notes:
            self.notes.append(note)


class Background:
    """An act on a thread of its own, which a process that ends does not wait for by itself."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(act,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # whoever joins gets it, whatever it is
            self._error = error

    def join(self) -> BaseException | None:
        """Wait until it is done; gives what the act raised."""
        self._thread.join()
        return self._error


def rank_file(rank: int) -> str:
    """The name of what process ``rank`` wrote for itself."""
    return f"rank_{rank}.json"


def _on_first(channel: Channel, act: Callable[[], object]) -> None:
    _on_all(channel, act if channel.is_first else lambda: None)


def _on_all(channel: Channel, act: Callable[[], object]) -> None:
    """Act; if that fails on one process, all of them raise its reason."""
    problem = None
    try:
        act()
    except (OSError, InputError) as error:
        problem = InputError(first_line(error))
    channel.raise_together(problem)


def _write_text(file: Any, text: str) -> None:
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what has no such thing says so
            raise
    finally:
        os.close(handle)
