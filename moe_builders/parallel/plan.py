"""Where parameters live, as data made from names and shapes; no process is asked.

Three kinds of groups are gathered together, because their rules differ: a router computes in fp32
whatever the rest does (as part of a bf16 layer its gate would be cast); experts are a group of
their own, so that an odd-sized neighbour cannot misalign their matrices, and may live on other
processes than the rest (``ep``); a layer takes what remains.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_builders.errors import InputError
from moe_builders.routing import ROUTER_MODULE

Kind = Literal["router", "experts", "layer", "root"]
_KINDS = (
    ("router", ROUTER_MODULE),
    ("experts", re.compile(r"layers\.\d+\.(.+\.)?experts")),
    ("layer", re.compile(r"layers\.\d+")),
)


@dataclass(frozen=True)
class MeshShape:
    """How many processes there are along each axis; each of them has tokens of its own.

    Process (r, s, p) has rank (r · dp_shard + s) · ep + p.

    Attributes:
        dp_replicate: copies of the model.
        dp_shard: over how many processes each part of the routed experts is sharded.
        ep: among how many processes the routed experts are dealt out. Everything else is sharded
            over the dp_shard · ep processes of a copy.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.dp_replicate * self.dp_shard * self.ep

    def shards(self, kind: Kind) -> int:
        """Over how many processes FSDP2 shards the parameters of a group."""
        return self.dp_shard if self.ep > 1 and kind == "experts" else self.dp_shard * self.ep


@dataclass(frozen=True)
class ShardGroup:
    """A module whose remaining parameters are gathered and reduced together."""

    module: str
    kind: Kind


@dataclass(frozen=True)
class Place:
    """Where one parameter lives.

    Attributes:
        group: the module of its ``ShardGroup``.
        kind: of that group.
        ep_dim: the dim that is dealt out over ep, first; None: no such parameter, or ep is 1.
        shard_dim: the dim that FSDP2 shards.
    """

    group: str
    kind: Kind
    ep_dim: int | None
    shard_dim: int


def sharding_plan(module_names: Iterable[str]) -> list[ShardGroup]:
    """Groups in the order they must be applied: inner modules first, the root last."""
    names = list(module_names)
    groups = [
        ShardGroup(name, kind)  # pyright: ignore[reportArgumentType]
        for kind, pattern in _KINDS
        for name in names
        if pattern.fullmatch(name)
    ]
    return [*groups, ShardGroup("", "root")]


def place_parameters(
    shapes: Mapping[str, Sequence[int]], groups: Iterable[ShardGroup], mesh: MeshShape
) -> dict[str, Place]:
    """Where every parameter lives.

    Args:
        shapes: global shape of each, by name.
        groups: as ``sharding_plan`` orders them; a parameter belongs to the first that holds it.
        mesh: the processes.
    """
    places: dict[str, Place] = {}
    for group in groups:
        prefix = f"{group.module}." if group.module else ""
        shards = mesh.shards(group.kind)
        apart = mesh.ep > 1 and group.kind == "experts"
        for name, shape in shapes.items():
            if name in places or not name.startswith(prefix):
                continue
            held = tuple(shape)
            if apart:
                held = (held[0] // mesh.ep, *held[1:])
            dim = _shard_dim(held, shards) if group.kind == "experts" else 0
            places[name] = Place(group.module, group.kind, 0 if apart else None, dim)
    return places


def _shard_dim(shape: Sequence[int], shards: int) -> int:
    """The dim of an experts' parameter that FSDP2 shards.

    The first if every process gets some; else another that divides evenly (FSDP2 takes no other);
    if there is none the first, and some processes hold nothing of it.
    """
    if shape[0] >= shards:
        return 0
    return next((dim for dim in range(1, len(shape)) if shape[dim] % shards == 0), 0)


def check_expert_parallel(*, ep: int, num_experts: int, layer: str) -> None:
    """Whether a layer's experts can be dealt out.

    Raises:
        InputError: ep does not divide their number; those that do are named.
    """
    if num_experts % ep:
        raise InputError(
            f"ep is {ep}, but must divide the {num_experts} experts of {layer}: choose "
            f"{choices(num_experts)}"
        )


def describe_mesh(mesh: MeshShape, *, dispatcher: str) -> list[str]:
    """A line to show once: how the processes share the model; [] for one process."""
    if mesh.size == 1:
        return []
    axes = f"dp_replicate {mesh.dp_replicate} × dp_shard {mesh.dp_shard} × ep {mesh.ep}"
    return [f"{mesh.size} processes: {axes}" + (f" ({dispatcher})" if mesh.ep > 1 else "")]


def choices(number: int) -> str:
    """The divisors of a number, as a user may choose from them: "1, 2 or 4"."""
    divisors = [str(n) for n in range(1, number + 1) if number % n == 0]
    return " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
