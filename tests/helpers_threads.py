"""Processes played by threads: they exchange objects and agree as real ones do."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from moe_builders.errors import InputError


def together(size: int, act: Callable[[Any], None]) -> list[str | None]:
    """Run ``act`` as each of several processes.

    Args:
        size: how many.
        act: gets what a World has of rank, size, is_first and gather_objects; besides ``agree``,
            which raises an error that any process has on all.

    Returns:
        The sentence of the InputError that each has raised, or None.
    """
    barrier, board = threading.Barrier(size, timeout=20), [None] * size
    raised: list[str | None] = [None] * size

    def process(rank: int) -> None:
        def gather_objects(value: Any) -> list[Any]:
            board[rank] = value
            barrier.wait()
            found = list(board)
            barrier.wait()
            return found

        def agree(error: InputError | None) -> None:
            for found in gather_objects(error):
                if found is not None:
                    raise found

        try:
            act(SimpleNamespace(rank=rank, size=size, is_first=rank == 0, agree=agree,
                                gather_objects=gather_objects))  # fmt: skip
        except InputError as error:
            raised[rank] = str(error)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised
