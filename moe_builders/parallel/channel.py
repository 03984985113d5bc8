"""Objects that processes send each other beside a step: over the world's group or one of its own.

A thread that saves while training goes on must not share a process group with the main thread: its
messages would get between the others'.
"""

from typing import Any

import torch.distributed as dist

from moe_builders.errors import InputError
from moe_builders.parallel.agree import gather_objects, raise_together
from moe_builders.parallel.world import World


class Channel:
    """Between all processes of a world.

    Args:
        world: every process makes its channel at the same place.
        own: make a gloo group for it, so that one thread may use it beside the main thread's
            collectives; else the world's own group is used, by the main thread.
    """

    def __init__(self, world: World, *, own: bool) -> None:
        self.rank = world.rank
        self.group = world.new_gloo_group() if own else None

    @property
    def is_first(self) -> bool:
        """Whether this process names and removes what all have written."""
        return self.rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        """What each process has, by rank; every process must call it, and all wait."""
        return gather_objects(value, self.group)

    def raise_together(self, error: InputError | None) -> None:
        """Raise the first process's error on every process, if there is one."""
        raise_together(error, self.group)

    def close(self) -> None:
        """Give its own group back, if it has one."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None
