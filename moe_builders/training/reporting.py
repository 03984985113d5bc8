"""What a run shows: progress bar and loggers, one step late, so that no step waits for them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchtune.training.metric_logging import DiskLogger, MetricLoggerInterface
from tqdm import tqdm

from moe_builders.instantiate import instantiate

Values = Mapping[str, Tensor | float | int]


class Reporter:
    """Collects a step's values and shows those of the step before.

    Reading a tensor waits for the device; by the next step the values are there anyway.

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
        self._waiting: tuple[int, Values] | None = None

    def step(self, number: int, values: Values) -> None:
        """Hand in a step's values; the previous step's are written."""
        self.flush()
        self._waiting = (number, values)
        self.bar.update()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._waiting is None:
            return
        number, values = self._waiting
        self._waiting = None
        plain = {"step": number} | {name: float(value) for name, value in values.items()}
        self.history.append(plain)
        shown = ("loss", "balance", "tokens_per_second")
        self.bar.set_postfix_str(
            " ".join(f"{name}={plain[name]:.4g}" for name in shown if name in plain)
        )
        if number % self.every == 0:
            self.log({k: v for k, v in plain.items() if k != "step"}, number)

    def log(self, values: Mapping[str, Any], number: int) -> None:
        """Write values to every logger at once."""
        for logger in self.loggers:
            logger.log_dict(values, number)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        """Write the last step, close bar and loggers."""
        self.flush()
        self.bar.close()
        for logger in self.loggers:
            logger.close()


def build_loggers(node: Any, *, output_dir: str) -> list[MetricLoggerInterface]:
    """The loggers of a config; without any, a new text file under ``output_dir/logs``."""
    if node is None:
        return [DiskLogger(log_dir=f"{output_dir}/logs")]
    nodes = node if isinstance(node, list) else [node]
    return [
        instantiate(n, path="metric_logger" if len(nodes) == 1 else f"metric_logger[{i}]")
        for i, n in enumerate(nodes)
    ]
