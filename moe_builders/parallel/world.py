"""Who takes part: rank, size, device and mesh, launched by torchrun or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_builders.errors import InputError


@dataclass(frozen=True)
class World:
    """The processes of a run, from the view of one.

    Attributes:
        rank: this process, 0 … size-1.
        size: number of processes.
        device: where this process computes.
        mesh: axes ("dp_shard",) or ("dp_replicate", "dp_shard"); the data is split over all.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        """Whether this process prints, logs and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place (on the compute device); no host sync."""
        if self.size > 1 and value.numel():
            dist.all_reduce(value)
        return value

    def send(self, value: Tensor) -> Tensor:
        """Copy from the host to the compute device without waiting for it."""
        if self.device.type == "cuda":
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True)

    def gather_objects(self, value: Any) -> list[Any]:
        """What each process has, by rank; every process must call it, and all wait."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def open_world(
    *,
    device: str = "auto",
    dp_replicate: int = 1,
    dp_shard: int = -1,
    timeout_minutes: float = 30.0,
    deterministic: bool = False,
) -> Iterator[World]:
    """Join the processes that torchrun launched, or be the only one; leave them at the end.

    Args:
        device: "cpu", "cuda" or "auto" (cuda if there is one).
        dp_replicate: how many copies of the sharded model.
        dp_shard: over how many processes each copy is sharded; -1: all that remain.
        timeout_minutes: after which a collective that a process does not join is an error.
        deterministic: refuse operations whose result depends on the order of threads.

    Raises:
        InputError: no such device, or the axes do not multiply to the number of processes.
    """
    kind = _device_type(device)
    joined_here = not dist.is_initialized()
    launched = "RANK" in os.environ  # WORLD_SIZE alone may be left over from something else
    size, rank = 1, 0
    if not joined_here:
        size, rank = dist.get_world_size(), dist.get_rank()
    elif launched:
        size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    shape = _mesh_shape(size, dp_replicate, dp_shard)
    own_device = _own_device(kind)
    if joined_here:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            backend,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=own_device if kind == "cuda" else None,
            **alone,
        )
    names = ("dp_replicate", "dp_shard") if len(shape) == 2 else ("dp_shard",)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    try:
        with _deterministic() if deterministic else nullcontext():
            yield World(rank, size, own_device, mesh)
    except BaseException:
        # NCCL's farewell waits for processes that may be stuck; leaving without it lets this one
        # end and the launcher stop the others
        if joined_here and (kind == "cpu" or size == 1):
            dist.destroy_process_group()
        raise
    if joined_here:
        dist.destroy_process_group()


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch raises at any operation without a deterministic way; cuBLAS gets its fixed space."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _device_type(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {device!r} is not one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch finds none here: set device=cpu")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _own_device(kind: str) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise InputError(
            f"process {number} of this machine has no GPU, as there are only {there}: launch "
            f"--nproc_per_node {there}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _mesh_shape(size: int, dp_replicate: int, dp_shard: int) -> tuple[int, ...]:
    if dp_replicate < 1 or size % dp_replicate:
        raise InputError(
            f"dp_replicate is {dp_replicate}, but must divide the number of processes ({size})"
        )
    per_copy = size // dp_replicate
    if dp_shard < 1 and dp_shard != -1:
        raise InputError(
            f"dp_shard is {dp_shard}, but must be -1 (all processes that remain) or {per_copy}"
        )
    if dp_shard not in (-1, per_copy):
        raise InputError(
            f"dp_replicate ({dp_replicate}) × dp_shard ({dp_shard}) is not the number of "
            f"processes ({size}): set dp_shard to {per_copy} or -1, or launch "
            f"{dp_replicate * dp_shard}"
        )
    return (dp_replicate, per_copy) if dp_replicate > 1 else (per_copy,)
