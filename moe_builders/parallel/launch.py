"""Run a recipe's main from the command line: a user's mistake is one sentence, not a traceback."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from moe_builders.errors import InputError
from moe_builders.parallel.heartbeat import LostProcess

LOST_PROCESS = 129  # 128 + SIGHUP: the other end has hung up; to be launched again


@contextmanager
def first_process_warns() -> Iterator[None]:
    """Python warnings and log lines below an error pass on the first process alone, inside."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """What is warned of inside is one line without the place in the code that said it."""

    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def launch(main: Callable[[Any], Any], parse: Callable[[], Any]) -> int:
    """Parse the command line, run, and turn an InputError into a sentence and exit code 2.

    What libraries warn of, all processes would say: only the first one does.

    Args:
        main: the recipe.
        parse: gives its configuration.

    Returns:
        The exit code: 0; 2 after a mistake; 129 if another process was lost; 128 + the signal's
        number if a signal ended the run (``exit_code`` of what main returns, if it has one).
    """
    rank = os.environ.get("RANK", "0")
    try:
        with first_process_warns(), _warnings_as_sentences():
            config = parse()
    except InputError as error:  # the same on every process: one of them says it
        if rank == "0":
            sys.stderr.write(f"error: {_sentence(error)}\n")
        return 2
    try:
        with first_process_warns():
            result = main(config)
    except KeyboardInterrupt:
        if rank == "0":
            sys.stderr.write("stopped at once by Ctrl-C: nothing was saved since the last save\n")
        return 130
    except InputError as error:
        where = "" if rank == "0" else f"[rank {rank}] "
        sys.stderr.write(f"{where}error: {_sentence(error)}\n")  # in one piece: others write too
        return 2
    except LostProcess as error:
        if error.to_say:
            sys.stderr.write(f"[rank {rank}] error: {error}\n")
        return LOST_PROCESS
    return getattr(result, "exit_code", 0)


def wants_color(stream: TextIO) -> bool:
    """Whether to write colours: to a terminal whose user has not set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def _sentence(error: InputError) -> str:
    """The message in one line; a data loader's process wraps it in its whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = f"{InputError.__module__}.{InputError.__qualname__}: "
    own = [line.removeprefix(name) for line in lines if line.startswith(name)]
    return own[-1] if own else " ".join(lines)
