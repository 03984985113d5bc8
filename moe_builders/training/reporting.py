"""What a run shows: progress bar, loggers, files and plots, one step late, so that no step waits.

Letters: l layers with experts · e num_experts. A load is a table [3, l, e] of
``training.objective.layer_loads``: assignments, those that were kept, sums of scores.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torchtune.training.metric_logging import MetricLoggerInterface
from tqdm import tqdm

from moe_builders.errors import InputError
from moe_builders.metrics import (
    detailed_metrics,
    extreme_experts,
    layer_metrics,
    load_metrics,
    usage,
)
from moe_builders.training.finite_watch import Watched, first_bad, where_it_began
from moe_builders.training.on_the_way import OnTheWay
from moe_builders.training.run_files import MetricsFile
from moe_builders.training.stragglers import Stragglers, lag

Values = Mapping[str, Tensor | float | int]
Lines = list[dict[str, float]]


class Pictures(Protocol):
    """What draws a run; see ``training.plots``."""

    def draw_load(self, step: int, loads: Mapping[str, Tensor], layers: Sequence[str]) -> None:
        """loads: title -> counts [l, e]; layers: l names."""
        ...

    def draw_usage(self, step: int, usages: Mapping[str, Tensor], layers: Sequence[str]) -> None:
        """usages: title -> mean scores [l, e]; layers: l names."""
        ...

    def draw_curves(self, history: Lines, validations: Lines) -> None:
        """Lines: values by name, with their "step"."""
        ...


class Reporter:
    """Collects a step's values and shows those of the step before.

    A step's tensors start their way to the host when they are handed in; by the time they are
    read, with the next step queued, they have arrived and nothing waits.

    Every process has one and keeps the history; loggers, files and pictures are the first's.

    Args:
        loggers: torchtune metric loggers; none on processes other than the first.
        total: steps in the run, for the bar.
        every: log every so many steps.
        show: draw the progress bar.
        history, validations, load: ``shown`` of the run that is resumed; a load [l, e] of a run
            that knew no drops and no scores counts as kept, and leaves usage unknown (NaN) until
            the next validation.
        layers: l names of layers with experts.
        log_layers: each layer's values go to the loggers too, and how layers and experts differ.
        log_experts: so many of the most and of the least used experts go to the loggers.
        metrics: file that gets every step and validation.
        pictures: drawn at each validation and at the end.
        gather: gives what each process has, by rank; asked when a run has diverged.

    Attributes:
        history, validations: values of every step and validation.
        asked_to_stop: whether any process was asked to stop when the last step that was written
            began; the same on all processes, as each writes the same steps.
    """

    def __init__(
        self,
        loggers: list[MetricLoggerInterface],
        *,
        total: int,
        every: int,
        show: bool,
        history: Sequence[dict[str, float]] = (),
        validations: Sequence[dict[str, float]] = (),
        load: Sequence[Any] | None = None,
        layers: Sequence[str] = (),
        log_layers: bool = False,
        log_experts: int = 0,
        metrics: MetricsFile | None = None,
        pictures: Pictures | None = None,
        gather: Callable[[Any], list[Any]] = lambda found: [found],
    ) -> None:
        self.loggers, self.every = loggers, every
        self.layers, self.log_layers, self.log_experts = layers, log_layers, log_experts
        self.metrics, self.pictures, self.gather = metrics, pictures, gather
        self.history, self.validations = list(history), list(validations)
        self.asked_to_stop, self._stragglers = False, Stragglers()
        self.bar = tqdm(
            total=total, initial=len(history), disable=not show, unit="step", dynamic_ncols=True
        )
        self._waiting: tuple[int, dict[str, float], OnTheWay, Watched | None] | None = None
        self._load = None if load is None else _restored(load)  # since the last validation

    def step(
        self,
        number: int,
        values: Values,
        *,
        load: Tensor | None = None,
        watched: Watched | None = None,
    ) -> None:
        """Hand in a step's values; the previous step's are written.

        Args:
            number: of the step.
            values: numbers, or scalar tensors on any device; ``own_seconds`` [size, 2] is of all
                processes (``training.stragglers``).
            load: [3, l, e] of the step over all processes.
            watched: what this process saw of the step.

        Raises:
            InputError: the previous step has diverged.
        """
        self.flush()
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        plain = {name: float(v) for name, v in values.items() if not isinstance(v, Tensor)}
        tensors |= {} if load is None else {"load": load}
        tensors |= {} if watched is None else {"watched": watched.sums}
        self._waiting = (number, plain, OnTheWay(tensors), watched)
        self.bar.update()

    def flush(self) -> None:
        """Write what is waiting.

        Raises:
            InputError: the step's loss or gradient norm is not a finite number.
        """
        written, where = self._write()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(written.get(name, 0.0)):
                found = self.gather(where)  # these values are the same on all: so all ask
                began = where_it_began(found)
                raise InputError(
                    f"{name} is {written[name]} at step {written['step']:.0f}"
                    f"{f', first {began}' if began else ''}: training has diverged and nothing is "
                    "saved; lower the learning rate, or look at the data of that step"
                )

    def _write(self) -> tuple[dict[str, float], tuple[int, str] | None]:
        if self._waiting is None:
            return {}, None
        number, plain, arriving, watched = self._waiting
        self._waiting = None
        arrived = arriving.values()
        load, sums = arrived.pop("load", None), arrived.pop("watched", None)
        own = arrived.pop("own_seconds", None)
        plain |= {} if own is None else lag(own)
        self.say(*([] if own is None else self._stragglers.see(number, own)))
        plain = {"step": number} | plain | {name: v.item() for name, v in arrived.items()}
        self.asked_to_stop = plain.pop("stop", 0) > 0
        extra: dict[str, float] = {}
        if load is not None:
            self._load = load if self._load is None else self._load + load
            plain |= {name: float(v) for name, v in load_metrics(load).items()}
            extra = self._details(load, "")
        self.history.append(plain)
        shown = ("loss", "balance", "tokens_per_second", "mfu")
        self.bar.set_postfix_str(
            " ".join(f"{name}={plain[name]:.4g}" for name in shown if name in plain)
        )
        if self.metrics is not None:
            self.metrics.append({"step": number} | plain)
        if number % self.every == 0:
            self.log({k: v for k, v in plain.items() if k != "step"} | extra, number)
        bad = None if watched is None or sums is None else first_bad(watched.places, sums.tolist())
        return plain, bad

    def shown(self) -> dict[str, Any]:
        """JSON: what another reporter goes on from."""
        load = None if self._load is None else self._load.tolist()
        return {"history": self.history, "validations": self.validations, "load": load}

    def has_validated(self, number: int) -> bool:
        """Whether the last validation followed step ``number``."""
        return bool(self.validations) and self.validations[-1]["step"] == number

    def validated(self, number: int, values: Mapping[str, float], load: Tensor) -> None:
        """Show and keep a validation, and draw the load since the one before.

        Args:
            number: of the step it follows.
            values: of the validation set.
            load: [3, l, e] of the validation set over all processes.

        Raises:
            InputError: the step before it has diverged.
        """
        self.flush()
        load, train = load.cpu(), self._load
        values = dict(values) | {f"val_{k}": float(v) for k, v in load_metrics(load).items()}
        self.validations.append({"step": number} | values)
        self.log(values | self._details(load, "val_"), number)
        self.say(f"step {number}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        loads = {"validation set": load} if train is None else {
            "training since the last validation": train, "validation set": load}  # fmt: skip
        if self.metrics is not None:
            tables = {"val_load": load} | ({} if train is None else {"load": train})
            lists: dict[str, Any] = {n: table[0].long().tolist() for n, table in tables.items()}
            for name, table in tables.items():
                prefix = name.removesuffix("load")
                lists[f"{prefix}usage"] = usage(table[2]).tolist()
                lists |= {f"{prefix}layers_{k}": v for k, v in layer_metrics(table).items()}
            line = {"step": number, "kind": "validation"}
            self.metrics.append(line | values | lists)
        self._draw(number, loads)

    def _draw(self, number: int, loads: Mapping[str, Tensor]) -> None:
        self._load = None
        if self.pictures is None:
            return
        if loads:
            counts = {title: load[0] for title, load in loads.items()}
            self.pictures.draw_load(number, counts, self.layers)
        known = {title: usage(load[2]) for title, load in loads.items() if load.isfinite().all()}
        if known:
            self.pictures.draw_usage(number, known, self.layers)
        self.pictures.draw_curves(self.history, self.validations)

    def _details(self, load: Tensor, prefix: str) -> dict[str, float]:
        """What only a detailed log has of a load."""
        found: dict[str, float] = {}
        if self.log_layers:
            found |= {f"{prefix}{name}": v for name, v in detailed_metrics(load).items()}
            for measure, values in layer_metrics(load).items():
                for layer, value in zip(self.layers, values, strict=True):
                    found[f"{layer}/{prefix}{measure}"] = float(value)
        for (layer, expert), value in extreme_experts(load[0], self.log_experts).items():
            number = self.layers[layer].removeprefix("layers.")
            found[f"{prefix}moe_expert_utilization/layer_{number}_expert_{expert}"] = value
        return found

    def log(self, values: Mapping[str, Any], number: int) -> None:
        """Write values to every logger at once."""
        with tqdm.external_write_mode():  # a logger may print: not into the bar's line
            for logger in self.loggers:
                logger.log_dict(values, number)

    def say(self, *lines: str) -> None:
        """Print lines above the bar."""
        for line in lines if not self.bar.disable else ():
            self.bar.write(line)

    def close(self) -> None:
        """Write what is waiting, whatever it is; close bar and loggers."""
        self._write()
        if self.history:
            left = self._load  # of steps that no validation followed
            loads = {} if left is None else {"training since the last validation": left}
            self._draw(int(self.history[-1]["step"]), loads)
        self.bar.close()
        for logger in self.loggers:
            logger.close()


def _restored(load: Sequence[Any]) -> Tensor:
    """[3, l, e] from the JSON of ``shown``, also from that of a run that kept [l, e]."""
    table = torch.tensor(load, dtype=torch.float64)
    if table.dim() == 2:
        return torch.stack([table, table, torch.full_like(table, torch.nan)])
    return table


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory in use so far [GiB], of this process.

    On a GPU what tensors took there (``peak_memory_gib``); on the CPU, where nobody counts tensors,
    the process's resident memory, libraries included (``peak_rss_gib``).
    """
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    import resource  # not on every platform: only where it is asked

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
