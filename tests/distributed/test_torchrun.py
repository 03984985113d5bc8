"""torchrun itself: it starts a run again that lost a process, and joins machines into one run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers_cluster import Job
from helpers_train import config
from omegaconf import OmegaConf
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/moe_full_finetune.py")
KEYS = {"max_steps": 6, "checkpoint_every_n_steps": 1, "batch_size": 2}
# the place in the run, counted in rows that the process has read since it was started
PLAN = "1 5 9\n0 3 15"  # rank 1 is killed in its third step; then rank 0 gets SIGTERM in its second


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Weights of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    cfg = config(folder / "run", **KEYS)
    assert Job(2, "train", cfg, folder=folder).codes() == [0, 0]
    return load_file(folder / "run/model/model.safetensors")


def _write_config(folder, plan):
    (folder / "plan").write_text(plan)
    fateful = {"_component_": "helpers_cluster.Fateful", "plan": str(folder / "plan")}
    cfg = config(folder / "run", **KEYS, dataset=fateful)
    OmegaConf.save(OmegaConf.structured(cfg), folder / "tiny.yaml")
    return folder / "tiny.yaml"


def _torchrun(folder, *options, plan, **variables):
    """An agent with its processes; what they say goes to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, RECIPE, "--config",
               str(_write_config(folder, plan))]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | variables
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=env)


def _end(agents, folder):
    """Exit codes; agents that do not end by themselves are ended, and their processes."""
    try:
        return [agent.wait(400) for agent in agents]
    except subprocess.TimeoutExpired:
        for agent in agents:
            agent.terminate()
        raise AssertionError((folder / "log").read_text()) from None


def _assert_same(folder, calm):
    weights = load_file(folder / "run/model/model.safetensors")
    assert all(torch.equal(weights[name], calm[name]) for name in calm)
    assert (folder / "plan").read_text() == "", "all that was to happen has happened"


def test_a_killed_process_and_a_sigterm_are_gone_on_from(tmp_path, calm):
    agent = _torchrun(tmp_path, "--standalone", "--nproc_per_node", "2", "--max_restarts", "3",
                      plan=PLAN)  # fmt: skip
    assert _end([agent], tmp_path) == [0]
    said = (tmp_path / "log").read_text()
    assert said.count("going on from ") == 2, said
    assert "stopped by SIGTERM at step " in said
    assert "failed (exitcode: -9) local_rank: 1 " in said, "torchrun names it"
    _assert_same(tmp_path, calm)


def test_two_machines_meet_and_start_again_together(tmp_path, calm):
    """Two agents with a process each, as on two machines; on one of them the process is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_id", "run",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{store.port}",
               "--rdzv_conf", "is_host=false", "--local_addr", "127.0.0.1"]  # fmt: skip
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a new one at each start
    agents = [_torchrun(tmp_path, *options, plan="1 5 9", **own_store) for _ in range(2)]
    assert _end(agents, tmp_path) == [0, 0]
    _assert_same(tmp_path, calm)
