"""A training process that a test may kill; importing this takes the seconds that a launch takes."""

import sys
import time
from pathlib import Path

import moe_full_finetune as recipe
import torch
from helpers_train import RaggedDataset

from moe_builders.parallel.launch import launch


def train(cfg, rank, size, meeting, log=None):
    """One process of a run; ends with the exit code of the command line."""
    if log is not None:
        sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115 of this process as a whole
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
    )
    code = launch(recipe.main, lambda: cfg)
    torch.distributed.destroy_process_group()
    sys.exit(code)


class Slow(RaggedDataset):
    """As soon as a folder exists, each sample takes seconds."""

    def __init__(self, tokenizer, folder):
        super().__init__(tokenizer)
        self.folder = Path(folder)

    def __getitem__(self, index):
        if self.folder.exists():
            time.sleep(5)
        return super().__getitem__(index)
