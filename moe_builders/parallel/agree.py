"""What all processes tell each other beside a step: objects, and the first error that one has."""

from typing import Any

import torch.distributed as dist

from moe_builders.errors import InputError


def num_processes() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each process has, by rank; every process must call it, and all wait.

    Args:
        value: this process's; it is pickled.
        group: of all processes, to talk over; None: the world's.
    """
    size = num_processes()
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def raise_together(error: InputError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every process if any has an error: none is left waiting for one that stopped.

    Args:
        error: this process's, if it has one.
        group: see ``gather_objects``.

    Raises:
        InputError: the first process's that has one.
    """
    messages = gather_objects(None if error is None else str(error), group)
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise InputError(first) from error
