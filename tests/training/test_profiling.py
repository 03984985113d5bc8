"""The profiler writes a trace and a table of just the steps that were asked for."""

import gzip
import json

import pytest
import torch

from moe_builders.errors import InputError
from moe_builders.training.profiling import StepProfiler

SCHEDULE = {"wait_steps": 1, "warmup_steps": 1, "active_steps": 2}


def train(profiler, steps):
    with profiler:
        for number in range(steps):
            (torch.ones(8, 8) @ torch.ones(8, 8)).sin()
            if number in (2, 3):  # the two that are profiled
                torch.ones(3).cos()
            if number not in (2, 3):
                torch.ones(3).tan()
            profiler.step()


def test_trace_and_table(tmp_path):
    train(
        StepProfiler(tmp_path / "profile", rank=3, num_steps=6, enabled=True, **SCHEDULE), steps=6
    )
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "rank_3.json.gz", "rank_3.txt"]  # fmt: skip
    with gzip.open(tmp_path / "profile/rank_3.json.gz", "rt") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"]]
    assert events.count("aten::mm") == 2
    assert events.count("aten::cos") == 2
    assert "aten::tan" not in events
    assert "ProfilerStep#2" in events
    table = (tmp_path / "profile/rank_3.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU time total" in table


def test_switched_off_it_does_nothing(tmp_path):
    train(
        StepProfiler(tmp_path / "profile", rank=0, num_steps=1, enabled=False, **SCHEDULE), steps=1
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_too_short_says_so(tmp_path):
    with pytest.raises(InputError) as caught:
        StepProfiler(tmp_path, rank=0, num_steps=3, enabled=True, **SCHEDULE)
    assert str(caught.value) == (
        "the profiler needs 4 steps (profiler.wait_steps 1 + warmup_steps 1 + active_steps 2), but "
        "the run has only 3: lower them or train longer"
    )


def test_a_run_that_fails_in_between_ends_quietly(tmp_path):
    profiler = StepProfiler(tmp_path / "profile", rank=0, num_steps=6, enabled=True, **SCHEDULE)

    def fail():
        with profiler:
            profiler.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / "profile").exists()
