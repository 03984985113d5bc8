"""The reporter writes one step late and loses none."""

import json

import pytest
import torch

from moe_builders.errors import InputError
from moe_builders.training.finite_watch import Watched
from moe_builders.training.reporting import Reporter, peak_memory
from moe_builders.training.run_files import MetricsFile


class Recorder:
    """A metric logger that remembers."""

    def __init__(self):
        self.lines, self.closed = [], 0

    def log_dict(self, values, step):
        self.lines.append((step, dict(values)))

    def close(self):
        self.closed += 1


def reporter(*, every=1, total=10, show=False):
    recorder = Recorder()
    return Reporter([recorder], total=total, every=every, show=show), recorder


def test_a_steps_values_are_read_when_the_next_step_has_been_launched():
    made, recorder = reporter()
    value = torch.tensor(5.0)
    made.step(1, {"loss": value})
    value.fill_(99)  # what the step handed in was copied then, not later
    assert recorder.lines == []
    made.step(2, {"loss": torch.tensor(6.0)})
    assert recorder.lines == [(1, {"loss": 5.0})]
    made.flush()
    made.close()
    assert recorder.lines == [(1, {"loss": 5.0}), (2, {"loss": 6.0})]
    assert recorder.closed == 1


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_step_stops_the_run(name, value):
    made, _ = reporter()
    made.step(1, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)})
    made.step(2, {"loss": torch.tensor(1.0), name: torch.tensor(value)})
    with pytest.raises(InputError, match=f"{name} is (nan|inf) at step 2: training has diverged"):
        made.flush()


def test_history_holds_every_step_and_loggers_every_nth():
    made, recorder = reporter(every=3)
    for number in range(1, 8):
        made.step(number, {"loss": torch.tensor(float(number)), "tokens": number})
    made.flush()
    made.close()
    assert [line["step"] for line in made.history] == list(range(1, 8))
    assert made.history[4] == {"step": 5, "loss": 5.0, "tokens": 5.0}
    assert recorder.lines == [(n, {"loss": float(n), "tokens": float(n)}) for n in (3, 6)]
    assert all(type(v) is float for _, values in recorder.lines for v in values.values())


def test_flushing_twice_writes_once():
    made, recorder = reporter()
    made.flush()
    made.step(1, {"loss": 1})
    made.flush()
    made.flush()
    made.log({"val_loss": 2.0}, 1)
    made.close()
    assert recorder.lines == [(1, {"loss": 1.0}), (1, {"val_loss": 2.0})]


def test_a_run_without_a_step_closes_quietly():
    made, recorder = reporter()
    made.close()
    assert (recorder.lines, made.history, recorder.closed) == ([], [], 1)


def test_what_is_shown(capsys):
    made, _ = reporter(show=True, total=2)
    for number in (1, 2):
        made.step(number, {"loss": 1.23456, "balance": 1.0, "z": 9, "tokens_per_second": 1e5})
    made.say("step 2: val_loss 3.0")
    made.close()
    out, shown = capsys.readouterr()
    assert "step 2: val_loss 3.0" in out + shown
    assert "2/2" in shown
    assert "loss=1.235 balance=1 tokens_per_second=1e+05" in shown
    assert shown.endswith("\n"), "what comes next stands on a line of its own"
    quiet, _ = reporter(show=False)
    quiet.step(1, {"loss": 1})
    quiet.say("nobody hears this")
    quiet.close()
    assert capsys.readouterr() == ("", "")


COUNTS = torch.tensor([[4, 4, 4, 4], [8, 4, 4, 0]])  # of two layers, the second with a dead expert
KEPT = torch.tensor([[4, 4, 4, 4], [4, 4, 4, 0]])
SCORES = torch.tensor([[2.0, 2, 2, 2], [5, 1, 1, 1]])  # of 8 tokens
LOAD = torch.stack([COUNTS.double(), KEPT.double(), SCORES.double()])
BRIEF = {"max_violation": 1.0, "dead_experts": 1.0, "load_entropy": 0.875,
         "load_cv": (2 / 3) ** 0.5 / 2, "drop_rate": 0.125}  # fmt: skip


class Pictures:
    """Remembers what it was to draw."""

    def __init__(self):
        self.loads, self.usages, self.curves = [], [], []

    def draw_load(self, step, loads, layers):
        self.loads.append((step, {k: v.tolist() for k, v in loads.items()}, list(layers)))

    def draw_usage(self, step, usages, layers):
        self.usages.append((step, {k: v.tolist() for k, v in usages.items()}, list(layers)))

    def draw_curves(self, history, validations):
        self.curves.append((len(history), len(validations)))


def test_load_of_each_layer_goes_where_it_belongs(tmp_path):
    recorder, pictures = Recorder(), Pictures()
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    made = Reporter(
        [recorder], total=3, every=2, show=False, layers=["layers.0", "layers.2"],
        log_layers=True, metrics=metrics, pictures=pictures,
    )  # fmt: skip
    made.validated(0, {"val_loss": 4.0}, LOAD)
    for number in (1, 2, 3):
        made.step(number, {"loss": torch.tensor(1.0)}, load=LOAD)
    made.validated(3, {"val_loss": 3.0}, LOAD + 1)
    made.close()

    assert made.history[0] == pytest.approx({"step": 1, "loss": 1.0} | BRIEF)
    assert [line["step"] for line in made.validations] == [0, 3]
    assert made.validations[0]["val_dead_experts"] == 1.0
    assert made.validations[1]["val_dead_experts"] == 0.0

    logged = {number: values for number, values in recorder.lines}
    assert set(logged) == {0, 2, 3}, "steps every second time, validations always"
    root = (2 / 3) ** 0.5
    by_layer = {
        "max_violation": (0, 1), "dead_experts": (0, 1), "load_entropy": (1, 0.75),
        "load_cv": (0, root), "load_diversity": (1, 2**-0.5), "drop_rate": (0, 0.25),
        "usage_variance": (0, (0.375**2 + 3 * 0.125**2) / 4),
    }  # fmt: skip
    detailed = {
        "load_cv_median": root / 2, "load_cv_min": 0, "load_cv_max": root,
        "load_diversity": (1 + 2**-0.5) / 2, "load_diversity_min": 2**-0.5,
        "dead_expert_frac": 0.125, "utilisation_min": 0, "utilisation_p25": 1,
        "utilisation_median": 1, "utilisation_p75": 1, "utilisation_max": 2,
        "usage_variance": by_layer["usage_variance"][1] / 2,
    }  # fmt: skip
    each = {
        f"layers.{layer}/{name}": pair[place]
        for name, pair in by_layer.items()
        for place, layer in enumerate((0, 2))
    }
    assert logged[2] == pytest.approx({"loss": 1.0} | BRIEF | detailed | each)
    assert logged[0]["val_utilisation_max"] == 2.0
    assert logged[0]["layers.2/val_max_violation"] == 1.0
    assert all(type(v) is float for values in logged.values() for v in values.values())

    lines = metrics.read()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3], "every step has a line"
    assert "load" not in lines[0]
    assert lines[0]["kind"] == lines[4]["kind"] == "validation"
    assert lines[4]["load"] == (3 * COUNTS).tolist(), "of all steps since the last validation"
    assert lines[4]["val_load"] == (COUNTS + 1).tolist()
    assert type(lines[4]["load"][0][0]) is int
    assert lines[4]["usage"] == (SCORES / 8).tolist()
    assert lines[4]["val_usage"] == ((SCORES.double() + 1) / 12).tolist()
    assert lines[4]["layers_drop_rate"] == [0.0, 0.25]
    assert lines[4]["layers_max_violation"] == [0.0, 1.0]
    assert lines[4]["layers_dead_experts"] == [0, 1]
    assert lines[4]["val_layers_dead_experts"] == [0, 0]

    names = ["layers.0", "layers.2"]
    since, val = "training since the last validation", "validation set"
    assert pictures.loads == [
        (0, {val: COUNTS.tolist()}, names),
        (3, {since: (3 * COUNTS).tolist(), val: (COUNTS + 1).tolist()}, names),
    ]
    assert [(step, list(maps)) for step, maps, _ in pictures.usages] == [
        (0, [val]),
        (3, [since, val]),
    ]
    assert pictures.usages[1][1][since] == (SCORES / 8).tolist()
    assert pictures.curves == [(0, 1), (3, 2), (3, 2)], "and at the end"


def test_without_validation_the_load_is_drawn_at_the_end():
    pictures = Pictures()
    made = Reporter([], total=2, every=1, show=False, layers=["a", "b"], pictures=pictures)
    for number in (1, 2):
        made.step(number, {"loss": 1.0}, load=LOAD)
    made.close()
    (drawn,) = pictures.loads
    assert drawn[:2] == (2, {"training since the last validation": (2 * COUNTS).tolist()})


def test_layers_are_logged_only_when_asked_for():
    made, recorder = reporter()
    made.step(1, {"loss": 1.0}, load=LOAD)
    made.close()
    ((_, values),) = recorder.lines
    assert set(values) == {"loss", *BRIEF}


def test_the_most_and_the_least_used_experts():
    recorder = Recorder()
    made = Reporter([recorder], total=1, every=1, show=False, layers=["layers.0", "layers.2"],
                    log_experts=1)  # fmt: skip
    made.step(1, {"loss": 1.0}, load=LOAD)
    made.validated(1, {"val_loss": 1.0}, LOAD)
    made.close()
    values, validation = (line for _, line in recorder.lines)
    experts = {"moe_expert_utilization/layer_2_expert_0": 2.0,
               "moe_expert_utilization/layer_2_expert_3": 0.0}  # fmt: skip
    assert values == pytest.approx({"loss": 1.0} | BRIEF | experts)
    assert {f"val_{name}" for name in experts} < set(validation)


def test_a_run_resumed_from_before_scores_were_kept(tmp_path):
    """Its load is a table of counts [l, e]; usage is unknown until the next validation."""
    pictures, metrics = Pictures(), MetricsFile(tmp_path / "metrics.jsonl")
    made = Reporter(
        [], total=2, every=1, show=False, layers=["a", "b"], load=COUNTS.tolist(),
        log_layers=True, metrics=metrics, pictures=pictures,
    )  # fmt: skip
    made.step(1, {"loss": 1.0}, load=LOAD)
    made.validated(1, {"val_loss": 1.0}, LOAD)
    made.step(2, {"loss": 1.0}, load=LOAD)
    made.validated(2, {"val_loss": 1.0}, LOAD)
    _, first, _, second = metrics.read()
    assert first["load"] == (2 * COUNTS).tolist()
    assert first["layers_drop_rate"] == [0.0, 0.125], "then nothing was dropped"
    assert first["usage"] == [[None] * 4] * 2
    assert first["layers_usage_variance"] == [None, None]
    assert second["usage"] == (SCORES / 8).tolist()
    since, val = "training since the last validation", "validation set"
    assert [list(maps) for _, maps, _ in pictures.loads] == [[since, val]] * 2
    assert [list(maps) for _, maps, _ in pictures.usages] == [[val], [since, val]]


def test_what_was_shown_is_where_another_goes_on():
    made = Reporter([], total=3, every=1, show=False, layers=["a", "b"])
    made.step(1, {"loss": 1.0}, load=LOAD)
    made.flush()
    again = Reporter([], total=3, every=1, show=False, layers=["a", "b"],
                     **json.loads(json.dumps(made.shown())))  # fmt: skip
    for reporter in (made, again):
        reporter.step(2, {"loss": 1.0}, load=LOAD)
        reporter.flush()
    assert again.shown() == made.shown()
    assert again.shown()["load"] == (2 * LOAD).tolist()


def test_a_resumed_run_goes_on_counting(capsys):
    history = [{"step": n, "loss": 2.0} for n in (1, 2, 3)]
    recorder = Recorder()
    made = Reporter(
        [recorder], total=5, every=1, show=True, history=history, validations=[{"step": 0}]
    )
    made.step(4, {"loss": torch.tensor(1.0)})
    made.step(5, {"loss": torch.tensor(1.0)})
    made.close()
    assert [line["step"] for line in made.history] == [1, 2, 3, 4, 5]
    assert made.validations == [{"step": 0}]
    assert [number for number, _ in recorder.lines] == [4, 5], "the earlier ones are there already"
    assert "5/5" in capsys.readouterr().err
    assert len(history) == 3, "the caller's list is the caller's"


def test_a_diverged_step_names_where_it_began_from_all_processes():
    asked = []

    def gather(own):
        asked.append(own)
        return [own, (0, "layers.0")]

    made = Reporter([], total=2, every=1, show=False, gather=gather)
    good = Watched(("layers.0", "layers.1"), torch.tensor([1.0, 2.0]))
    bad = Watched(("layers.0", "layers.1"), torch.tensor([1.0, float("inf")]))
    made.step(1, {"loss": torch.tensor(1.0)}, watched=good)
    made.step(2, {"loss": torch.tensor(float("nan"))}, watched=bad)
    assert asked == []
    with pytest.raises(InputError, match=r"loss is nan at step 2, first in layers\.0 on rank 1: "):
        made.flush()
    assert asked == [(1, "layers.1")]


def test_a_finite_run_does_not_mind_a_large_sum():
    made, recorder = reporter()
    made.step(1, {"loss": 1.0}, watched=Watched(("layers.0",), torch.tensor([float("inf")])))
    made.flush()
    assert recorder.lines == [(1, {"loss": 1.0})]


def test_peak_memory_of_the_process():
    before = peak_memory(torch.device("cpu"))["peak_rss_gib"]
    assert 0.05 < before < 100
    held = torch.ones(2**27)  # half a GiB, and each page is touched
    after = peak_memory(torch.device("cpu"))["peak_rss_gib"]
    assert after >= before
    assert after >= 0.5
    del held
