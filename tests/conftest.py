"""For all tests: one thread, and the same random numbers every time.

Tests work on tiny tensors. Two threads gain nothing there, and on a busy machine they wait for each
other: a forward of 4 ms took 540.
"""

import os

import pytest
import torch

torch.set_num_threads(1)
if (
    not torch.cuda.is_available()
):  # read by Triton when it is imported: its interpreter needs no GPU
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
