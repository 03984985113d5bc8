"""Pictures hold what they should; how they look, a person looked at."""

import sys
import types

import pytest
import torch
from matplotlib import image

from moe_builders.errors import InputError
from moe_builders.training import plots
from moe_builders.training.plots import Plots

HISTORY = [
    {"step": n, "loss": 5.0 - n, "balance": 1.2, "grad_norm": 1.0, "lr": 1e-3, "max_violation": 0.5,
     "dead_experts": 0}
    for n in (1, 2, 3)
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """Every figure that was made, to look into."""
    made, new = [], plots._new_figure

    def remember(width, height):
        made.append(new(width, height))
        return made[-1]

    monkeypatch.setattr(plots, "_new_figure", remember)
    return made


def names(num_layers, first=0):
    return [f"layers.{n}" for n in range(first, first + num_layers)]


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 1), (2, 8), (48, 128), (94, 384)])
def test_a_heat_map_of_any_size(num_layers, num_experts, tmp_path, figures):
    counts = torch.randint(1, 50, (num_layers, num_experts))
    loads = {"training since the last validation": counts, "validation set": counts.flip(0)}
    Plots(tmp_path / "plots").draw_load(7, loads, names(num_layers))
    height, width, _ = image.imread(tmp_path / "plots/load_step_7.png").shape
    assert 200 < height < 2200
    assert 500 < width < 2300
    first, second, bar = figures[0].axes
    assert first.get_title().startswith("training since the last validation\nmax_violation ")
    assert second.get_title().startswith("validation set\n")
    assert "mean load" in bar.get_ylabel()
    assert first.get_xlabel() == "expert"
    assert len(first.get_xticks()) <= 16
    assert len(first.get_yticks()) <= 16


def test_colours_are_load_over_the_layers_mean(tmp_path, figures):
    counts = torch.tensor([[2, 2, 2, 2], [0, 10, 20, 50], [0, 0, 0, 0]])
    Plots(tmp_path).draw_load(1, {"x": counts}, names(3, first=3))
    axes = figures[0].axes[0]
    (drawn,) = axes.images
    table = drawn.get_array()
    assert table[0].tolist() == [1, 1, 1, 1]
    assert table[1, 1:].tolist() == [0.5, 1, 2.5]
    assert table.mask.tolist() == [[False] * 4, [True] + [False] * 3, [True] * 4]
    assert drawn.cmap(drawn.norm(1.0))[:3] == pytest.approx((1, 1, 1), abs=0.01), "1 is white"
    assert drawn.cmap.get_bad()[:3].tolist() == [0, 0, 0], "dead is black"
    assert drawn.cmap(drawn.norm(9.0)) == drawn.cmap(drawn.norm(4.0)), "one hot expert dims none"
    assert axes.get_title() == "x\nmax_violation 1.50, dead 5 of 12"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "4", "5"]
    assert [t.get_text() for t in axes.texts[4:8]] == ["dead", "0.50", "1.00", "2.50"]


def test_mean_scores_have_a_picture_of_their_own(tmp_path, figures):
    used = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.7, 0.2, 0.1, 0.0]], dtype=torch.float64)
    Plots(tmp_path).draw_usage(5, {"x": used, "y": used.flip(0)}, names(2))
    assert (tmp_path / "usage_step_5.png").stat().st_size > 5_000
    first, second, bar = figures[0].axes
    table = first.images[0].get_array()
    assert table[0].tolist() == [1, 1, 1, 1], "white"
    assert table[1, :3].tolist() == pytest.approx([2.8, 0.8, 0.4])
    assert table.mask[1].tolist() == [False, False, False, True]
    assert first.get_title() == "x\nhighest 2.80, lowest 0.00"
    assert second.get_title().startswith("y")
    assert bar.get_ylabel() == "mean score × number of experts (black: 0)"


def test_curves(tmp_path, figures):
    drawn = Plots(tmp_path)
    drawn.draw_curves([], [])
    assert not figures, "nothing to draw yet"
    drawn.draw_curves([], [{"step": 0, "val_loss": 5.0}])
    drawn.draw_curves(HISTORY, [{"step": 0, "val_loss": 5.0}, {"step": 3, "val_loss": 2.5}])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    axes = {a.get_title(): a for a in figures[-1].axes}
    loss = axes["loss"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines == {"loss": [[1, 4], [2, 3], [3, 2]], "val_loss": [[0, 5], [3, 2.5]]}
    assert loss.get_ylabel() == "nats per labelled token"
    assert {"gradient norm before clipping", "learning rate"} < set(axes)
    assert any(title.startswith("balancing loss") for title in axes)
    assert all(a.get_xlabel() == "step" for a in axes.values())


def test_a_diverged_run_is_drawn_up_to_there(tmp_path):
    bad = [*HISTORY, {"step": 4, "loss": float("nan"), "grad_norm": float("inf")}]
    Plots(tmp_path).draw_curves(bad, [])
    assert (tmp_path / "curves.png").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(InputError, match=r"curves\.png cannot be written: File exists"):
        Plots(tmp_path / "plots").draw_curves(HISTORY, [])


def test_no_window_and_no_global_state(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", types.ModuleType("forbidden"))
    Plots(tmp_path).draw_curves(HISTORY, [])


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"plots=true needs the package matplotlib.*pip install"):
        Plots(tmp_path)
