"""Which samples each process sees in each step; the same set on any number of processes.

A step takes G = processes · batch_size · gradient_accumulation_steps samples. Which ones depends
on seed, epoch and step alone, so 1 process with batch 4, 2 with batch 2 and 1 with 4 micro-batches
of 1 train on the same samples.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from moe_builders.data.batch import Batch, collate
from moe_builders.data.packing import PackedDataset
from moe_builders.errors import InputError

_NO_SAMPLE = -1


class StepSampler(Sampler[list[int]]):
    """Lists of sample numbers, one a micro-batch of this process.

    Args:
        num_samples: in the data set.
        batch_size: of a micro-batch on one process.
        accumulation: micro-batches a step.
        rank, size: this process among all.
        seed: of the order.
        shuffle: a new order every epoch (``set_epoch``); False: as it is.
        keep_last: pad the last, incomplete step with empty samples; False: leave it out.

    Raises:
        InputError: a size below 1, or fewer samples than one step takes.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int,
        size: int,
        seed: int = 0,
        shuffle: bool = True,
        keep_last: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size),
                            ("gradient_accumulation_steps", accumulation)):  # fmt: skip
            if value < 1:
                raise InputError(f"{name} is {value}, but must be at least 1")
        self.num_samples, self.batch_size, self.accumulation = num_samples, batch_size, accumulation
        self.rank, self.size, self.seed, self.shuffle = rank, size, seed, shuffle
        self.keep_last, self.epoch = keep_last, 0
        if self.num_steps == 0:
            raise InputError(
                f"the data set has {num_samples} rows, fewer than the {self.samples_per_step} of "
                "one step: lower batch_size or gradient_accumulation_steps"
            )

    @property
    def samples_per_step(self) -> int:
        """G, over all processes."""
        return self.size * self.batch_size * self.accumulation

    @property
    def num_steps(self) -> int:
        """Optimizer steps in an epoch."""
        extra = self.samples_per_step - 1 if self.keep_last else 0
        return (self.num_samples + extra) // self.samples_per_step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.num_samples))
        if self.shuffle:
            number = (self.seed * 1_000_003 + self.epoch) % 2**63  # what manual_seed can take
            stream = torch.Generator().manual_seed(number)
            order = torch.randperm(self.num_samples, generator=stream).tolist()
        order += [_NO_SAMPLE] * (self.num_steps * self.samples_per_step - self.num_samples)
        per_micro_batch = self.size * self.batch_size
        for number in range(len(self)):
            start = number * per_micro_batch
            yield order[start : start + per_micro_batch][self.rank :: self.size]


def make_loader(
    dataset: Dataset,
    sampler: StepSampler,
    *,
    pad_id: int,
    max_seq_len: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    pad_to_multiple_of: int = 1,
) -> DataLoader[Batch]:
    """A loader of this process's micro-batches.

    Args:
        dataset: ``PackedDataset`` or ``ShiftedDataset``.
        sampler: the order.
        pad_id: id written into padding.
        max_seq_len: rows of a packed data set are padded to it.
        num_workers: processes that prepare batches ahead; 0: none.
        pin_memory: for faster copies to a GPU.
        pad_to_multiple_of: round other rows up, so that compiled code sees few shapes.
    """
    packed = isinstance(dataset, PackedDataset)
    return DataLoader(
        _OrEmpty(dataset),
        batch_sampler=sampler,
        collate_fn=partial(
            _collate, pad_id=pad_id, packed=packed, max_seq_len=max_seq_len,
            multiple=pad_to_multiple_of,
        ),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )  # fmt: skip


def training_steps(
    loader: DataLoader[Batch], sampler: StepSampler, *, epochs: int
) -> Iterator[list[Batch]]:
    """All micro-batches of a step at once, epoch after epoch.

    The sampler leaves an epoch's incomplete last step out, so none is ever half full.
    """
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        step = []
        for batch in loader:
            step.append(batch)
            if len(step) == sampler.accumulation:
                yield step
                step = []


def _collate(
    samples: list[dict[str, Any] | None], *, pad_id: int, packed: bool, max_seq_len: int,
    multiple: int,
) -> Batch:  # fmt: skip
    longest = max(len(sample["tokens"]) if sample else 1 for sample in samples)
    rounded = -(-longest // multiple) * multiple
    length = max_seq_len if packed else min(rounded, max(max_seq_len, longest))
    return collate(samples, pad_id=pad_id, packed=packed, length=length)


class _OrEmpty(Dataset):
    """The data set, with None for the number that stands for no sample."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return None if index == _NO_SAMPLE else self.dataset[index]
