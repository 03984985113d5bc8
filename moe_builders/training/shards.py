"""What an optimizer must know of sharded tensors, and random numbers of a shard's own.

Sharded tensors are known by what they offer, not by their class: only parallel/ knows of processes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor


def local_tensor(tensor: Tensor | None) -> Tensor:
    """What this process holds, sharing its memory; a plain tensor as it is."""
    assert tensor is not None
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore


def like_sharded(local: Tensor, parameter: Any) -> Tensor:
    """A local tensor as this process's shard of one with the parameter's shape and placements."""
    if not hasattr(parameter, "to_local"):
        return local
    return type(parameter).from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_number(parameter: Any) -> tuple[int, ...]:
    """Where in the mesh this shard lies; copies of a shard have the same number."""
    if not hasattr(parameter, "to_local"):
        return ()
    place = parameter.device_mesh.get_coordinate()
    kinds = zip(place, parameter.placements, strict=True)
    return tuple(c for c, kind in kinds if not kind.is_replicate())


def shard_numels(parameter: Any) -> set[int]:
    """How many values the shards have, over all processes."""
    sizes = [{n} for n in parameter.shape]
    if hasattr(parameter, "to_local"):
        axes = enumerate(parameter.placements)
        # a strided axis cuts what the axes after it have left, see parallel.boxes
        for axis, kind in sorted(axes, key=lambda item: hasattr(item[1], "split_factor")):
            if not kind.is_replicate():
                count = parameter.device_mesh.size(axis)
                sizes[kind.dim] = {m for n in sizes[kind.dim] for m in _chunks(n, count)}
    return {math.prod(shape) for shape in product(*sizes)}


def _chunks(size: int, count: int) -> set[int]:
    """Sizes of ``torch.chunk``'s parts, padded with empty ones to ``count``."""
    full = -(-size // count)
    return {min(full, max(0, size - full * number)) for number in range(count)}


@contextmanager
def random_stream(device: torch.device, seed: int | None) -> Iterator[None]:
    """The device's random numbers come from this seed inside, and go on as before afterwards."""
    if seed is None:
        yield
        return
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        if on_gpu:
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield
