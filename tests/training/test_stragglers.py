"""Who is slow is said when it lasts, once, and again when it is over; measured in a real run."""

import re

import pytest
import torch
from helpers_cluster import Job
from helpers_train import config

from moe_builders.parallel.own_time import OwnTime
from moe_builders.parallel.world import open_world
from moe_builders.training.run_files import MetricsFile
from moe_builders.training.stragglers import Stragglers, lag


def _see(judge, loading, steps, *, first=1, part=0):
    """What is said in ``steps`` steps in which processes take so many seconds."""
    own = torch.zeros(len(loading), 2, dtype=torch.float64)
    own[:, part] = torch.tensor(loading)
    return {number: said for number in range(first, first + steps)
            if (said := judge.see(number, own))}  # fmt: skip


def test_it_is_said_after_five_steps_and_once():
    said = _see(Stragglers(), [0.02, 0.02, 0.02, 0.41], 20)
    assert said == {5: ["rank 3 is slow: in step 5, as in the 4 before, it took 0.410 s to fetch "
                        "its data (the median process: 0.020 s)"]}  # fmt: skip


def test_of_two_processes_one_can_be_slow():
    assert list(_see(Stragglers(), [0.4, 0.02], 20, part=1)) == [5]
    said = _see(Stragglers(), [0.4, 0.02], 5, part=1)[5]
    assert said[0].startswith("rank 0 is slow: in step 5, as in the 4 before, it took 0.400 s to u")


@pytest.mark.parametrize(
    "loading", [[1.0, 1.0, 1.9], [0.0, 0.0, 0.049], [9.0, 9.0, 9.0], [1.0, 0.0, 1.0]]
)
def test_within_the_limits_nothing_is_said(loading):
    assert _see(Stragglers(), loading, 20) == {}


def test_a_step_now_and_then_is_nothing():
    judge = Stragglers()
    for start in range(1, 50, 5):
        assert _see(judge, [0.0, 0.0, 1.0], 4, first=start) == {}
        assert _see(judge, [0.0, 0.0, 0.0], 1, first=start + 4) == {}


def test_its_end_and_another_one_are_said():
    judge = Stragglers()
    assert list(_see(judge, [0.0, 0.0, 1.0], 5)) == [5]
    said = _see(judge, [0.0, 1.0, 0.0], 10, first=6)
    assert list(said) == [10]
    assert [line.partition(":")[0] for line in said[10]] == [
        "rank 1 is slow", "rank 2 is no longer slow",
    ]  # fmt: skip


def test_lag_by_hand():
    own = torch.tensor([[1.0, 0.5], [0.5, 0.5], [2.0, 2.0]])
    assert lag(own) == {"slowest_rank": 2.0, "slowest_lag_seconds": 2.5}


def test_a_process_that_is_alone_is_not_measured():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with open_world(device="cpu") as world:
        own_time = OwnTime(world, optimizer)
        own_time.loaded(1.0)
        assert own_time.take() == {}
    assert not optimizer._optimizer_step_pre_hooks


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Rank 1 reads slowly, rank 0 updates slowly."""
    folder = tmp_path_factory.mktemp("slow")
    cfg = config(
        folder / "run", max_steps=14, batch_size=2,
        dataset={"_component_": "helpers_cluster.SlowRows", "rank": 1, "seconds": 0.06},
        optimizer={"_component_": "helpers_cluster.SlowUpdate", "rank": 0, "seconds": 0.11},
    )  # fmt: skip
    job = Job(2, "train", cfg, folder=folder)
    assert job.codes() == [0, 0]
    return job, MetricsFile(folder / "run/metrics.jsonl").read()


def test_a_run_says_who_is_slow_in_what(slow):
    job, _ = slow
    said = [line for line in job.said(0).splitlines() if " is slow: " in line]
    assert len(said) == 2, job.said(0)
    # a busy machine may make the other process slow for a step, too
    said = {re.sub(r"step \d+|\d+\.\d+ s", "…", line) for line in said}
    median = "(the median process: …)"
    assert said == {
        f"rank 1 is slow: in …, as in the 4 before, it took … to fetch its data {median}",
        f"rank 0 is slow: in …, as in the 4 before, it took … to update its weights {median}",
    }
    assert "is slow" not in job.said(1), "the first process alone speaks"


def test_a_run_writes_down_who_was_slowest(slow):
    _, steps = slow
    assert [step["slowest_rank"] for step in steps[:2]] == [1, 1], "updates are told two steps late"
    assert all(0.05 < step["slowest_lag_seconds"] < 20 for step in steps[:2])
