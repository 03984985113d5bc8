"""A switch for torch's profiler: a few steps as a trace for a browser and a table of operators."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moe_builders.errors import InputError


class StepProfiler:
    """Profiles some steps of a run; a context manager that is told when each step is over.

    It writes ``rank_N.json.gz`` (open it in https://ui.perfetto.dev) and ``rank_N.txt``, the
    operators that took longest, as soon as its last step is over.

    Args:
        folder: made when there is something to write.
        enabled: with False nothing is done at all.
        rank: N.
        num_steps: that the run is going to make.
        wait_steps: left alone at first.
        warmup_steps: profiled and thrown away, as the first ones pay for the profiler's start.
        active_steps: profiled.
        record_shapes, with_stack, profile_memory: torch's; each makes steps slower.

    Raises:
        InputError: the run is shorter than what is to be profiled.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        num_steps: int,
        enabled: bool,
        wait_steps: int,
        warmup_steps: int,
        active_steps: int,
        record_shapes: bool = False,
        with_stack: bool = False,
        profile_memory: bool = False,
    ) -> None:
        self._profile = None
        if not enabled:
            return
        needed = wait_steps + warmup_steps + active_steps
        if num_steps < needed:
            raise InputError(
                f"the profiler needs {needed} steps (profiler.wait_steps {wait_steps} + "
                f"warmup_steps {warmup_steps} + active_steps {active_steps}), but the run has "
                f"only {num_steps}: lower them or train longer"
            )
        self.folder, self.rank = folder, rank
        on_gpu = torch.cuda.is_available()
        self._sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        self._profile = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
            schedule=schedule(wait=wait_steps, warmup=warmup_steps, active=active_steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=record_shapes,
            with_stack=with_stack,
            profile_memory=profile_memory,
        )

    def __enter__(self) -> "StepProfiler":
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._profile.stop()

    def step(self) -> None:
        """A step is over."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self.folder / f"rank_{self.rank}.json.gz"))
        table = done.key_averages().table(sort_by=self._sort_by, row_limit=30)
        (self.folder / f"rank_{self.rank}.txt").write_text(table + "\n", encoding="utf-8")
