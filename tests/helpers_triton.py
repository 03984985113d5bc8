"""What tests of Triton kernels share: devices, an interpreter that rounds bf16, poisoned outputs.

Without a GPU kernels run in Triton's interpreter (``conftest.py`` asks for it before anything
imports Triton), with one they are compiled: the same tests, ``device`` says which.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")),
]


@contextlib.contextmanager
def kernels_run() -> Iterator[None]:
    """Kernels can be launched, on CPU tensors where there is no GPU.

    Triton's interpreter (3.6, 3.7) cuts numbers off where a GPU rounds them to bf16, so torch does
    this here. numpy warns where a GPU says inf.
    """
    if HAS_GPU:
        yield
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if {source, target} != {bfloat16, float32}:
            return original(data, source, target, rounding)
        if source == float32:
            wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return wide.bfloat16().view(torch.uint16).numpy()
        half = torch.from_numpy(np.ascontiguousarray(data).view(np.uint16))
        return half.view(torch.bfloat16).float().numpy()

    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore", invalid="ignore"):
        patch.setattr(interpreter, "_convert_float", convert)
        yield


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors that nobody filled hold NaN, integers the largest number."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)
