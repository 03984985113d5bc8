"""What every benchmark needs: seconds, exact memory, where it ran, and a file that is never half.

Nothing here knows of models.
"""

import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchtune", "torchao", "transformers", "moe-builders")


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call; on a GPU between two events, so that launching ahead counts."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    function()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive at once during ``function``, above those alive before it.

    Exact and repeatable, unlike a process's resident size: torch's allocators count every tensor,
    those inside operators and in the backward's threads too. Not counted is what libraries take
    for themselves (oneDNN's scratch on a CPU, cuBLAS's workspace).

    Args:
        function: called twice. What it leaves alive (the last step's routing) is freed by the
            second call, which is thereby seen as one in the middle of a run.
        device: CPU: the profiler's record of every allocation; GPU: torch.cuda's own peak.
    """
    if device.type == "cuda":
        function()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
        function()
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")


def resident_bytes() -> int:
    """Most memory this process ever had, as the system counts it; differs from run to run."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def circumstances(device: torch.device, threads: int) -> dict[str, Any]:
    """Commit, versions, machine: what a number is worthless without."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_before": os.getloadavg(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def save(values: Any, path: Path) -> None:
    """Write JSON under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(path)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
