"""What can lie in the host's memory instead of a GPU's; optimizer states are in stepping.py."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torchtune.training import OffloadActivations

from moe_builders.errors import InputError


def require_gpu(device: torch.device, **switches: bool) -> None:
    """Stop before anything is loaded if a switch that is on moves data between GPU and host.

    Args:
        device: of the run.
        **switches: config keys and whether they are on.

    Raises:
        InputError: one is on, and the device is no GPU.
    """
    for key, on in switches.items():
        if on and device.type != "cuda":
            raise InputError(
                f"{key} moves what lies on a GPU to the host's memory, but device is "
                f"{device.type}: set {key}=false"
            )


def activation_offloading(enabled: bool) -> AbstractContextManager:
    """A decoder's ``kept_activations``: torchtune's offloading, or nothing.

    With activation checkpointing a layer keeps its input alone; that is copied to pinned host
    memory on a stream of its own while the next layers run, and comes back ahead of its backward.

    Source: torchtune 0.6.1 ``OffloadActivations``.
    """
    return OffloadActivations() if enabled else nullcontext()
