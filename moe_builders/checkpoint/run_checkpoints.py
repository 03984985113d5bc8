"""Checkpoints of a run: one folder a step, complete as soon as it has its name.

    checkpoints/step_00000020/   run.json       where the run stood; size and checksum of every file
                                 record.json    what it has shown so far
                                 rank_0.json …  what differs by process (random streams)
                                 *.distcp       weights and optimizer state (DCP)

A folder is written as ``.step_00000020.partial``, flushed to the disk and renamed at the end, so
that whatever has the name is whole; nothing that is being written or removed ever has it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from moe_builders.checkpoint.manifest import (
    FACTS,
    RECORD,
    damage_in_share,
    has_checksums,
    named,
    problem_of,
    survey,
)
from moe_builders.checkpoint.saving import Background, Contents, Saver, rank_file
from moe_builders.errors import InputError
from moe_builders.instantiate import first_line
from moe_builders.parallel.agree import raise_together
from moe_builders.parallel.channel import Channel
from moe_builders.parallel.dcp import copy_to_host, read_tensors_together
from moe_builders.parallel.world import World


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

    @property
    def has_checksums(self) -> bool:
        """Whether damage inside its files can be told; not of those of earlier versions."""
        return has_checksums(self.facts)

    def record(self) -> dict[str, Any]:
        """What was given as the record; long, so it is read when it is asked for."""
        return json.loads((self.folder / RECORD).read_text())

    def rank_facts(self, rank: int) -> dict[str, Any]:
        """What process ``rank`` gave; {} if there was no such process."""
        path = self.folder / rank_file(rank)
        return json.loads(path.read_text()) if path.is_file() else {}

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place; every process calls."""
        read_tensors_together(tensors, self.folder)


class RunCheckpoints:
    """The checkpoints of one run; as a context, its end waits for what is being written.

    After an error inside the context the save in flight is completed if it can be, and the error
    is what is told; Ctrl-C at once leaves it: what is half written never gets its name.

    Args:
        folder: made when the first is saved.
        world: all processes call ``save``, ``wait``, ``newest``, ``newest_unharmed`` and ``damage``
            together.
        keep_last: older ones are removed when a new one is complete; None: never.
        background: ``save`` copies the tensors to the host's memory and returns; a thread writes
            them.
    """

    def __init__(
        self, folder: str | Path, *, world: World, keep_last: int | None, background: bool = False
    ) -> None:
        self.folder, self.world, self.background = Path(folder), world, background
        self.saver = Saver(self.folder, keep_last=keep_last)
        self._channel: Channel | None = None  # made at the first save
        self._in_flight: tuple[Path, Background] | None = None
        self._trusted: set[Path] = set()  # written, or gone on from, by this run

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return  # Ctrl-C: at once
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
        finally:
            # Ctrl-C while waiting: the thread is still at work in its group
            if self._channel is not None and self._in_flight is None:
                self._channel.close()
                self._channel = None

    @property
    def notes(self) -> list[str]:
        """Sentences on what could not be tidied up."""
        return list(self.saver.notes)

    @property
    def in_flight(self) -> Path | None:
        """The checkpoint that is being written while training goes on."""
        return None if self._in_flight is None else self._in_flight[0]

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
        when the new one is complete. In the background, what is saved are the values of now; at
        first the save in flight is waited for.

        Args:
            step: optimizer steps done.
            tensors: see ``write_tensors_together``.
            facts: JSON, the same on every process.
            rank_facts: JSON, this process's own.
            record: JSON, the same on every process, and long.

        Raises:
            InputError: a process could not write this one, or in the background the one before;
                on every process. What was complete stays.
        """
        self.wait()
        target = named(self.folder, step)
        if target in self._trusted:
            return target
        if self._channel is None:
            self._channel = Channel(self.world, own=self.background)
        channel, saver = self._channel, self.saver
        contents = Contents(
            step,
            copy_to_host(tensors) if self.background else tensors,
            json.dumps(dict(facts)),
            json.dumps(dict(rank_facts)),
            json.dumps(dict(record or {})) if channel.is_first else "",
        )
        if self.background:
            self._in_flight = target, Background(lambda: saver.write(contents, channel))
        else:
            saver.write(contents, channel)
            self._trusted.add(target)
        return target

    def wait(self) -> Path | None:
        """Until the save in flight is complete; gives its folder, None if there was none.

        Raises:
            InputError: a process could not write it; on every process.
        """
        if self._in_flight is None:
            return None
        target, writing = self._in_flight
        error = writing.join()  # a signal's handler may raise here: it is still in flight then
        self._in_flight = None
        if error is not None:
            raise error
        self._trusted.add(target)
        return target

    def newest(self) -> Checkpoint | None:
        """The complete checkpoint with the most steps, by names and sizes."""
        whole = [folder for folder, problem in self._survey_together() if problem is None]
        return read_checkpoint(whole[0]) if whole else None

    def newest_unharmed(self) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
        """The newest whose files fit their checksums, and those passed over for it.

        Returns:
            The checkpoint, None if there is none; (folder, what is wrong with it), newest first.
        """
        passed = []
        for folder, problem in self._survey_together():
            if problem is None:
                checkpoint = read_checkpoint(folder)
                problem = self.damage(checkpoint)
                if problem is None:
                    return checkpoint, passed
            passed.append((folder, problem))
        return None, passed

    def damage(self, checkpoint: Checkpoint) -> str | None:
        """Read all files against their checksums, each process its share.

        Returns:
            What is wrong, the same on every process; None: nothing.
        """
        own = damage_in_share(
            checkpoint.folder, checkpoint.facts, rank=self.world.rank, size=self.world.size
        )
        return next((found for found in self.world.gather_objects(own) if found is not None), None)

    def survey(self) -> list[tuple[Path, str | None]]:
        """(folder, what is wrong with it by names and sizes, or None), newest first."""
        return survey(self.folder)

    def _survey_together(self) -> list[tuple[Path, str | None]]:
        # one process looks: files may appear at other times elsewhere
        return self.world.gather_objects(self.survey() if self.world.is_first else None)[0]

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
        problem = None
        try:
            if self.world.is_first:
                moved = self._move_newer(step if own else -1)
        except (OSError, InputError) as error:
            problem = InputError(first_line(error))
        raise_together(problem)
        if own and step:
            self._trusted.add(named(self.folder, step))
        return moved

    def _move_newer(self, step: int) -> list[str]:
        own_name = named(self.folder, step).name
        newer = [path for path, _ in self.survey() if path.name > own_name or step < 0]
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


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """One checkpoint by its folder.

    Raises:
        InputError: not a complete checkpoint; what is wrong is said.
    """
    folder = Path(folder)
    problem = problem_of(folder)
    if problem is not None:
        raise InputError(f"{folder} is not a complete checkpoint: {problem}")
    facts = json.loads((folder / FACTS).read_text())
    return Checkpoint(folder, facts["step"], facts)
