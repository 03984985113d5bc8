"""The reporter writes one step late and loses none; loggers come from the config."""

import pytest
import torch
from torchtune.training.metric_logging import DiskLogger, StdoutLogger

from moe_builders.errors import InputError
from moe_builders.training.reporting import Reporter, build_loggers

TUNE = "torchtune.training.metric_logging"


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


def test_loggers_of_a_config(tmp_path):
    (default,) = build_loggers(None, output_dir=str(tmp_path))
    assert isinstance(default, DiskLogger)
    default.log_dict({"loss": 1.5}, 3)
    default.close()
    (written,) = (tmp_path / "logs").iterdir()
    assert written.read_text().startswith("Step 3 | loss:1.5")
    disk = {"_component_": f"{TUNE}.DiskLogger", "log_dir": str(tmp_path / "mine"),
            "filename": "log.txt"}  # fmt: skip
    screen = {"_component_": f"{TUNE}.StdoutLogger"}
    found = build_loggers([disk, screen], output_dir="unused")
    assert [type(logger) for logger in found] == [DiskLogger, StdoutLogger]
    for logger in found:
        logger.close()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["log.txt"]
    (alone,) = build_loggers(screen, output_dir="unused")
    alone.close()


def needs_a_package():
    raise ImportError("wandb is not there\ninstall it")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_component_": "test_reporting.needs_a_package"},
         "metric_logger needs what is not installed: wandb is not there$"),
        ("wandb", "metric_logger needs a _component_"),
        ({"_component_": f"{TUNE}.DiskLoger"}, "did you mean 'DiskLogger'"),
        ({"_component_": f"{TUNE}.DiskLogger"}, "DiskLogger: missing a required arg.*'log_dir'"),
        ({"_component_": f"{TUNE}.DiskLogger", "log_dir": 3}, "metric_logger.log_dir is 3"),
        ([{"_component_": f"{TUNE}.StdoutLogger"}, {}],
         r"metric_logger\[1\] needs a _component_"),
    ],
)  # fmt: skip
def test_bad_loggers_are_one_sentence(node, message):
    with pytest.raises(InputError, match=message) as caught:
        build_loggers(node, output_dir="unused")
    assert "\n" not in str(caught.value)
