"""The random streams of a process, as plain values that go into a checkpoint."""

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Where Python's, numpy's and torch's global streams stand; JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # pyright: ignore
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the streams back to where ``random_state`` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def begin_own_stream(seed: int, rank: int) -> None:
    """Let a process draw numbers of its own; the first, or a process that is alone, goes on.

    A model's weights must be drawn alike everywhere. Noise on gates, dropout and whatever else is
    drawn in a step must not: the same numbers for every process's tokens are less noise.

    Args:
        seed: of the run.
        rank: of this process.
    """
    if rank > 0:
        torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**64)  # far from any near seed


def rewound_noise(device: torch.device) -> AbstractContextManager[None]:
    """Torch's streams go on afterwards from where they stood: what is drawn inside comes again."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
