"""docs/how_to: what a page tells to type can be typed, as far as that shows without a cluster."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torchtune._cli.run as tune_run
import torchtune._cli.tune as tune
import yaml
from torch.distributed.run import config_from_args, get_args_parser

from moe_builders.training.config import find_config, load_config

FOLDER = Path(__file__).parents[1] / "docs/how_to"
PAGE = (FOLDER / "multi_node.md").read_text()
BLOCKS = [shlex.split(block.replace("\\\n", " "))
          for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]  # fmt: skip
SCRIPT = (FOLDER / "slurm.sbatch").read_text()
JOB = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
CONTAINER = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]


def _torchrun_of_script():
    """The script's torchrun with its variables filled in as SLURM and the script would."""
    command = re.search(r"^srun .*? (torchrun .*?) &$", SCRIPT, re.DOTALL | re.MULTILINE)[1]
    values = dict(re.findall(r"^(CONFIG|OUTPUT|GPUS|SAVE_SECONDS)=(\S+)", SCRIPT, re.MULTILINE))
    values |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "head_node": "node1"}
    command = re.sub(r"\$(\w+)", lambda found: values[found[1]], command.replace("\\\n", " "))
    return shlex.split(command)


LAUNCHES = {
    "torchrun": BLOCKS[0][3:], "tune": BLOCKS[1][4:], "slurm": _torchrun_of_script()[1:],
    "kubernetes": CONTAINER["args"],
}  # fmt: skip


def test_each_launch_of_several_torchruns_makes_a_new_place_to_meet():
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    for block in BLOCKS[:2]:
        assert block[:2] == ["export", f"{name}=1"]
    assert f"\nexport {name}=1 " in SCRIPT
    assert {"name": name, "value": "1"} in CONTAINER["env"]


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_commands(name, monkeypatch):
    """They parse, start 16 processes on two machines that meet, and find the config."""
    if name == "kubernetes":  # what the operator puts into each pod
        host = f"{JOB['metadata']['name']}-worker-0"
        monkeypatch.setenv("PET_RDZV_ENDPOINT", f"{host}:23456")
        monkeypatch.setenv("PET_RDZV_BACKEND", JOB["spec"]["elasticPolicy"]["rdzvBackend"])
    args = get_args_parser().parse_args(LAUNCHES[name])
    launch, _, _ = config_from_args(args)
    assert (launch.min_nodes, launch.max_nodes, launch.nproc_per_node) == (2, 2, 8)
    assert (launch.rdzv_backend, launch.max_restarts) == ("c10d", 3)
    assert re.fullmatch(r"(node1|moe-run-worker-0):\d+", launch.rdzv_endpoint)
    assert launch.shutdown_timeout == 600
    assert args.training_script == "moe_full_finetune"
    assert args.module or name == "tune", "tune adds it"
    option, config, *overrides = args.training_script_args
    assert option == "--config"
    loaded = load_config(find_config(config), overrides)
    assert loaded.output_dir == "/shared/runs/my-run"


@pytest.mark.parametrize("endpoint", [False, True])
def test_the_trap_of_tune_run(monkeypatch, endpoint):
    """torchtune makes a launch without an endpoint a standalone one, whatever else it is given."""
    seen = []
    monkeypatch.setattr(tune_run, "run", seen.append)
    more = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29400"] if endpoint else []
    argv = ["tune", "run", "--nnodes", "2", "--master_addr", "node1", "--node_rank", "1", *more,
            "moe_full_finetune", "--config", "mine.yaml"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parser = tune.TuneCLIParser()
    parser.run(parser.parse_args())
    assert seen[0].standalone is not endpoint
    assert "Without `--rdzv_endpoint` it adds `--standalone`" in PAGE


def test_the_script_is_a_script(tmp_path):
    subprocess.run(["bash", "-n", FOLDER / "slurm.sbatch"], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", SCRIPT, re.MULTILINE)
    assert dict(options)["ntasks-per-node"] == "1", "one torchrun a machine"
    assert dict(options)["signal"] == "B:USR1@900"
    assert int(dict(options)["gpus-per-node"]) == int(re.search(r"^GPUS=(\d+)", SCRIPT, re.M)[1])
    assert int(re.search(r"^SAVE_SECONDS=(\d+)", SCRIPT, re.M)[1]) < 900


@pytest.mark.parametrize(("signalled", "done"), [(True, False), (True, True), (False, False)])
def test_the_script_queues_itself_again_when_it_is_signalled(tmp_path, signalled, done):
    """With stand-ins for SLURM's commands: srun ends with 143 when it has got SIGTERM."""
    bin_folder, output = tmp_path / "bin", tmp_path / "out"
    bin_folder.mkdir()
    (output / "model" if done else output).mkdir(parents=True)
    waits = "trap 'exit 143' TERM; kill -USR1 $PPID; while true; do sleep 0.1; done"
    stand_ins = {
        "srun": waits if signalled else "exit 1",
        "scontrol": f'[ "$1" = show ] && echo node1 || echo "$@" >> {tmp_path}/called',
    }
    for name, body in stand_ins.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    script = re.sub(r"^OUTPUT=\S+", f"OUTPUT={output}", SCRIPT, flags=re.MULTILINE)
    env = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    ended = subprocess.run(["bash", "-c", script], env=env, timeout=200, check=False)
    called = tmp_path / "called"
    again = signalled and not done
    assert (called.read_text() if called.exists() else "") == ("requeue 17\n" if again else "")
    assert ended.returncode == (143 if signalled else 1)


def test_the_job_for_kubernetes():
    assert (JOB["apiVersion"], JOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker, policy = JOB["spec"]["pytorchReplicaSpecs"]["Worker"], JOB["spec"]["elasticPolicy"]
    assert worker["replicas"] == policy["minReplicas"] == policy["maxReplicas"] == 2
    assert (worker["restartPolicy"], policy["maxRestarts"]) == ("OnFailure", 3)
    assert (CONTAINER["name"], CONTAINER["command"]) == ("pytorch", ["torchrun"])
    assert re.fullmatch(r"[\w.-]+/[\w.-]+:\w+", CONTAINER["image"])
    pod = worker["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 600
    mounted = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    paths = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert {"/shared", "/dev/shm"} == paths
    gpus = CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert str(gpus) == JOB["spec"]["nprocPerNode"] == "8"
