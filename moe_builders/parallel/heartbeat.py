"""Signs of life of every process in the job's store: read when one is missed, to say whose.

A collective that loses a partner tells of a closed connection, on all processes that are left and
without a name. Each process therefore writes once a second who it is and what it is doing; nobody
reads that before something has failed, or a meeting in the store takes long.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from moe_builders.errors import InputError
from moe_builders.instantiate import first_line

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 4.0  # a process that gave no sign for so long is gone
_STORE_TIMEOUT = timedelta(seconds=20)
_VERDICTS = 4  # one after the other until who is silent at a meeting counts as gone: half a minute
_LEFT, _GAVE_UP = "left", "gave up"  # at its end; because of another one
_GO_ON = "the others cannot go on without it: the same command goes on from the last checkpoint"
_T = TypeVar("_T")


class LostProcess(RuntimeError):
    """Another process is gone, and with it the run; the message says which.

    Args:
        message: for the user.
        to_say: whether this process is the one of its host that says it.
    """

    def __init__(self, message: str, *, to_say: bool = True) -> None:
        super().__init__(message)
        self.to_say = to_say


@dataclass(frozen=True)
class Sign:
    """The last that a process let know of itself.

    Attributes:
        beat: grows by one with each sign.
        host, process: where it runs, and its number there.
        at: time of the day by its own clock.
        doing: what the recipe said last, such as "step 17".
        end: "" while it runs; "left", "gave up", or the error that it ended with.
    """

    beat: int
    host: str
    process: int
    at: str
    doing: str
    end: str


class Heartbeat:
    """Gives signs of life from a thread of its own, and reads those of all when asked.

    Args:
        store: that all processes see; copied, as a wait on one holds up whoever else uses it.
        rank: of this process.
        size: number of processes.
        beat_seconds: between two signs.
        silent_seconds: how long a process must have given none to count as gone.

    Attributes:
        doing: what the process is at; set it as often as wanted.
    """

    def __init__(
        self,
        store: Any,  # a dist.Store, whose type does not tell all it has
        *,
        rank: int,
        size: int,
        beat_seconds: float = _BEAT_SECONDS,
        silent_seconds: float = _SILENT_SECONDS,
    ) -> None:
        self.store, self.rank, self.size = store.clone(), rank, size
        self.store.set_timeout(_STORE_TIMEOUT)
        self.beat_seconds, self.silent_seconds = beat_seconds, silent_seconds
        self.doing = "its start"
        self._beat, self._host = 0, socket.gethostname()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._give("")
        self._thread.start()

    def leave(self, end: str = _LEFT) -> None:
        """Give the last sign and end the thread.

        Args:
            end: why; see ``Sign.end``.
        """
        self._ended.set()
        self._thread.join(_STORE_TIMEOUT.total_seconds())
        with suppress(RuntimeError):  # the store is gone, and who would read it with it
            self._give(end)

    def lost(self) -> LostProcess | None:
        """Which processes are gone, after a collective has failed; None: all are there.

        Takes ``silent_seconds`` where no process has said why it ended.
        """
        try:
            before = self._signs()
            if not any(_own_error(sign) for sign in before):
                time.sleep(self.silent_seconds)
            now = self._signs()
        except RuntimeError:  # the store's errors are all of this kind
            return LostProcess(_lost_store())  # nobody knows who else would say it
        failed = [rank for rank, sign in enumerate(now) if _own_error(sign)]
        silent = [
            rank for rank, (old, new) in enumerate(zip(before, now, strict=True))
            if new is None or (not new.end and old is not None and old.beat == new.beat)
        ]  # fmt: skip
        left = [rank for rank, sign in enumerate(now) if sign is not None and sign.end == _LEFT]
        gone = failed or silent or left
        if not gone:
            return None
        living = [
            rank for rank, sign in enumerate(now)
            if rank not in gone and sign is not None and sign.host == self._host
        ]  # fmt: skip
        whom = "; ".join(f"rank {rank} {_told(now[rank])}" for rank in gone[:4])
        more = f"; and {len(gone) - 4} more" if len(gone) > 4 else ""
        return LostProcess(f"{whom}{more}; {_GO_ON}", to_say=self.rank == min(living, default=0))

    def meet(self, act: Callable[[], _T]) -> _T:
        """Do what waits for all processes in the store, such as making a group.

        No connection there closes when a process is gone: it would be waited for until the
        timeout of collectives. That one may be busy or held up for a while, so it has to be found
        gone several times.

        Args:
            act: done on a thread of its own, which is left behind in it if a process is gone.

        Returns:
            What act gives; an error of act is raised.

        Raises:
            LostProcess: a process is gone.
        """
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(act())
            except BaseException as error:  # whoever waits gets it, whatever it is
                done.set_exception(error)

        threading.Thread(target=run, name="meeting", daemon=True).start()
        verdicts = 0
        while not wait([done], timeout=self.silent_seconds).done:
            lost = self.lost()
            verdicts = 0 if lost is None else verdicts + 1
            if lost is not None and verdicts == _VERDICTS:
                raise lost
        return done.result()

    def _signs(self) -> list[Sign | None]:
        keys = [_key(rank) for rank in range(self.size)]
        if self.store.has_extended_api() and self.store.check(keys):
            found: list[bytes | None] = list(self.store.multi_get(keys))
        else:
            found = [self.store.get(key) if self.store.check([key]) else None for key in keys]
        return [None if value is None else Sign(**json.loads(value)) for value in found]

    def _give(self, end: str) -> None:
        self._beat += 1
        at = time.strftime("%H:%M:%S")
        sign = Sign(self._beat, self._host, os.getpid(), at, self.doing, end)
        self.store.set(_key(self.rank), json.dumps(asdict(sign)))

    def _run(self) -> None:
        while not self._ended.wait(self.beat_seconds):
            try:
                self._give("")
            except RuntimeError:
                return  # the store is gone; the collectives need it no longer


@contextmanager
def signs_of_life(rank: int, size: int) -> Iterator[Heartbeat]:
    """Give signs of life inside, in the store at which the processes have met; an error that comes
    of a lost process is told as that.

    Raises:
        LostProcess: in place of what a collective raised, if a process is gone.
    """
    store = dist.distributed_c10d._get_default_store()
    heartbeat = Heartbeat(store, rank=rank, size=size)
    try:
        yield heartbeat
    except BaseException as error:
        known = isinstance(error, LostProcess)
        lost = heartbeat.lost() if not known and of_a_collective(error) else None
        heartbeat.leave(_GAVE_UP if known or lost else _in_a_line(error))
        if lost is not None:
            raise lost from error
        raise
    heartbeat.leave()


def of_a_collective(error: BaseException | None) -> bool:
    """Whether it, or what led to it, was raised by a backend: gloo has no class of its own."""
    while error is not None:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _own_error(sign: Sign | None) -> bool:
    return sign is not None and sign.end not in ("", _LEFT, _GAVE_UP)


def _told(sign: Sign | None) -> str:
    if sign is None:
        return "never gave a sign of life"
    who = f"(host {sign.host}, process {sign.process})"
    if not sign.end:
        return (
            f"{who} has stopped answering: its last sign of life came at {sign.at} in {sign.doing} "
            "(killed, out of memory, or its machine is gone)"
        )
    if sign.end == _LEFT:
        return f"{who} left at {sign.at} after {sign.doing}, as if the run had ended"
    return f"{who} ended at {sign.at} in {sign.doing} with {sign.end}"


def _lost_store() -> str:
    where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    whose = "the process of rank 0"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        whose = "the first torchrun (it or its machine)"
    return f"{whose} is gone: where the processes met ({where}) nobody answers; {_GO_ON}"


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, InputError):
        return f"error: {first_line(error)}"
    text = first_line(error) if str(error) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _key(rank: int) -> str:
    return f"alive/{rank}"
