"""The command lines of the README, from a folder that has nothing to do with the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = """
output_dir: run
model:
  _component_: moe_builders.families.qwen3_moe.qwen3_moe_tiny
  vocab_size: 64
tokenizer:
  _component_: helpers_train.NoTokenizer
dataset:
  _component_: helpers_train.RaggedDataset
max_seq_len: 32
batch_size: 2
max_steps: 2
optimizer:
  _component_: torch.optim.AdamW
  lr: 1.0e-3
device: cpu
"""


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """An unrelated folder with a config, helpers to make data, and a copied recipe."""
    folder = tmp_path_factory.mktemp("unrelated")
    (folder / "tiny.yaml").write_text(TINY)
    shutil.copy(ROOT / "tests/helpers_train.py", folder)
    shutil.copy(ROOT / "recipes/moe_full_finetune.py", folder / "mine.py")
    return folder


def run(folder, *command, code=0):
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return result


def test_tune_run_and_its_launch_forms_agree(empty):
    config = ("--config", "tiny.yaml")
    run(empty, "tune", "run", "moe_full_finetune", *config, "output_dir=one", "batch_size=4")
    run(empty, "tune", "run", "--nproc_per_node", "2", "moe_full_finetune", *config,
        "output_dir=two")  # fmt: skip
    run(empty, "tune", "run", "mine", *config, "output_dir=copy", "batch_size=4")
    run(
        empty,
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
        "mine.py",
        *config,
        "output_dir=torchrun",
    )
    one = load_file(empty / "one/model/model.safetensors")
    for other in ("two", "copy", "torchrun"):
        weights = load_file(empty / other / "model/model.safetensors")
        for name, weight in one.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


def test_two_processes_say_everything_once(empty):
    result = run(empty, "torchrun", "--standalone", "--nproc_per_node", "2", "mine.py", "--config",
                 "tiny.yaml", "output_dir=once", "max_steps=1")  # fmt: skip
    said = [line for line in result.stderr.splitlines() if "torchao" in line]
    assert len(said) <= 1, said


@pytest.mark.parametrize("example", ["compose_model", "custom_router"])
def test_an_example_runs_from_its_own_folder(example, empty):
    for name in (f"{example}.py", f"{example}.yaml"):
        shutil.copy(ROOT / "examples" / name, empty)
    run(empty, "tune", "run", "moe_full_finetune", "--config", f"{example}.yaml",
        "output_dir=composed", "model.vocab_size=64", "max_steps=2", "batch_size=2",
        "~tokenizer", "tokenizer={_component_: helpers_train.NoTokenizer}",
        "~dataset", "dataset={_component_: helpers_train.RaggedDataset, packed: true}")  # fmt: skip
    assert (empty / "composed/model/moe_builders.json").is_file()


def test_a_mistake_is_one_sentence(empty):
    result = run(empty, "tune", "run", "moe_full_finetune", "--config", "tiny.yaml",
                 "batchsize=4", code=2)  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if "cpp extensions" not in line]
    assert [line for line in lines if "issues/2919" not in line] == [
        "error: unknown key 'batchsize' in the config (did you mean 'batch_size'?)"
    ]
