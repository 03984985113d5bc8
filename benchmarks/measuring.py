"""What every benchmark needs: seconds, exact memory, where it ran, and a file that is never half.

Nothing here knows of models.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchtune", "torchao", "transformers", "moe-builders")
OPTIONAL = ("triton", "st-moe-pytorch", "liger-kernel")  # null in a report: not installed


class Deadline:
    """When a script has to be done, so that it stops by itself and says what it left out.

    Args:
        minutes: from now; None: never.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds; never below 0."""
        return max(0.0, self._end - time.monotonic())


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
    changes = [e for e in events if e["name"] == "[memory]"]
    if not changes:
        return 0
    first = min(changes, key=lambda e: e["ts"])["args"]
    # the running total knows of earlier measurements' tensors, but not that they were freed since
    before = first["Total Allocated"] - first["Bytes"]
    return max(e["args"]["Total Allocated"] for e in changes) - before


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from a forward to its backward; each storage once.

    Args:
        forward: its answer is dropped.
        parameters: are there anyway, and so are views of them.
    """
    there = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, Tensor] = {}  # alive until the end, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = forward()
    del answer
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in there)


def peak_rates(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> dict[str, float]:
    """What this device does at its best, now: FLOP/s of a large product, bytes/s of a copy.

    On random numbers: zeros need less power, and so run faster on a GPU. The median of five.

    Args:
        device: where.
        dtype: of the product.
        tiny: sizes for trying, not for measuring.

    Returns:
        "flops_per_second", and "bytes_per_second" (read and written both counted).
    """
    gpu = device.type == "cuda"
    side = 64 if tiny else 8192 if gpu else 2048
    size = 2**12 if tiny else 2**31 if gpu else 2**28  # bytes
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _median_seconds(lambda: a @ b, device)
    copy = _median_seconds(lambda: target.copy_(source), device)
    return {"flops_per_second": 2 * side**3 / product, "bytes_per_second": 2 * size / copy}


def _median_seconds(function: Callable[[], object], device: torch.device) -> float:
    times = [seconds_of(function, device) for _ in range(7)]
    return statistics.median(times[2:])


def resident_bytes() -> int:
    """Most memory this process ever had, as the system counts it; differs from run to run."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def circumstances(device: torch.device, threads: int) -> dict[str, Any]:
    """Commit, versions, machine: what a number is worthless without."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES}
        | {name: _version_or_none(name) for name in OPTIONAL},
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


def leave_out(report: dict[str, Any], what: str) -> None:
    """Note in a report, and say, what was not measured."""
    report["skipped"].append(f"skipped: {what}")
    print(report["skipped"][-1], flush=True)


def _version_or_none(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
