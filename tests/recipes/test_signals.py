"""Ctrl-C and SIGTERM end a run with a checkpoint, on all processes at the same step."""

import multiprocessing
import os
import signal
import time
import uuid
from pathlib import Path

import pytest
import torch
from helpers_train import config
from safetensors.torch import load_file

FORK = multiprocessing.get_context("forkserver")
KEYS = {"max_steps": 60, "checkpoint_every_n_steps": 10, "keep_last": None, "num_workers": 1,
        "lr_scheduler": {"_component_": "torchtune.training.get_cosine_schedule_with_warmup",
                         "num_warmup_steps": 5}, "epochs": 30}  # fmt: skip


def _launch(cfg, size=1):
    from helpers_killed import train

    meeting = Path(cfg.output_dir).parent / uuid.uuid4().hex
    logs = [f"{cfg.output_dir}.log{rank}" for rank in range(size)]
    processes = [FORK.Process(target=train, args=(cfg, rank, size, str(meeting), logs[rank]))
                 for rank in range(size)]  # fmt: skip
    for process in processes:
        process.start()
    return processes, logs


def _signal_after_ten_steps(cfg, number, size=1, to=0):
    processes, logs = _launch(cfg, size)
    _wait_for(Path(cfg.output_dir) / "checkpoints/step_00000010")
    os.kill(processes[to].pid, number)
    for process in processes:
        process.join(60)
    return [p.exitcode for p in processes], Path(logs[0]).read_text()


def _wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def _steps(cfg):
    return sorted(int(p.name[5:]) for p in (Path(cfg.output_dir) / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("calm") / "run", **KEYS)
    processes, _ = _launch(cfg)
    processes[0].join(120)
    assert processes[0].exitcode == 0
    return load_file(Path(cfg.output_dir) / "model/model.safetensors")


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, calm, number, code, name):
    cfg = config(tmp_path / "run", **KEYS)
    codes, said = _signal_after_ten_steps(cfg, number)
    assert codes == [code]
    stopped = _steps(cfg)[-1]
    assert 10 <= stopped < 60
    assert f"stopped by {name} at step {stopped} of 60: the same command with resume=auto" in said
    assert "Traceback" not in said
    assert not (Path(cfg.output_dir) / "model").exists()
    processes, logs = _launch(cfg)
    processes[0].join(60)
    assert processes[0].exitcode == 0
    assert f"going on from {cfg.output_dir}/checkpoints/step_{stopped:08d}" in (
        Path(logs[0]).read_text()
    )
    weights = load_file(Path(cfg.output_dir) / "model/model.safetensors")
    assert all(torch.equal(weights[name], calm[name]) for name in calm)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    cfg = config(tmp_path / "run", **KEYS | {"batch_size": 2, "num_workers": 0})
    codes, said = _signal_after_ten_steps(cfg, signal.SIGTERM, size=2, to=1)
    assert codes == [143, 143]
    assert f"stopped by a signal to another process at step {_steps(cfg)[-1]} of 60" in said
    assert "Traceback" not in said


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """The step takes long, and the user has no patience."""
    slow = {"_component_": "helpers_killed.Slow",
            "folder": str(tmp_path / "run/checkpoints/step_00000010")}  # fmt: skip
    cfg = config(tmp_path / "run", **KEYS | {"num_workers": 0, "dataset": slow})
    processes, logs = _launch(cfg)
    _wait_for(tmp_path / "run/checkpoints/step_00000010")
    for _ in range(2):
        os.kill(processes[0].pid, signal.SIGINT)
        time.sleep(2.5)
    processes[0].join(20)
    assert processes[0].exitcode == 130
    said = Path(logs[0]).read_text()
    assert "stopped at once by Ctrl-C" in said
    assert "Traceback" not in said
    assert _steps(cfg) == [10]


def test_a_second_ctrl_c_does_not_wait_for_a_save_in_the_background(tmp_path):
    """The first one waits for it: what the signal asks for is saved after it."""
    slow = {"_component_": "helpers_saves.SlowSaves", "folder": str(tmp_path / "run/checkpoints")}
    cfg = config(tmp_path / "run", **KEYS | {
        "num_workers": 0, "dataset": slow, "enable_async_checkpointing": True, "batch_size": 2,
    })  # fmt: skip
    processes, logs = _launch(cfg, 2)
    _wait_for(tmp_path / "run/checkpoints/.step_00000020.partial")
    for _ in range(2):
        for process in processes:
            os.kill(process.pid, signal.SIGINT)
        time.sleep(2.5)
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [130, 130]
    said = Path(logs[0]).read_text()
    assert "while training goes on" in said
    assert "stopped at once by Ctrl-C" in said
    assert "Traceback" not in said
    assert _steps(cfg) == [10]
