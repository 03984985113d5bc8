"""Checkpoints of a run: one folder a step, complete as soon as it has its name.

    checkpoints/step_00000020/   run.json       where the run stood, and the size of every file
                                 record.json    what it has shown so far
                                 rank_0.json …  what differs by process (random streams)
                                 *.distcp       weights and optimizer state (DCP)

A folder is written as ``.step_00000020.partial``, flushed to the disk and renamed at the end, so
that whatever has the name is whole; nothing that is being written or removed ever has it.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_builders.checkpoint.folder import check_output_folder
from moe_builders.errors import InputError
from moe_builders.instantiate import first_line
from moe_builders.parallel.dcp import read_tensors_together, write_tensors_together
from moe_builders.parallel.sharding import raise_together
from moe_builders.parallel.world import World

_NAME = re.compile(r"step_(\d+)")
_FACTS, _RECORD = "run.json", "record.json"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: where it lies.
        step: optimizer steps done.
        facts: what was given to ``RunCheckpoints.save``, the same for all processes.
    """

    folder: Path
    step: int
    facts: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """What was given as the record; long, so it is read when it is asked for."""
        return json.loads((self.folder / _RECORD).read_text())

    def rank_facts(self, rank: int) -> dict[str, Any]:
        """What process ``rank`` gave; {} if there was no such process."""
        path = self.folder / _rank_file(rank)
        return json.loads(path.read_text()) if path.is_file() else {}

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place; every process calls."""
        read_tensors_together(tensors, self.folder)


class RunCheckpoints:
    """The checkpoints of one run.

    Args:
        folder: made when the first is saved.
        world: all processes call ``save`` and ``newest`` together.
        keep_last: older ones are removed when a new one is complete; None: never.
    """

    def __init__(self, folder: str | Path, *, world: World, keep_last: int | None) -> None:
        self.folder, self.world, self.keep_last = Path(folder), world, keep_last
        self.notes: list[str] = []  # sentences on what could not be tidied up
        self._trusted: set[Path] = set()  # written, or gone on from, by this run

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        rank_facts: Mapping[str, Any],
        record: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint; one of that step that this run has written is left as it is.

        Any other folder of that name (damaged, or of a run that took another way) is replaced
        when the new one is complete.

        Args:
            step: optimizer steps done.
            tensors: see ``write_tensors_together``.
            facts: JSON, the same on every process.
            rank_facts: JSON, this process's own.
            record: JSON, the same on every process, and long.

        Raises:
            InputError: a process could not write; on every process. What was complete stays.
        """
        target = self._named(step)
        if target in self._trusted:
            return target
        partial = self.folder / f".{target.name}.partial"
        try:
            self._on_first(lambda: self._begin(partial))
            write_tensors_together(tensors, partial)
            self._on_all(lambda: _write_json(partial / self._rank_file, rank_facts))
            self._on_first(lambda: self._publish(partial, target, step, facts, record or {}))
        except InputError as error:
            if self.world.is_first:  # makes room on a full disk
                shutil.rmtree(partial, ignore_errors=True)
            newest = self.newest()
            last = "there is no earlier one" if newest is None else f"{newest.folder} is the last"
            raise InputError(
                f"the checkpoint {target} cannot be written: {error}; {last}: make room or mend "
                "the folder, then launch the same command again"
            ) from error
        self._trusted.add(target)
        if self.world.is_first:
            self._prune()
        return target

    def newest(self) -> Checkpoint | None:
        """The complete checkpoint with the most steps; damaged ones are passed over."""
        own = None
        if self.world.is_first:  # one process looks: files may appear at other times elsewhere
            own = next((str(folder) for folder, problem in self.survey() if problem is None), None)
        found = self.world.gather_objects(own)[0]
        return None if found is None else read_checkpoint(found)

    def survey(self) -> list[tuple[Path, str | None]]:
        """(folder, what is wrong with it or None), newest first."""
        numbered = [
            (int(match[1]), path)
            for path in (self.folder.iterdir() if self.folder.is_dir() else ())
            if (match := _NAME.fullmatch(path.name)) and path.is_dir()
        ]
        return [(path, _problem(path)) for _, path in sorted(numbered, reverse=True)]

    def start_from(self, step: int, *, own: bool) -> list[str]:
        """Make room for a run that goes on from a step; every process calls.

        What comes after that step was written by a run that went another way, or is damaged: it is
        moved beside the folder, where no later run picks it.

        Args:
            step: optimizer steps done; 0: from the start.
            own: whether its checkpoint lies in this folder; else nothing here is of use.

        Returns:
            A sentence for each that was moved.

        Raises:
            InputError: one cannot be moved.
        """
        moved: list[str] = []
        self._on_first(lambda: moved.extend(self._move_newer(step if own else -1)))
        if own and step:
            self._trusted.add(self._named(step))
        return moved

    def _move_newer(self, step: int) -> list[str]:
        newer = [
            path for path, _ in self.survey() if path.name > self._named(step).name or step < 0
        ]
        if not newer:
            return []
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for path in newer:
            os.replace(path, aside / path.name)
        names = ", ".join(sorted(path.name for path in newer))
        return [f"moved to {aside}, since this run goes another way: {names}"]

    def _named(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    @property
    def _rank_file(self) -> str:
        return _rank_file(self.world.rank)

    def _begin(self, partial: Path) -> None:
        check_output_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*"):  # of a run that was killed
            self._remove(leftover)
        partial.mkdir()

    def _publish(
        self, partial: Path, target: Path, step: int, facts: Mapping[str, Any],
        record: Mapping[str, Any],
    ) -> None:  # fmt: skip
        _write_json(partial / _RECORD, record)
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        _write_json(
            partial / _FACTS, {"format": _FORMAT, "step": step, "files": sizes} | dict(facts)
        )
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
        complete = [folder for folder, problem in self.survey() if problem is None]
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

    def _on_first(self, act: Callable[[], object]) -> None:
        self._on_all(act if self.world.is_first else lambda: None)

    def _on_all(self, act: Callable[[], object]) -> None:
        """Act; if that fails on one process, all of them raise its reason."""
        problem = None
        try:
            act()
        except (OSError, InputError) as error:
            problem = InputError(first_line(error))
        raise_together(problem)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """One checkpoint by its folder.

    Raises:
        InputError: not a complete checkpoint; what is wrong is said.
    """
    folder = Path(folder)
    problem = _problem(folder)
    if problem is not None:
        raise InputError(f"{folder} is not a complete checkpoint: {problem}")
    facts = json.loads((folder / _FACTS).read_text())
    return Checkpoint(folder, facts["step"], facts)


def _problem(folder: Path) -> str | None:
    """What a checkpoint lacks; None: it is whole."""
    try:
        facts = json.loads((folder / _FACTS).read_text())
        if facts["format"] != _FORMAT:
            return f"its format is {facts['format']}, but this version reads {_FORMAT}"
        for name, size in facts["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{_FACTS} cannot be read ({first_line(error)})"
    return None


def _rank_file(rank: int) -> str:
    return f"rank_{rank}.json"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(dict(value), file)
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
