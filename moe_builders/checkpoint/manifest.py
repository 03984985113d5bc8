"""What a checkpoint says of itself: ``run.json``, with size and checksum of every file.

    {"format": 2, "checksum": "…",           of this very text, with 0 in the checksum's place
     "step": 20, "files": {"__0_0.distcp": {"bytes": 4096, "blake2b": "…"}, …}, …}

Which checkpoints are there is told from names and sizes, since reading all bytes of many would take
minutes; the one that a run goes on from is read once against its checksums. Format 1 had sizes
alone (``"files": {name: bytes}``).

The checksum is BLAKE2b: about 1 GB/s on one core of any processor (SHA-256 is as fast only where
the processor has instructions for it). CRC-32, twice as fast, is also what DCP's files keep inside,
so that it is weak against data that comes with a fitting CRC.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moe_builders.instantiate import first_line

FACTS, RECORD = "run.json", "record.json"
_FORMAT = 2
_NAME = re.compile(r"step_(\d+)")
_DIGEST_BYTES = 16
_BLANK = "0" * (2 * _DIGEST_BYTES)
_CHUNK = 1 << 24  # bytes read at a time


class HashedFile:
    """A binary file, written from start to end and hashed on the way.

    Args:
        file: open for writing, empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.bytes = file, _new_hash(), 0

    def write(self, data: Any) -> int:
        """Bytes or a view of some; both hashing and writing let other threads run meanwhile."""
        count = self._file.write(data)
        self._hash.update(data)
        self.bytes += count
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def fileno(self) -> int:
        """The operating system's number, for ``os.fsync``."""
        return self._file.fileno()

    def close(self) -> None:
        """The checksum stays."""
        self._file.close()

    def entry(self) -> dict[str, Any]:
        """The file's entry in ``run.json``."""
        return {"bytes": self.bytes, "blake2b": self._hash.hexdigest()}


class FileSums:
    """The files that this process writes into a checkpoint.

    Attributes:
        files: ``run.json``'s entry of each by name.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create(self, path: Path) -> Iterator[HashedFile]:
        """A new file; a name's ``.tmp`` at the end is taken for one that it is going to lose."""
        with path.open("wb") as raw:
            file = HashedFile(raw)
            yield file
        self.files[path.name.removesuffix(".tmp")] = file.entry()


def sealed(step: int, files: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of ``run.json``.

    Args:
        step: optimizer steps done.
        files: entry of each file, of all processes.
        facts: JSON, what else is to be kept there.
    """
    own = {"format": _FORMAT, "checksum": _BLANK, "step": step, "files": dict(files)}
    text = json.dumps(own | dict(facts))
    return text.replace(_BLANK, _digest(text.encode()), 1)


def named(folder: Path, step: int) -> Path:
    """The checkpoint of a step among a run's."""
    return folder / f"step_{step:08d}"


def survey(folder: Path) -> list[tuple[Path, str | None]]:
    """(checkpoint, what is wrong with it by ``problem_of`` or None), newest first."""
    numbered = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [(path, problem_of(path)) for _, path in sorted(numbered, reverse=True)]


def problem_of(folder: Path) -> str | None:
    """What a checkpoint lacks, by names, sizes and ``run.json``'s own checksum; None: nothing."""
    try:
        text = (folder / FACTS).read_bytes()
        facts = json.loads(text)
        if facts["format"] not in (1, _FORMAT):
            return f"its format is {facts['format']}, but this version reads 1 and {_FORMAT}"
        if facts["format"] != 1 or "checksum" in facts:
            checksum = facts["checksum"]
            if _digest(text.replace(checksum.encode(), _BLANK.encode(), 1)) != checksum:
                return f"{FACTS} does not fit its checksum"
        for name, entry in facts["files"].items():
            size = entry if facts["format"] == 1 else entry["bytes"]
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{FACTS} cannot be read ({first_line(error)})"
    return None


def has_checksums(facts: Mapping[str, Any]) -> bool:
    """Whether a checkpoint tells more than sizes: all but those of format 1 do."""
    return facts["format"] != 1


def damage_in_share(folder: Path, facts: Mapping[str, Any], *, rank: int, size: int) -> str | None:
    """Read a process's share of a checkpoint's files against their checksums.

    Args:
        folder: the checkpoint.
        facts: its ``run.json``.
        rank, size: of the process; the shares of all are every file once, of about equal bytes.

    Returns:
        What is wrong with the first file that does not fit; None: nothing.
    """
    if not has_checksums(facts):
        return None
    loads = [0] * size
    by_size = sorted(facts["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    for name, entry in by_size:
        least = loads.index(min(loads))
        loads[least] += entry["bytes"]
        if least != rank:
            continue
        try:
            found = _digest_of(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({first_line(error)})"
        if found != entry["blake2b"]:
            return f"{name} does not fit its checksum"
    return None


def _digest_of(path: Path) -> str:
    total = _new_hash()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def _digest(data: bytes) -> str:
    total = _new_hash()
    total.update(data)
    return total.hexdigest()


def _new_hash() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)
