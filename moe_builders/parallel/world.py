"""Who takes part: rank, size, device and mesh, launched by torchrun or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_builders.errors import InputError
from moe_builders.instantiate import first_line
from moe_builders.parallel.agree import gather_objects
from moe_builders.parallel.heartbeat import (
    Heartbeat,
    LostProcess,
    of_a_collective,
    signs_of_life,
)
from moe_builders.parallel.meeting import launched_as, meeting_place
from moe_builders.parallel.plan import MeshShape, choices
from moe_builders.parallel.same_settings import check_same_settings


@dataclass(frozen=True)
class World:
    """The processes of a run, from the view of one.

    Attributes:
        rank: this process, 0 … size-1.
        size: number of processes.
        device: where this process computes.
        mesh: axes ("dp_shard",) or ("dp_replicate", "dp_shard"); the data is split over all.
        expert_mesh: axes ("dp_replicate", "dp_shard", "ep") of the same processes, for routed
            experts; None where ep is 1, and they live as everything else does.
        heartbeat: tells the others that this process lives; None: nobody would miss it.
        timeout: how long a collective waits for the others; None: as torch has it.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    expert_mesh: DeviceMesh | None = None
    heartbeat: Heartbeat | None = None
    timeout: timedelta | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process prints, logs and writes."""
        return self.rank == 0

    @property
    def shape(self) -> MeshShape:
        """How many processes there are along each axis."""
        if self.expert_mesh is not None:
            return MeshShape(*self.expert_mesh.shape)
        return MeshShape(*((1,) * (2 - self.mesh.ndim)), *self.mesh.shape)

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
        return gather_objects(value)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def new_gloo_group(self) -> dist.ProcessGroup:
        """All processes once more, for a thread of its own; every process calls.

        Raises:
            LostProcess: one of them is gone.
        """
        make = partial(dist.new_group, backend="gloo", timeout=self.timeout)
        group = make() if self.heartbeat is None else self.heartbeat.meet(make)
        assert isinstance(group, dist.ProcessGroup), "it has all processes"
        return group

    def doing(self, what: str) -> None:
        """Note what this process is at ("step 17"), for the others' message if it is lost."""
        if self.heartbeat is not None:
            self.heartbeat.doing = what


@contextmanager
def open_world(
    *,
    device: str = "auto",
    dp_replicate: int = 1,
    dp_shard: int = -1,
    ep: int = 1,
    timeout_minutes: float = 30.0,
    deterministic: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[World]:
    """Join the processes that torchrun launched, or be the only one; leave them at the end.

    Args:
        device: "cpu", "cuda" or "auto" (cuda if there is one).
        dp_replicate: how many copies of the sharded model.
        dp_shard: over how many processes each copy (with ep: each part of the experts) is sharded;
            -1: all that remain.
        ep: among how many processes the routed experts are dealt out.
        timeout_minutes: after which a collective that a process does not join is an error, and
            until which all have to be there at the start.
        deterministic: refuse operations whose result depends on the order of threads.
        settings: a configuration that has to be the same for all processes; None: not compared.

    Raises:
        InputError: no such device, the axes do not multiply to the number of processes, or the
            processes have other settings.
        LostProcess: the others did not come, or one of them is gone.
    """
    kind, timeout = _device_type(device), None
    joined_here = not dist.is_initialized()
    if joined_here:
        launched = launched_as()
        rank, size = launched or (0, 1)
    else:
        launched, rank, size = None, dist.get_rank(), dist.get_world_size()
    shape = mesh_shape(size, dp_replicate=dp_replicate, dp_shard=dp_shard, ep=ep)
    own_device = _own_device(kind)
    if joined_here:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            dist.init_process_group(
                backend,
                timeout=timeout,
                device_id=own_device if kind == "cuda" else None,
                **(meeting_place(rank, size, timeout) if launched else alone),
            )
        except RuntimeError as error:
            if not of_a_collective(error):
                raise
            raise LostProcess(_not_met(size, timeout_minutes, error)) from error
    try:
        with (
            signs_of_life(rank, size) if joined_here and size > 1 else nullcontext() as heartbeat,
            _deterministic() if deterministic else nullcontext(),
        ):
            if settings is not None and size > 1:
                check_same_settings(settings)  # before anything whose shape depends on them
            make = partial(_meshes, kind, shape, timeout)
            # not with NCCL, whose groups are made for the GPU of the thread that makes them
            meet = None if heartbeat is None or kind == "cuda" else heartbeat.meet
            mesh, expert_mesh = make() if meet is None else meet(make)
            yield World(rank, size, own_device, mesh, expert_mesh, heartbeat, timeout)
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


def _not_met(size: int, timeout_minutes: float, error: Exception) -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"the {size} processes did not meet at {where} within timeout_minutes "
        f"({timeout_minutes:g}): {first_line(error)}; look at the output of those that are missing"
    )


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


def _meshes(
    kind: str, shape: MeshShape, timeout: timedelta | None
) -> tuple[DeviceMesh, DeviceMesh | None]:
    """For all parameters, and for routed experts where those live elsewhere."""
    names, copies = ("dp_replicate", "dp_shard"), shape.dp_replicate
    axes = slice(0 if copies > 1 else 1, None)  # no axis for a single copy
    mesh = init_device_mesh(kind, (copies, shape.shards("layer"))[axes], mesh_dim_names=names[axes])
    expert_mesh = None
    if shape.ep > 1:
        whole = (copies, shape.dp_shard, shape.ep)
        expert_mesh = init_device_mesh(kind, whole, mesh_dim_names=(*names, "ep"))
    if timeout is not None:  # a mesh makes its groups with torch's own
        for made in (mesh, expert_mesh):
            for group in made.get_all_groups() if made is not None else ():
                dist.distributed_c10d._set_pg_timeout(timeout, group)
    return mesh, expert_mesh


def mesh_shape(size: int, *, dp_replicate: int, dp_shard: int, ep: int) -> MeshShape:
    """The axes of a number of processes; dp_shard -1 takes what the others leave.

    Raises:
        InputError: they do not multiply to it; what would is named.
    """
    if ep < 1 or size % ep:
        raise InputError(
            f"ep is {ep}, but must divide the number of processes ({size}): choose {choices(size)}"
        )
    if dp_replicate < 1 or size // ep % dp_replicate:
        among = f"the number of processes ({size})"
        if ep > 1:
            among = f"the {size // ep} that ep ({ep}) leaves of {size} processes"
        raise InputError(
            f"dp_replicate is {dp_replicate}, but must divide {among}: choose {choices(size // ep)}"
        )
    per_copy = size // ep // dp_replicate
    if dp_shard < 1 and dp_shard != -1:
        raise InputError(
            f"dp_shard is {dp_shard}, but must be -1 (all processes that remain) or {per_copy}"
        )
    if dp_shard not in (-1, per_copy):
        others = f"dp_replicate ({dp_replicate}) × dp_shard ({dp_shard})"
        others += "" if ep == 1 else f" × ep ({ep})"
        raise InputError(
            f"{others} is not the number of processes ({size}): set dp_shard to {per_copy} or -1, "
            f"or launch {dp_replicate * dp_shard * ep}"
        )
    return MeshShape(dp_replicate, per_copy, ep)
