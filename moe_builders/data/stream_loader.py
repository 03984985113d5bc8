"""Steps over a stream: every process takes its share of the same rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from moe_builders.data.batch import Batch
from moe_builders.data.loader import Batching
from moe_builders.data.position import compare
from moe_builders.data.streams import Chain, DocumentStream, MixedSource, RowSource
from moe_builders.errors import InputError


@dataclass(frozen=True)
class _Place:
    """The stream's place after a step; travels with it, so that reading ahead disturbs nothing."""

    state: dict[str, Any]


class StreamLoader:
    """See ``StepLoader``; read ahead by at most one process, since a stream has one reader.

    Args:
        source: the rows.
        batching: how rows become batches.
        packed: whether a row may hold several documents.
        stamp: what a place depends on.
        validation: for ``__iter__`` alone: the last, incomplete batch is kept.
    """

    steps_per_epoch: int | None = None

    def __init__(
        self,
        source: DocumentStream | MixedSource | Chain,
        batching: Batching,
        *,
        packed: bool,
        stamp: dict[str, Any],
        validation: bool = False,
    ) -> None:
        asked = batching.num_workers
        self.notes: list[str] = (
            [f"a stream is read ahead by one process: num_workers ({asked}) counts as 1"]
            if asked > 1
            else []
        )
        self.max_epochs = 1 if isinstance(source, MixedSource) else None
        self._source, self._batching, self._packed = source, batching, packed
        self._stamp, self._validation = stamp, validation
        self._beginning = source.state()
        self._state = self._beginning

    def steps(self, *, epochs: int) -> Iterator[list[Batch]]:
        """See ``StepLoader``."""
        if isinstance(self._source, DocumentStream):
            self._source.passes = epochs
        fresh = self._state is self._beginning
        for step, place in self._items(self._state, accumulation=self._batching.accumulation):
            self._state = place.state
            yield step
        if fresh and self._state is self._beginning:
            raise InputError(
                f"the stream holds fewer rows than the {self._batching.samples_per_step} of one "
                "step: lower batch_size or gradient_accumulation_steps"
            )

    def steps_left(self, *, epochs: int) -> int | None:
        """See ``StepLoader``."""
        return None

    def __iter__(self) -> Iterator[Batch]:
        """See ``StepLoader``."""
        for step, _ in self._items(self._beginning, accumulation=1):
            yield from step

    def _items(
        self, state: dict[str, Any], *, accumulation: int
    ) -> Iterator[tuple[list[Batch], _Place]]:
        items = _Items(
            self._source, self._batching, state, accumulation=accumulation, packed=self._packed,
            keep_last=self._validation,
        )  # fmt: skip
        workers = min(1, self._batching.num_workers)
        yield from self._batching.loader(items, num_workers=workers, batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """See ``StepLoader``."""
        return {"at": self._state, "of": self._stamp}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """See ``StepLoader``."""
        differences = compare(state, self._stamp)
        self._state = dict(state["at"])
        return differences


class _Items(IterableDataset):
    """(micro-batches of a step, place after it), from a place on."""

    def __init__(
        self,
        source: RowSource,
        batching: Batching,
        state: dict[str, Any],
        *,
        accumulation: int,
        packed: bool,
        keep_last: bool,
    ) -> None:
        self.source, self.batching, self.state = source, batching, state
        self.accumulation, self.packed, self.keep_last = accumulation, packed, keep_last

    def __iter__(self) -> Iterator[tuple[list[Batch], _Place]]:
        self.source.load_state(self.state)
        own = self.batching
        per_micro_batch = own.size * own.batch_size
        count = per_micro_batch * self.accumulation
        while True:
            rows = [row for _ in range(count) if (row := self.source.take()) is not None]
            if not rows or (len(rows) < count and not self.keep_last):
                return
            padded = [*rows, *[None] * (count - len(rows))]
            step = []
            for start in range(0, count, per_micro_batch):
                share = padded[start : start + per_micro_batch][own.rank :: own.size]
                made = [None if make is None else make() for make in share]
                step.append(own.collate(made, packed=self.packed))
            yield step, _Place(self.source.state())
