"""Why a run ends before its last step: a signal, or a validation loss that no longer falls."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_SAME_PRESS_SECONDS = 2.0  # a launcher repeats a Ctrl-C to processes that the terminal has told


@dataclass
class StopRequest:
    """Whether somebody wants this process to stop.

    Attributes:
        signal: number of the first signal that came; 0: none has.
    """

    signal: int = 0
    at: float = 0.0

    @property
    def asked(self) -> bool:
        """Whether a signal came to this process."""
        return self.signal != 0

    @property
    def name(self) -> str:
        """The signal as people call it."""
        if not self.asked:
            return "a signal to another process"
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count; SIGTERM's where another process got it."""
        return 128 + (self.signal or signal.SIGTERM)


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Note SIGINT (Ctrl-C) and SIGTERM instead of dying of them; a second Ctrl-C ends at once.

    Raises:
        KeyboardInterrupt: on the second Ctrl-C.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        again = request.signal and time.monotonic() - request.at > _SAME_PRESS_SECONDS
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not request.signal:
            request.signal, request.at = number, time.monotonic()

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: whoever runs us there has the signals
            break
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps (None: never) happens at this one."""
    return every is not None and step % every == 0


def should_stop_early(losses: Sequence[float], *, patience: int | None, min_delta: float) -> bool:
    """Whether the last ``patience`` validations brought no new best.

    Args:
        losses: validation losses so far, in order [nats].
        patience: None: never stop.
        min_delta: by how much a loss must be lower to count as better [nats].
    """
    if patience is None:
        return False
    best, since = math.inf, 0
    for loss in losses:
        best, since = (loss, 0) if loss < best - min_delta else (best, since + 1)
    return since >= patience
