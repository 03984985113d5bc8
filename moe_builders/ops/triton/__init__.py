"""The passes over rows as Triton kernels, each with a plain twin of the same name and meaning.

``sort`` has ``sort_by_expert`` of ``ops.permute``, ``row_ops`` what ``ops.row_ops`` has, and
``cross_entropy`` the ``cross_entropy_`` of ``ops.cross_entropy``. Triton is imported by these
modules alone: ask ``available`` before importing them.
"""

import importlib.util

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the rows; others take the plain way
_AMPERE = (8, 0)  # Triton compiles for nothing older


def available(device: torch.device) -> bool:
    """Whether kernels run on that device: a GPU that Triton compiles for, and Triton itself.

    Kernels are compiled at their first launch, for which Triton needs a C compiler.
    """
    return missing_for(device) is None


def missing_for(device: torch.device) -> str | None:
    """What kernels lack on that device; None: nothing, they are ``available``."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < _AMPERE:
        return "Triton compiles for no GPU as old as this one"
    return None
