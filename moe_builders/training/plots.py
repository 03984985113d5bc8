"""Pictures of a run: heat maps of the experts' load and mean scores, and the curves.

Letters: l layers with experts · e num_experts.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.metrics import dead_experts, max_violation, relative_load

_DPI = 110
_HIGHEST = 4.0  # loads above are drawn as this one: a single hot expert must not dim the rest
_DEAD = "black"
Lines = Sequence[Mapping[str, float]]
# one panel each: title, unit, names of the values
_PANELS = (
    ("loss", "nats per labelled token", ("loss", "val_loss")),
    ("balancing loss", "", ("balance",)),
    ("worst layer's max_violation (0 = balanced)", "max load / mean load − 1",
     ("max_violation", "val_max_violation")),
    ("dead experts, all layers", "experts", ("dead_experts", "val_dead_experts")),
    ("gradient norm before clipping", "", ("grad_norm",)),
    ("learning rate", "", ("lr",)),  # and those of groups with one of their own
)  # fmt: skip


class Plots:
    """PNG files of a run in one folder.

    Args:
        folder: made when the first picture is drawn.

    Raises:
        InputError: matplotlib is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("matplotlib") is None:
            raise InputError(
                "plots=true needs the package matplotlib, which is not installed: "
                "pip install matplotlib, or set plots=false"
            )
        self.folder = folder

    def draw_load(self, step: int, loads: Mapping[str, Tensor], layers: Sequence[str]) -> None:
        """``load_step_N.png``: load over its layer's mean, white where balanced, black where dead.

        Args:
            step: N.
            loads: title -> counts [l, e]; one heat map each, side by side.
            layers: l names of the rows.
        """
        titles = {
            f"{title}\nmax_violation {max_violation(counts).max():.2f}, dead "
            f"{dead_experts(counts).sum()} of {counts.numel()}": relative_load(counts)
            for title, counts in loads.items()
        }
        figure = _heat_maps(
            titles, layers, title=f"expert load at step {step}",
            unit="load / mean load of the layer (black: no token)",
        )  # fmt: skip
        self._save(figure, f"load_step_{step}.png")

    def draw_usage(self, step: int, usages: Mapping[str, Tensor], layers: Sequence[str]) -> None:
        """``usage_step_N.png``: mean score times e, white where balanced.

        Args:
            step: N.
            usages: title -> mean scores [l, e]; one heat map each, side by side.
            layers: l names of the rows.
        """
        titles = {
            f"{title}\nhighest {(used * used.shape[-1]).max():.2f}, lowest "
            f"{(used * used.shape[-1]).min():.2f}": used * used.shape[-1]
            for title, used in usages.items()
        }
        figure = _heat_maps(
            titles, layers, title=f"mean score of the experts at step {step}",
            unit="mean score × number of experts (black: 0)",
        )  # fmt: skip
        self._save(figure, f"usage_step_{step}.png")

    def draw_curves(self, history: Lines, validations: Lines) -> None:
        """``curves.png``, written anew.

        Args:
            history: values of each step.
            validations: of each validation.
        """
        lines = [*history, *validations]
        panels = [panel for panel in _PANELS if any(n in line for n in panel[2] for line in lines)]
        if not panels:
            return
        rows = (len(panels) + 1) // 2
        figure = _new_figure(11.0, 2.4 * rows + 0.3)
        all_axes = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes, (title, unit, names) in zip(all_axes, panels, strict=False):
            groups = {key for line in lines for key in line if key.startswith(f"{names[0]}/")}
            for name in (*names, *sorted(groups)):
                points = [(line["step"], line[name]) for line in lines if name in line]
                if not points:
                    continue
                many = len(points) > 40
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2,
                          marker=None if many else "o", markersize=3)  # fmt: skip
            axes.set_title(title, fontsize=10)
            axes.set_ylabel(unit, fontsize=8)
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            if len(axes.lines) > 1:
                axes.legend(fontsize=8)
        for axes in all_axes[len(panels) :]:
            axes.remove()
        self._save(figure, "curves.png")

    def _save(self, figure: Any, name: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / name, dpi=_DPI)
        except OSError as error:
            raise InputError(f"{self.folder / name} cannot be written: {error.strerror}") from error


def _heat_maps(
    tables: Mapping[str, Tensor], layers: Sequence[str], *, title: str, unit: str
) -> Any:
    """A figure of heat maps side by side: title -> [l, e], where 1 is white and 0 is black."""
    num_layers, num_experts = next(iter(tables.values())).shape
    width = min(max(3.4, 0.055 * num_experts + 1.2), 9.0)
    height = min(max(1.5, 0.16 * num_layers), 16.0)
    figure = _new_figure(width * len(tables) + 0.9, height + 1.6)
    all_axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    drawn = None
    for axes, (name, table) in zip(all_axes, tables.items(), strict=True):
        drawn = _heat_map(axes, table, layers)
        axes.set_title(name, fontsize=9)
    all_axes[0].set_ylabel("layer")
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(drawn, ax=list(all_axes), extend="max", fraction=0.04, pad=0.02)
    bar.set_label(unit, fontsize=8)
    bar.set_ticks([0, 0.5, 1, 2, 3, _HIGHEST], labels=["0", "½", "1", "2", "3", "≥ 4"])
    return figure


def _heat_map(axes: Any, table: Tensor, layers: Sequence[str]) -> Any:
    from matplotlib.colors import TwoSlopeNorm

    num_layers, num_experts = table.shape
    table = table.masked_fill(table == 0, torch.nan)
    drawn = axes.imshow(
        table.numpy(), aspect="auto", interpolation="nearest", cmap=_colours(),
        norm=TwoSlopeNorm(vmin=0, vcenter=1, vmax=_HIGHEST),
    )  # fmt: skip
    axes.set_facecolor(_DEAD)
    axes.set_xlabel("expert")
    axes.set_xticks(_few(num_experts))
    rows = _few(num_layers)
    axes.set_yticks(rows, labels=[layers[row].removeprefix("layers.") for row in rows])
    if num_layers * num_experts <= 64:  # few enough to read as numbers
        for row, column in torch.cartesian_prod(*map(torch.arange, table.shape)).tolist():
            value = float(table[row, column])
            text = "dead" if value != value else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7,
                      color="white" if value != value or value > 3 else "black")  # fmt: skip
    return drawn


def _new_figure(width: float, height: float) -> Any:
    """A figure [inches] of its own: nothing is registered with pyplot, no window is opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colours() -> Any:
    """Blue below the mean, white at it, red above; black is left for the dead."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list(
        "load", [(0.0, "#2166ac"), (0.25, "#92c5de"), (0.5, "#ffffff"), (0.7, "#f4a582"),
                 (1.0, "#a50f15")])  # fmt: skip
    return colours.with_extremes(bad=_DEAD)


def _few(number: int) -> list[int]:
    """At most 16 of 0 … number-1, evenly."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if number <= 16 * s)
    return list(range(0, number, step))
