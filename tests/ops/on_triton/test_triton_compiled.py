"""Kernels compile for Hopper, and to what they were written for; no GPU is needed to compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "helpers_compiled.py"
THREADS = 768  # that run on a processor at least: six blocks of 4 warps, three of 8
REGISTERS = 65536  # of a processor


@pytest.fixture(scope="module")
def kernels():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    command = [sys.executable, str(SCRIPT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_all_stays_in_registers_of_many_blocks(kernels):
    assert len(kernels) == 19
    for name, kernel in kernels.items():
        assert kernel["spilled"] == 0, name
        assert REGISTERS // kernel["registers"] >= THREADS, (name, kernel["registers"])


def test_nothing_is_added_in_no_fixed_order(kernels):
    for name, kernel in kernels.items():
        assert kernel["atomics"] == [], name


def test_rows_travel_in_words_of_16_bytes(kernels):
    for name, kernel in kernels.items():
        if name in ("rank", "place"):
            continue
        # what is narrower are indices, weights and their gradient: one number a row
        alone = {2} if name == "softmax bf16" else set()  # a bf16 by itself: a label's logit
        assert set(kernel["reads"]) <= {1, 4, 8, 16} | alone, name
        assert 16 in kernel["reads"] or name == "tail", name
        assert set(kernel["writes"]) <= {4, 16}, name
        assert 16 in kernel["writes"] or name == "products", name
