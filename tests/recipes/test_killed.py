"""kill -9 at random moments, inside a save too: what has the name of a checkpoint is whole, and a
run that is launched again until it ends has the weights of one that nobody disturbed."""

import multiprocessing
import os
import random
import signal
import time
import uuid
from pathlib import Path

import pytest
import torch
from helpers_train import config
from safetensors.torch import load_file

from moe_builders.checkpoint.run_checkpoints import RunCheckpoints

STEPS = 12
FORK = multiprocessing.get_context("forkserver")


def _launch(cfg, size):
    """The run's processes, as a launcher would start them, but for the imports' seconds."""
    from helpers_killed import train

    meeting = Path(cfg.output_dir).parent / uuid.uuid4().hex
    processes = [FORK.Process(target=train, args=(cfg, rank, size, str(meeting)))
                 for rank in range(size)]  # fmt: skip
    for process in processes:
        process.start()
    return processes


def _kill(processes):
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def _finish(processes):
    for process in processes:
        process.join(400)
    assert [p.exitcode for p in processes] == [0] * len(processes)


def _wait_for_a_save(folder, seconds):
    """Until files are being written, and then not longer than a save takes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if any(folder.glob(".step_*.partial/*")):
                return True
        except FileNotFoundError:  # it got its name while it was looked into: the next one then
            continue
    return False


def _weights(cfg):
    return load_file(Path(cfg.output_dir) / "model/model.safetensors")


def _kill_often(tmp_path, *, kills, size, seed, background=False):
    changes = {"max_steps": STEPS, "checkpoint_every_n_steps": 1, "batch_size": 4 // size,
               "enable_async_checkpointing": background}  # fmt: skip
    calm = config(tmp_path / "calm", **changes)
    started = time.monotonic()
    _finish(_launch(calm, size))
    duration = time.monotonic() - started
    moments = random.Random(seed)
    done = in_a_save = finished = attempt = resumed = 0
    while done < kills or not (resumed and in_a_save):
        attempt += 1
        assert attempt < 4 * kills + 40, (done, resumed, in_a_save)
        cfg = config(tmp_path / f"killed{finished}", **changes)
        folder = Path(cfg.output_dir) / "checkpoints"
        resumed += any(folder.glob("step_*"))
        processes = _launch(cfg, size)
        if attempt % 2:
            time.sleep(moments.uniform(0, duration))
        else:
            in_a_save += _wait_for_a_save(folder, duration)
            time.sleep(moments.uniform(0, 0.01))
        if not all(process.is_alive() for process in processes):
            _finish(processes)
            finished += 1  # begin another run to be killed
            _assert_same(calm, cfg)
            continue
        _kill(processes)
        done += 1
        found = RunCheckpoints(folder, world=None, keep_last=2).survey()
        assert all(problem is None for _, problem in found), found
    _finish(_launch(cfg, size))
    _assert_same(calm, cfg)


def _assert_same(calm, cfg):
    mine, theirs = _weights(calm), _weights(cfg)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    leftovers = list((Path(cfg.output_dir) / "checkpoints").glob(".*"))
    assert not leftovers


def test_five_kills(tmp_path):
    _kill_often(tmp_path, kills=5, size=1, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_fifty_kills(tmp_path, size, background):
    _kill_often(tmp_path, kills=50, size=size, seed=size, background=background)
