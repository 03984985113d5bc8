"""A run on two processes that is shot again and again, and launched again by somebody who only
looks at exit codes, ends with the weights of one that nobody disturbed."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers_cluster import Job
from helpers_train import config
from safetensors.torch import load_file

from moe_builders.checkpoint.run_checkpoints import RunCheckpoints
from moe_builders.training.run_files import MetricsFile

STEPS, SIZE = 10, 2
SAVES = [{}, {"enable_async_checkpointing": True}]  # each way of saving is drilled
LOST = 129


def _config(folder, saves):
    return config(folder, max_steps=STEPS, checkpoint_every_n_steps=1, batch_size=2, epochs=2,
                  timeout_minutes=10.0, **saves)  # fmt: skip


def _newest(cfg):
    """The step of the newest checkpoint; each that has its name is whole."""
    folder = Path(cfg.output_dir) / "checkpoints"
    found = RunCheckpoints(folder, world=None, keep_last=2).survey()
    assert all(problem is None for _, problem in found), found
    return int(found[0][0].name[5:]) if found else 0


def _launch(cfg, attempt, folder):
    """Processes come back under the other's rank every other time."""
    slots = list(range(SIZE))[:: 1 if attempt % 2 else -1]
    return Job(SIZE, "train", cfg, folder=folder, slots=slots)


def _shoot(job, moments):
    """-9 or TERM to one process or to all; the others have to end by themselves.

    Returns:
        Exit codes that each process may end with; 0: it was at its end already.
    """
    number = moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    victims = moments.choice([[0], [1], [0, 1]])
    for rank in victims:
        job.kill(rank, number)
    if number == signal.SIGTERM:  # before training it ends the process, so it is lost to the other
        return [{128 + number, -number, LOST, 0}] * SIZE
    return [{-number if rank in victims else LOST, 0} for rank in range(SIZE)]


def _drill(tmp_path, *, restarts, seed, saves):
    calm = _config(tmp_path / "calm", saves)
    job = Job(SIZE, "train", calm, folder=tmp_path)
    job.wait_until_all_are_there()
    started = time.monotonic()
    assert job.codes() == [0] * SIZE
    duration = time.monotonic() - started
    moments, shots, attempt, run, resumed = random.Random(seed), 0, 0, 0, 0
    while shots < restarts or not resumed:
        attempt += 1
        assert attempt < 3 * restarts + 20, (shots, resumed)
        cfg = _config(tmp_path / f"shot{run}", saves)
        before = _newest(cfg)
        job = _launch(cfg, attempt, tmp_path)
        job.wait_until_all_are_there()
        time.sleep(moments.uniform(0, duration))
        if not all(process.is_alive() for process in job.by_rank.values()):
            assert job.codes() == [0] * SIZE
            _assert_same(calm, cfg)
            run += 1  # begin another one
            duration *= 0.9  # the calm run was slower than these
            continue
        allowed = _shoot(job, moments)
        codes = job.codes()
        shots += 1
        assert all(code in each for code, each in zip(codes, allowed, strict=True)), codes
        assert _newest(cfg) >= before, "what is published stays"
        resumed += _assert_went_on_from(job, cfg, before)
    for attempt in range(2):  # odd and even: under its own rank and under the other
        job = _launch(cfg, attempt, tmp_path)
        assert job.codes() == [0] * SIZE
    _assert_same(calm, cfg)


def _assert_went_on_from(job, cfg, step):
    """Whether it came to say so; then it named the newest checkpoint there was."""
    said = [line for line in job.said(0).splitlines() if line.startswith("going on from ")]
    for line in said:
        assert line.startswith(f"going on from {cfg.output_dir}/checkpoints/step_{step:08d}"), line
    assert step == 0 or "step 1:" not in job.said(0)
    return bool(said)


def _assert_same(calm, cfg):
    mine, theirs = (load_file(Path(c.output_dir) / "model/model.safetensors") for c in (calm, cfg))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    folder = Path(cfg.output_dir)
    assert not list((folder / "checkpoints").glob(".*"))
    assert not list(folder.glob("checkpoints.*")), "nothing was moved aside"
    steps = [line["step"] for line in MetricsFile(folder / "metrics.jsonl").read()]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("saves", SAVES, ids=str)
def test_three_restarts(tmp_path, saves):
    _drill(tmp_path, restarts=3, seed=0, saves=saves)


@pytest.mark.full
@pytest.mark.parametrize("saves", SAVES, ids=str)
def test_thirty_restarts(tmp_path, saves):
    _drill(tmp_path, restarts=30, seed=1, saves=saves)
