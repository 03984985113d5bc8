"""Seconds of a step that are a process's own: in all others it may be waiting for somebody.

Two parts of a step know no collective: fetching the step's data, and the optimizer's update of the
process's shards, which are as large as anybody's. A process that is slow in them is slow itself;
the steps of all processes take equally long, whoever holds them up.

Letters: size processes.
"""

import time
from collections import deque

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_builders.parallel.world import World

_LATE = 3  # steps; the device has done those before, as their values were read


class OwnTime:
    """Measures, and shares with the others what was measured, without a wait of the host.

    Args:
        world: whose processes are compared; one that is alone is not measured.
        optimizer: watched from now on.
    """

    def __init__(self, world: World, optimizer: Optimizer) -> None:
        self.world = world
        self._loading = 0.0
        self._pairs: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._steps = deque([self._pairs], maxlen=_LATE)
        self._begin: float | torch.cuda.Event = 0.0
        if world.size > 1:
            optimizer.register_step_pre_hook(lambda *_: self._note_begin())
            optimizer.register_step_post_hook(lambda *_: self._note_end())

    def loaded(self, seconds: float) -> None:
        """Note how long the process took to get a step's data."""
        self._loading = seconds

    def take(self) -> dict[str, Tensor]:
        """Once a step, on all processes: {"own_seconds": [size, 2]}, or {} for one that is alone.

        Columns: fetching the data of this step, the optimizer's update of two steps ago (0 in the
        first two). On the compute device.
        """
        if self.world.size == 1:
            return {}
        own = torch.zeros(self.world.size, 2)  # [size, 2]
        own[self.world.rank, 0] = self._loading
        if len(self._steps) == _LATE:
            own[self.world.rank, 1] = sum(_seconds(*pair) for pair in self._steps[0])
        self._pairs = []
        self._steps.append(self._pairs)
        return {"own_seconds": self.world.sum(self.world.send(own))}

    def _note_begin(self) -> None:
        self._begin = self._now()

    def _note_end(self) -> None:
        self._pairs.append((self._begin, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000 if end.query() else 0.0
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
