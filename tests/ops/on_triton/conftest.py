"""For all tests of kernels: they can be launched, and what they do not write is NaN."""

import sys

import pytest
from helpers_triton import kernels_run, poisoned

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*"]  # no Triton elsewhere


@pytest.fixture(autouse=True)
def _launched_and_poisoned():
    with kernels_run(), poisoned():
        yield
