"""Which samples each process sees in each step; the same set on any number of processes.

A step takes G = processes · batch_size · gradient_accumulation_steps samples. Which ones depends
on seed, epoch and step alone, so 1 process with batch 4, 2 with batch 2 and 1 with 4 micro-batches
of 1 train on the same samples.
"""

from collections.abc import Iterator

from torch.utils.data import Sampler

from moe_builders.data.order import MixedOrder, Order
from moe_builders.errors import InputError

NO_SAMPLE = -1


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
        order: another order than seed and shuffle give.

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
        order: Order | MixedOrder | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size),
                            ("gradient_accumulation_steps", accumulation)):  # fmt: skip
            if value < 1:
                raise InputError(f"{name} is {value}, but must be at least 1")
        self.num_samples, self.batch_size, self.accumulation = num_samples, batch_size, accumulation
        self.rank, self.size, self.keep_last = rank, size, keep_last
        self.order = order or Order(num_rows=num_samples, seed=seed, shuffle=shuffle)
        self.epoch = self.start = 0
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
        """Optimizer steps from ``start`` to the end of the epoch."""
        extra = self.samples_per_step - 1 if self.keep_last else 0
        return (self.num_samples - self.start + extra) // self.samples_per_step

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the epoch whose order is next, and the first of its samples."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order.epoch(self.epoch)[self.start :]
        order += [NO_SAMPLE] * (self.num_steps * self.samples_per_step - len(order))
        per_micro_batch = self.size * self.batch_size
        for number in range(len(self)):
            start = number * per_micro_batch
            yield order[start : start + per_micro_batch][self.rank :: self.size]
