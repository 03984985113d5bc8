"""What each process holds of every parameter, and what FSDP2 gathers: arithmetic alone.

It stands on ``plan.place_parameters`` and repeats what FSDP2 does with it: shards as ``chunk``
makes them, all padded to the first one's size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import Shard

from moe_builders.parallel.boxes import box_shape, shard_box
from moe_builders.parallel.plan import Kind, MeshShape, Place, ShardGroup, place_parameters
from moe_builders.routing import storage_dtype


@dataclass(frozen=True)
class Parameter:
    """What the plan needs to know of a parameter.

    Attributes:
        shape: the whole one's.
        trains: it takes a gradient.
    """

    shape: tuple[int, ...]
    trains: bool = True


@dataclass(frozen=True)
class Held:
    """One parameter on a mesh.

    Attributes:
        name: as the model has it.
        parameter: the whole.
        place: which dims are dealt out.
        mesh: the processes.
        dtype: of storage.
    """

    name: str
    parameter: Parameter
    place: Place
    mesh: MeshShape
    dtype: torch.dtype

    @property
    def shards(self) -> int:
        """Processes that FSDP2 shards it over."""
        return self.mesh.shards(self.place.kind)

    @property
    def axes(self) -> str:
        """Dims and what they are sharded over, such as "0: ep 8, 1: dp_shard 2"."""
        over = "dp_shard" if self.place.ep_dim is not None or self.mesh.ep == 1 else "dp_shard × ep"
        parts = [] if self.place.ep_dim is None else [f"{self.place.ep_dim}: ep {self.mesh.ep}"]
        return ", ".join([*parts, f"{self.place.shard_dim}: {over} {self.shards}"])

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """What process ``rank`` holds of it."""
        cut = Shard(self.place.shard_dim)
        return box_shape(shard_box(self._part(), [self.shards], [cut], [self._number(rank)]))

    @property
    def numel(self) -> int:
        """Numbers that every process makes room for: the largest shard's, the others are padded."""
        return math.prod(self.local_shape(0))

    @property
    def gathered_numel(self) -> int:
        """Numbers of what FSDP2 gathers: the (ep's part of the) whole, with all padding."""
        return self.numel * self.shards

    def numels(self) -> set[int]:
        """Sizes of the shards there are, without padding."""
        part = self._part()
        size = part[self.place.shard_dim]
        each, others = math.ceil(size / self.shards), math.prod(part) // size
        whole, rest = divmod(size, each)
        idle = self.shards > whole + (rest > 0)
        return {each * others} | ({rest * others} if rest else set()) | ({0} if idle else set())

    def _part(self) -> tuple[int, ...]:
        if self.place.ep_dim is None:
            return self.parameter.shape
        shape = list(self.parameter.shape)
        shape[self.place.ep_dim] //= self.mesh.ep
        return tuple(shape)

    def _number(self, rank: int) -> int:
        of_copy = rank % (self.mesh.dp_shard * self.mesh.ep)
        return of_copy // self.mesh.ep if self.place.ep_dim is not None else of_copy


@dataclass(frozen=True)
class Gathered:
    """A group of parameters that FSDP2 gathers and reduces in one call each.

    Attributes:
        module: its name; "" is the model.
        kind: what sort of group.
        shards: processes that it is gathered from.
        weight_bytes: of the gathered whole, in the dtype that it computes in.
        gradient_bytes: of the trainable part's gradient in that dtype, before it is reduced.
        reduced_bytes: of the same in the dtype that gradients are added in.
        trains: something in it takes a gradient.
    """

    module: str
    kind: Kind
    shards: int
    weight_bytes: int
    gradient_bytes: int
    reduced_bytes: int
    trains: bool


def hold(
    parameters: Mapping[str, Parameter],
    groups: Sequence[ShardGroup],
    mesh: MeshShape,
    *,
    param_dtype: torch.dtype,
) -> list[Held]:
    """Every parameter on a mesh, in the model's order.

    Args:
        parameters: by name.
        groups: of ``sharding_plan``.
        mesh: the processes.
        param_dtype: of storage; routers are stored in fp32 or wider.
    """
    shapes = {name: p.shape for name, p in parameters.items()}
    places = place_parameters(shapes, groups, mesh)
    return [
        Held(name, p, places[name], mesh, storage_dtype(name, param_dtype))
        for name, p in parameters.items()
    ]


def gather_groups(
    held: Iterable[Held], *, compute_dtype: torch.dtype, world_size: int
) -> list[Gathered]:
    """What is gathered together, in the order of the parameters; see ``sharding.shard_model``.

    Args:
        held: of ``hold``.
        compute_dtype: of forward and backward; routers compute in fp32 or wider.
        world_size: processes; one alone adds nothing up and widens no gradient.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    members: dict[str, list[Held]] = {}
    for each in held:
        members.setdefault(each.place.group, []).append(each)
    found = []
    for module, own in members.items():
        kind, shards = own[0].place.kind, own[0].shards
        compute = wide if kind == "router" else compute_dtype
        reduce = wide if kind == "router" or world_size > 1 else compute_dtype
        trainable = sum(each.gathered_numel for each in own if each.parameter.trains)
        found.append(
            Gathered(
                module,
                kind,
                shards,
                weight_bytes=sum(each.gathered_numel for each in own) * compute.itemsize,
                gradient_bytes=trainable * compute.itemsize,
                reduced_bytes=trainable * reduce.itemsize,
                trains=trainable > 0,
            )
        )
    return found


def staying(groups: list[Gathered], *, reshard: bool) -> int:
    """Bytes that stay gathered from the first use to the end."""
    return sum(g.weight_bytes for g in groups if not reshard or g.kind in ("root", "router"))


def most_gathered(groups: list[Gathered], *, reshard: bool) -> int:
    """What stays gathered, the layer at work, and what is on its way: the next one, or a copy.

    FSDP2 gathers into one buffer and copies the weights out of it; going forward it keeps the
    buffer until the next group has come. A group of one process is copied when it is used.
    """
    layers: dict[str, list[Gathered]] = {}
    for group in groups:
        if group.kind in ("layer", "experts"):
            layers.setdefault(".".join(group.module.split(".")[:2]), []).append(group)
    most = 0
    for own, following in zip(layers.values(), [*list(layers.values())[1:], []], strict=True):
        sent, sent_next = (
            [g.weight_bytes for g in each if g.shards > 1] for each in (own, following)
        )
        buffer = max(sent, default=0)
        if reshard:
            at_work = sum(g.weight_bytes for g in own)
            most = max(most, at_work + max(buffer, sum(sent_next)))
        else:
            most = max(most, buffer)
    return staying(groups, reshard=reshard) + most
