"""Micro-batches, step by step, from a place that can be saved and gone back to.

The order is decided in the main process (or by the stream), never by workers: any number of them
gives the same batches, and the place counts what was handed out, not what they have prepared.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from moe_builders.data.batch import Batch, collate
from moe_builders.data.datasets import Rows
from moe_builders.data.packing import Row
from moe_builders.data.position import compare, stamp
from moe_builders.data.rows import MixedDataset, order_of
from moe_builders.data.sampler import NO_SAMPLE, StepSampler
from moe_builders.errors import InputError


class StepLoader(Protocol):
    """Micro-batches of this process.

    Attributes:
        steps_per_epoch: optimizer steps in an epoch; None: a stream, nobody knows.
        max_epochs: how many there can be; None: any number.
        notes: sentences about the data for whoever watches the run.
    """

    steps_per_epoch: int | None
    max_epochs: int | None
    notes: list[str]

    def steps(self, *, epochs: int) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step at a time, from the loaded place on.

        The last samples of an epoch (of a stream: of the run) that fill no step are left out.
        """
        ...

    def steps_left(self, *, epochs: int) -> int | None:
        """How many steps ``steps`` would still give; None: a stream, nobody knows."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Every sample once, in order; as many batches on every process."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place after the last step that ``steps`` gave, the same on all processes."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on there; call it before ``steps``.

        Another number of processes, workers, batch_size or gradient_accumulation_steps is fine:
        the next sample is the next sample.

        Returns:
            Sentences on what the order depends on and now differs; [] when it is the same order.

        Raises:
            InputError: the place means nothing in this data.
        """
        ...


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Attributes:
        batch_size: rows of a micro-batch on one process.
        accumulation: micro-batches a step.
        rank, size: this process among all.
        pad_id: id written into padding.
        max_seq_len: packed rows are padded to it.
        pad_to_multiple_of: round other rows up, so that compiled code sees few shapes.
        num_workers: processes that prepare batches ahead; 0: none.
        prefetch_factor: batches (of a stream: steps) that each of them keeps ready.
        pin_memory: for faster copies to a GPU.
    """

    batch_size: int
    max_seq_len: int
    pad_id: int
    accumulation: int = 1
    rank: int = 0
    size: int = 1
    pad_to_multiple_of: int = 1
    num_workers: int = 0
    prefetch_factor: int = 2
    pin_memory: bool = False

    @property
    def samples_per_step(self) -> int:
        """Of all processes."""
        return self.size * self.batch_size * self.accumulation

    def collate(self, rows: Sequence[Row | None], *, packed: bool) -> Batch:
        """Rows (None: padding) as one micro-batch."""
        longest = max(len(row["tokens"]) if row else 1 for row in rows)
        multiple = self.pad_to_multiple_of
        rounded = -(-longest // multiple) * multiple
        length = self.max_seq_len if packed else min(rounded, max(self.max_seq_len, longest))
        return collate(rows, pad_id=self.pad_id, packed=packed, length=length)

    def loader(self, dataset: Any, *, num_workers: int, **options: Any) -> DataLoader[Any]:
        """torch's loader, with workers as asked for."""
        ahead = {"prefetch_factor": self.prefetch_factor} if num_workers else {}
        return DataLoader(
            dataset,
            num_workers=num_workers,
            pin_memory=self.pin_memory,
            # torch draws a seed for workers; not from the stream that a resumed run goes on with
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_run,
            **ahead,
            **options,
        )


def _leave_signals_to_the_run(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the run needs its workers to finish."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class SizedLoader:
    """Steps over a data set whose rows are numbered.

    Args:
        rows: the data set.
        batching: how rows become batches.
        seed: of the order.
        shuffle: a new order every epoch.
        validation: for ``__iter__`` alone: the last, incomplete batch is kept.
        long_samples: how the rows were made, for ``load_state_dict``.

    Raises:
        InputError: fewer rows than one step takes.
    """

    def __init__(
        self,
        rows: Rows,
        batching: Batching,
        *,
        seed: int,
        shuffle: bool,
        validation: bool = False,
        long_samples: str = "truncate",
    ) -> None:
        self.notes = _cut_note(rows, batching.max_seq_len)
        self._sampler = StepSampler(
            num_samples=len(rows), batch_size=batching.batch_size,
            accumulation=1 if validation else batching.accumulation, rank=batching.rank,
            size=batching.size, keep_last=validation,
            order=order_of(rows, seed=seed, shuffle=shuffle),
        )  # fmt: skip
        self.steps_per_epoch: int | None = self._sampler.num_steps
        self.max_epochs: int | None = None
        workers = batching.num_workers
        self._loader = batching.loader(
            _OrEmpty(rows), num_workers=workers, batch_sampler=self._sampler,
            collate_fn=_Collate(batching, rows.packed), persistent_workers=workers > 0,
        )  # fmt: skip
        parts = rows.parts if isinstance(rows, MixedDataset) else [rows]
        self._stamp = stamp(
            kind="sized", packed=rows.packed, max_seq_len=batching.max_seq_len, seed=seed,
            shuffle=shuffle, long_samples=long_samples, rows=[len(part) for part in parts],
            weights=rows.weights if isinstance(rows, MixedDataset) else None,
        )  # fmt: skip
        self._epoch = self._samples = 0

    def steps(self, *, epochs: int) -> Iterator[list[Batch]]:
        """See ``StepLoader``."""
        while self._epoch < epochs:
            self._sampler.set_epoch(self._epoch, start=self._samples)
            step: list[Batch] = []
            for batch in self._loader if len(self._sampler) else ():
                step.append(batch)
                if len(step) == self._sampler.accumulation:
                    self._samples += self._sampler.samples_per_step
                    yield step
                    step = []
            self._epoch, self._samples = self._epoch + 1, 0

    def steps_left(self, *, epochs: int) -> int | None:
        """See ``StepLoader``."""
        if self._epoch >= epochs:
            return 0
        later = (epochs - self._epoch - 1) * self._sampler.num_steps
        here = (self._sampler.num_samples - self._samples) // self._sampler.samples_per_step
        return later + max(0, here)

    def __iter__(self) -> Iterator[Batch]:
        """See ``StepLoader``."""
        yield from self._loader

    def state_dict(self) -> dict[str, Any]:
        """See ``StepLoader``."""
        return {"epoch": self._epoch, "samples": self._samples, "of": self._stamp}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """See ``StepLoader``."""
        differences = compare(state, self._stamp)
        self._epoch, self._samples = int(state["epoch"]), int(state["samples"])
        return differences


def total_steps(loader: StepLoader, *, epochs: int, max_steps: int | None, done: int = 0) -> int:
    """Optimizer steps of a run, at most.

    Args:
        loader: at the place where the run begins or goes on.
        epochs, max_steps: as the config says.
        done: steps that lie behind, perhaps of another number of samples.

    Raises:
        InputError: a stream without max_steps, several epochs of what has no end, or more steps
            done than the run is to have.
    """
    if max_steps is not None and max_steps < done:
        raise InputError(
            f"max_steps is {max_steps}, but the run that goes on has done {done} already: raise "
            "it, or name an earlier checkpoint's folder in resume"
        )
    if loader.max_epochs is not None and epochs > loader.max_epochs:
        raise InputError(
            f"epochs is {epochs}, but a mixture with a stream in it has no end, so there is one "
            "epoch only: set epochs to 1 and max_steps to what you want"
        )
    left = loader.steps_left(epochs=epochs)
    if left is None:
        if max_steps is None:
            raise InputError(
                "max_steps is missing: nobody knows how long a stream (streaming: true) is, so set "
                "max_steps"
            )
        return max_steps
    return done + left if max_steps is None else min(done + left, max_steps)


def _cut_note(rows: Rows, max_seq_len: int) -> list[str]:
    if rows.cut is None or not rows.cut[0]:
        return []
    cut, lost = rows.cut
    what = f"cut there: {lost} tokens are left out" if lost else "split into several rows"
    return [f"{cut} samples are longer than max_seq_len ({max_seq_len}) and were {what}"]


class _Collate:
    """Batching's collate for torch's loader; an object, so that it can travel to a worker."""

    def __init__(self, batching: Batching, packed: bool) -> None:
        self.batching, self.packed = batching, packed

    def __call__(self, rows: Sequence[Row | None]) -> Batch:
        return self.batching.collate(rows, packed=self.packed)


class _OrEmpty(Dataset):
    """The data set, with None for the number that stands for no sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return None if index == NO_SAMPLE else self.dataset[index]
