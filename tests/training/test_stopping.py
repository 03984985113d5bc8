"""Signals are noted, a second Ctrl-C is obeyed at once; early stopping by hand."""

import os
import signal
import threading

import pytest

from moe_builders.training import stopping
from moe_builders.training.changes import config_changes, flatten
from moe_builders.training.stopping import catch_stop_signals, should_stop_early


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_a_signal_is_noted_and_the_run_goes_on(number, name):
    before = signal.getsignal(number)
    with catch_stop_signals() as request:
        assert request.signal == 0
        os.kill(os.getpid(), number)
        assert (request.signal, request.name) == (number, name)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once_but_not_an_echo_of_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with catch_stop_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5  # the launcher passes the same Ctrl-C on
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)  # never at once: a scheduler may send it twice
        assert request.name == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_cannot_take_the_signals_and_does_not_need_them():
    seen = []

    def work():
        with catch_stop_signals() as request:
            seen.append(request.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stops"),
    [
        ([], 1, 0.0, False),
        ([3.0], 1, 0.0, False),
        ([3.0, 2.0], 1, 0.0, False),
        ([3.0, 3.0], 1, 0.0, True),
        ([3.0, 3.0], 2, 0.0, False),
        ([3.0, 2.0, 2.1, 2.05], 2, 0.0, True),
        ([3.0, 2.0, 2.1, 1.9], 2, 0.0, False),
        ([3.0, 2.0, 1.95, 1.91], 2, 0.1, True),
        ([3.0, float("nan"), float("nan")], 2, 0.0, True),
        ([1.0, 2.0, 3.0], None, 0.0, False),
    ],
)
def test_early_stop_by_hand(losses, patience, min_delta, stops):
    assert should_stop_early(losses, patience=patience, min_delta=min_delta) is stops


def test_changes_by_hand():
    old = {"lr": 1, "same": [1, {"x": 2}], "gone": None, "list": [1, 2], "empty": {}}
    new = {
        "lr": 2,
        "same": [1, {"x": 2}],
        "list": [1, 3, 4],
        "empty": {},
        "new": {"a": {"b": None}},
    }
    assert config_changes(old, new) == [
        "lr: 1 -> 2",
        "list[1]: 2 -> 3",
        "list[2]: not set -> 4",
        "new.a.b: not set -> null",
        "gone: null -> not set",
    ]
    assert config_changes(old, old) == []
    assert flatten({"a": {"b": [1]}, "c": []}) == {"a.b[0]": 1, "c": []}
