"""What a run leaves in its folder besides models: numbers as JSON lines, and what it ran on."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moe_builders.errors import InputError

_PACKAGES = ("moe-builders", "torch", "torchtune", "torchao", "datasets", "tokenizers")


class MetricsFile:
    """One JSON object a line: each step, and each validation (with ``"kind": "validation"``).

    A number that is not finite is written as null, since JSON has none.

    Args:
        path: the file; made when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            InputError: it cannot be written.
        """
        line = json.dumps({key: _finite(value) for key, value in values.items()})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from error

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, and one that a crash left half-written.

        The file is replaced in one piece: a crash in here leaves the old one.

        Args:
            step: the last to keep; -1 empties the file.
        """
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if values["step"] <= step:
                kept.append(line + "\n")
        new = self.path.with_name(self.path.name + ".new")
        new.write_text("".join(kept), encoding="utf-8")
        os.replace(new, self.path)

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def describe_environment(*, device: torch.device, num_processes: int) -> dict[str, Any]:
    """What a run was started with: versions, machine, commit, command line, time (UTC)."""
    on_gpu, commit = device.type == "cuda", _git("rev-parse", "HEAD")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,  # pyright: ignore[reportAttributeAccessIssue]
        "num_processes": num_processes,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git_commit": commit,  # of the folder the run was started in
        "git_dirty": commit and bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def start_run_folder(
    folder: Path, *, device: torch.device, num_processes: int, step: int
) -> MetricsFile:
    """Make the folder and say in ``environment.json`` what the run is started with.

    The file is a list with one description a start: a resumed run adds its own to those before.
    Any other run starts with a list and a ``metrics.jsonl`` of its own.

    Args:
        folder: of the run.
        device, num_processes: that it runs on.
        step: steps done before; above 0 it is a resumed run.

    Returns:
        ``metrics.jsonl``, without lines of later steps.

    Raises:
        InputError: a resumed run finds no such list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, starts = folder / "environment.json", []
    if step > 0 and path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not valid JSON: move it away to go on") from error
    starts.append(describe_environment(device=device, num_processes=num_processes))
    new = path.with_name(path.name + ".new")  # a full disk leaves the old one
    try:
        new.write_text(json.dumps(starts, indent=2) + "\n", encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.truncate_after(step if step > 0 else -1)
    return metrics


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """git's answer about the working folder; None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
