"""What a run shows: progress bar and loggers, one step late, so that no step waits for them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchtune.training.metric_logging import DiskLogger, MetricLoggerInterface
from tqdm import tqdm

from moe_builders.errors import InputError
from moe_builders.instantiate import first_line, instantiate

Values = Mapping[str, Tensor | float | int]


class Reporter:
    """Collects a step's values and shows those of the step before.

    A step's tensors start their way to the host when they are handed in; by the time they are
    read, with the next step queued, they have arrived and nothing waits.

    Args:
        loggers: torchtune metric loggers; none on processes other than the first.
        total: steps in the run, for the bar.
        every: log every so many steps.
        show: draw the progress bar.
    """

    def __init__(
        self, loggers: list[MetricLoggerInterface], *, total: int, every: int, show: bool
    ) -> None:
        self.loggers, self.every = loggers, every
        self.bar = tqdm(total=total, disable=not show, unit="step", dynamic_ncols=True)
        self.history: list[dict[str, float]] = []
        self._waiting: tuple[int, dict[str, float], _OnTheWay] | None = None

    def step(self, number: int, values: Values) -> None:
        """Hand in a step's values; the previous step's are written."""
        self.flush()
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        plain = {name: float(v) for name, v in values.items() if not isinstance(v, Tensor)}
        self._waiting = (number, plain, _OnTheWay(tensors))
        self.bar.update()

    def flush(self) -> None:
        """Write what is waiting.

        Raises:
            InputError: the step's loss or gradient norm is not a finite number.
        """
        written = self._write()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(written.get(name, 0.0)):
                raise InputError(
                    f"{name} is {written[name]} at step {written['step']:.0f}: training has "
                    "diverged and nothing is saved; lower the learning rate, or look at the data "
                    "of that step"
                )

    def _write(self) -> dict[str, float]:
        if self._waiting is None:
            return {}
        number, plain, arriving = self._waiting
        self._waiting = None
        plain = {"step": number} | plain | arriving.values()
        self.history.append(plain)
        shown = ("loss", "balance", "tokens_per_second")
        self.bar.set_postfix_str(
            " ".join(f"{name}={plain[name]:.4g}" for name in shown if name in plain)
        )
        if number % self.every == 0:
            self.log({k: v for k, v in plain.items() if k != "step"}, number)
        return plain

    def log(self, values: Mapping[str, Any], number: int) -> None:
        """Write values to every logger at once."""
        with tqdm.external_write_mode():  # a logger may print: not into the bar's line
            for logger in self.loggers:
                logger.log_dict(values, number)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        """Write what is waiting, whatever it is; close bar and loggers."""
        self._write()
        self.bar.close()
        for logger in self.loggers:
            logger.close()


class _OnTheWay:
    """Scalars copied from the device without waiting for it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names = list(tensors)
        self.arrived = None
        self.numbers = torch.zeros(0, dtype=torch.float64)
        if tensors:
            stacked = torch.stack([tensor.detach().double() for tensor in tensors.values()])
            self.numbers = stacked.to("cpu", non_blocking=True)
            if stacked.is_cuda:
                self.arrived = torch.cuda.Event()
                self.arrived.record()

    def values(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True))


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory in use on a GPU so far; None on the CPU, where nobody counts it."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def build_loggers(node: Any, *, output_dir: str) -> list[MetricLoggerInterface]:
    """The loggers of a config; without any, a new text file under ``output_dir/logs``."""
    if node is None:
        return [DiskLogger(log_dir=f"{output_dir}/logs")]
    nodes = node if isinstance(node, list) else [node]
    try:
        return [
            instantiate(n, path="metric_logger" if len(nodes) == 1 else f"metric_logger[{i}]")
            for i, n in enumerate(nodes)
        ]
    except ImportError as error:
        raise InputError(
            f"metric_logger needs what is not installed: {first_line(error)}"
        ) from error
