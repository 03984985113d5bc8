"""What a run keeps to be able to go on: written into a checkpoint, taken back out of one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from moe_builders.checkpoint.run_checkpoints import Checkpoint, RunCheckpoints, read_checkpoint
from moe_builders.checkpoint.training_state import TrainingState
from moe_builders.errors import InputError
from moe_builders.instantiate import first_line
from moe_builders.parallel.world import World
from moe_builders.training.changes import config_changes
from moe_builders.training.rng import random_state, set_random_state

_SHOWN = ("history", "validations", "load")
_UNREMARKABLE = ("resume:", "output_dir:")  # keys that say nothing about the run itself
_WEIGHTS = ("base_model:", "init_std:")  # keys that say where a run began


class Position(Protocol):
    """A loader that knows where it stands."""

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go there; gives what is different from the loader that was saved."""
        ...


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: that it goes on from, or None.
        notes: what is worth telling about that.
        own: whether the checkpoint is one of the run's own folder.
    """

    checkpoint: Checkpoint | None
    notes: list[str]
    own: bool


@dataclass(frozen=True)
class Kept:
    """Where a run stood.

    Attributes:
        step: optimizer steps done.
        shown: what the run has shown up to there: arguments of ``Reporter``.
        notes: sentences worth telling: what is different now, and what counts.
    """

    step: int = 0
    shown: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class RunKeeper:
    """Saves and restores everything that decides how a run goes on.

    Args:
        checkpoints: where to.
        state: model and optimizer.
        loader: the training data's position.
        settings: the run's configuration as plain values.
        source: the HF folder's layout as JSON (``HFSource.to_json``); None: there is none.
        world: of the run.
    """

    def __init__(
        self,
        *,
        checkpoints: RunCheckpoints,
        state: TrainingState,
        loader: Position,
        settings: Mapping[str, Any],
        source: str | None,
        world: World,
    ) -> None:
        self.checkpoints, self.state, self.loader = checkpoints, state, loader
        self.settings, self.source, self.world = dict(settings), source, world

    def save(self, step: int, shown: Mapping[str, Any]) -> list[str]:
        """Write a checkpoint, or begin to; every process calls.

        Args:
            step: optimizer steps done.
            shown: ``Reporter.shown``.

        Returns:
            Sentences on what was saved, what is being saved, and what could not be tidied up.

        Raises:
            InputError: it, or the one that was being written until now, could not be written, or
                the weights are not finite; earlier ones are whole.
        """
        done = self.finish()
        facts = {
            "processes": self.world.size,
            "mesh": asdict(self.world.shape),
            "torch": version("torch"),
            "moe_builders": version("moe-builders"),
            "config": self.settings,
            "loader": self.loader.state_dict(),
            "numbers": self.state.numbers(),
            "hf_source": self.source,
        }
        own = {"random": random_state(self.world.device)}
        record = {key: shown[key] for key in _SHOWN}
        self.state.check_finite(step)
        folder = self.checkpoints.save(step, self.state.tensors(), facts, own, record)
        if self.checkpoints.in_flight is None:
            return [*done, f"saved {folder}", *self.checkpoints.notes]
        return [*done, f"saving {folder} while training goes on", *self.checkpoints.notes]

    def finish(self) -> list[str]:
        """Wait for what is being written; every process calls.

        Returns:
            A sentence on it; [] if nothing was.

        Raises:
            InputError: it could not be written; earlier ones are whole.
        """
        folder = self.checkpoints.wait()
        return [] if folder is None else [f"saved {folder}"]

    def restore(self, start: Start) -> Kept:
        """Take everything back from a checkpoint; without one, a run starts at step 0.

        The configuration of now counts wherever it differs from the checkpoint's, in particular
        rates and schedule; the checkpoint gives weights, optimizer state, position in the data,
        random streams and history.

        Raises:
            InputError: it does not fit the model, the optimizer or the data of now.
        """
        checkpoint = start.checkpoint
        if checkpoint is None:
            return Kept(notes=start.notes + self.checkpoints.start_from(0, own=False))
        facts = checkpoint.facts
        try:
            notes = [*start.notes, f"going on from {checkpoint.folder} (step {checkpoint.step})"]
            notes += [
                "the config differs from the checkpoint's, whose weights count all the same: "
                f"{change}"
                if change.startswith(_WEIGHTS)
                else f"the config differs from the checkpoint's, and the new value counts: {change}"
                for change in config_changes(facts["config"], self.settings)
                if not change.startswith(_UNREMARKABLE)
            ]
            notes += self._other_processes(facts)
            if not checkpoint.has_checksums:
                notes.append(
                    f"{checkpoint.folder} is of an earlier version, without checksums: only the "
                    "sizes of its files could be checked"
                )
            if facts["torch"] != version("torch"):
                notes.append(
                    f"the checkpoint is of torch {facts['torch']}, this is {version('torch')}: "
                    "losses may differ in the last digits"
                )
            notes += self.loader.load_state_dict(facts["loader"])
            notes += self.state.load(checkpoint, facts["numbers"])
            own = checkpoint.rank_facts(self.world.rank)
            if own:
                set_random_state(own["random"], self.world.device)
            notes += self.checkpoints.start_from(checkpoint.step, own=start.own)
            record = checkpoint.record()
            return Kept(checkpoint.step, {key: record[key] for key in _SHOWN}, notes)
        except (LookupError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{checkpoint.folder} is not a checkpoint of this kind of run: {first_line(error)}"
            ) from error

    def _other_processes(self, facts: Mapping[str, Any]) -> list[str]:
        was, now = facts.get("mesh"), asdict(self.world.shape)
        if facts["processes"] == self.world.size and was in (None, now):
            return []
        return [
            f"the checkpoint is of {_shown(facts['processes'], was)}, this run of "
            f"{_shown(self.world.size, now)}: sums are rounded in another order"
        ]


def find_checkpoint(resume: str, checkpoints: RunCheckpoints) -> Start:
    """Where a run starts; every process calls.

    Args:
        resume: "auto": the newest complete checkpoint, if there is one; "never": none, and those
            that are there get out of the way; else a checkpoint's folder.
        checkpoints: of the run.

    Raises:
        InputError: the folder is not a complete checkpoint, or a file of it is damaged.
    """
    if resume == "never":
        return Start(None, [], own=False)
    if resume != "auto":
        if not Path(resume).is_dir():
            raise InputError(
                f"resume is {resume!r}, but must be auto, never, or the folder of a checkpoint "
                "that is there"
            )
        chosen = read_checkpoint(resume)
        damage = checkpoints.damage(chosen)
        if damage is not None:
            raise InputError(
                f"{resume} is damaged ({damage}): name another checkpoint, or set resume=auto to "
                "go on from the newest that is whole"
            )
        own = chosen.folder.resolve().parent == checkpoints.folder.resolve()
        return Start(chosen, [], own=own)
    found, passed = checkpoints.newest_unharmed()
    if found is None and passed:
        folder, problem = passed[0]
        raise InputError(
            f"none of the checkpoints in {checkpoints.folder} is whole ({folder.name}: {problem}): "
            "put one back, or start over with resume=never"
        )
    notes = [f"{folder} is passed over: {problem}" for folder, problem in passed]
    return Start(found, notes, own=True)


def _shown(processes: int, mesh: Mapping[str, int] | None) -> str:
    """A number of processes, and how many lie along each axis of their mesh."""
    count = "1 process" if processes == 1 else f"{processes} processes"
    if mesh is None:
        return count
    return f"{count} ({', '.join(f'{axis} {n}' for axis, n in mesh.items())})"
