"""Which collectives a training step does, and how many bytes a process sends: arithmetic.

Letters: t tokens of a process's micro-batch · a assignments of one · e experts of all ·
p processes of an ep group · d width of what travels · l layers with experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moe_builders.parallel.holdings import Gathered
from moe_builders.parallel.plan import MeshShape

What = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
Axis = Literal["dp_replicate", "dp_shard", "dp_shard × ep", "ep", "all"]
_COUNT, _INT, _DOUBLE = 4, 8, 8  # bytes of a count, of a place or total, of a statistic
_SECONDS = 4  # bytes of what a process tells of its own time


@dataclass(frozen=True)
class Collective:
    """Calls of one kind over the same processes.

    Attributes:
        why: what for.
        what: the operation.
        axis: which processes take part.
        processes: how many.
        calls: in a step, of each process.
        whole: bytes of all calls together: of what is gathered, reduced, or sent out by a process
            (all_to_all: rows for itself are among them).
        waits: the next computation needs it: nothing else can be done meanwhile.
    """

    why: str
    what: What
    axis: Axis
    processes: int
    calls: int
    whole: float
    waits: bool = False

    @property
    def sent(self) -> float:
        """Bytes that leave a process, by the usual rings: an all-reduce goes round twice."""
        turns = 2 if self.what == "all_reduce" else 1
        return turns * self.whole * (self.processes - 1) / self.processes

    def sent_outside(self, mesh: MeshShape, *, node_size: int) -> float:
        """Bytes of ``sent`` that a process sends out of its node, with node_size ranks in each.

        A ring crosses a node's border once, so that the members in a node share its traffic there.
        In an all_to_all each process sends to each.
        """
        inside = self.inside(mesh, node_size=node_size)
        if inside == self.processes:
            return 0.0
        if self.what == "all_to_all":
            return self.whole * (self.processes - inside) / self.processes
        return self.sent / inside

    def sent_inside(self, mesh: MeshShape, *, node_size: int) -> float:
        """Bytes that a process sends to others of its node."""
        inside = self.inside(mesh, node_size=node_size)
        if self.what == "all_to_all":
            return self.whole * (inside - 1) / self.processes
        return 0.0 if inside == 1 else self.sent

    def inside(self, mesh: MeshShape, *, node_size: int) -> int:
        """How many of its processes are in one node."""
        strides = {"dp_replicate": mesh.dp_shard * mesh.ep, "dp_shard": mesh.ep}
        return max(1, min(self.processes, node_size // strides.get(self.axis, 1)))


@dataclass(frozen=True)
class ExpertLayer:
    """A layer whose tokens travel to experts.

    Attributes:
        num_experts: e.
        assignments: a, for t tokens, dead ones included; all are taken to be live.
        dim: d, of the experts' input.
        slots: k where every token has k assignments (then their places travel too), else None.
        mid_weights: weights multiply inside the expert, and travel with the rows.
        output_weights: weights multiply at home (all_gather sends them).
    """

    num_experts: int
    assignments: int
    dim: int
    slots: int | None
    mid_weights: bool = False
    output_weights: bool = True


def fsdp_traffic(
    groups: Iterable[Gathered],
    mesh: MeshShape,
    *,
    reshard_after_forward: bool,
    accumulation: int,
    counts_first: bool = False,
) -> list[Collective]:
    """Weights gathered before forward and backward, gradients added up after each micro-batch.

    Routers and the root stay gathered from forward to backward. A layer that is recomputed is
    gathered no third time; for a forward that counts first it is gathered.
    """
    found = []
    for kind in ("root", "layer", "experts", "router"):
        own = [group for group in groups if group.kind == kind]
        if not own:
            continue
        n = own[0].shards
        axis: Axis = "dp_shard"
        if mesh.ep > 1 and kind != "experts":
            axis = "dp_shard × ep"
        weights = sum(group.weight_bytes for group in own)
        learning = [group for group in own if group.trains]
        reduced = sum(group.reduced_bytes for group in learning)
        calls = accumulation * len(learning)
        if n > 1:
            again = reshard_after_forward and kind in ("layer", "experts")
            whens = ["forward"] + again * ["backward"] + (again and counts_first) * ["counting"]
            for when in whens:
                found.append(
                    Collective(f"{kind}: weights, {when}", "all_gather", axis, n,
                               accumulation * len(own), accumulation * weights)
                )  # fmt: skip
            if learning:
                found.append(
                    Collective(f"{kind}: gradients", "reduce_scatter", axis, n, calls,
                               accumulation * reduced)
                )  # fmt: skip
        if mesh.dp_replicate > 1 and learning:
            found.append(
                Collective(f"{kind}: gradients of the copies", "all_reduce", "dp_replicate",
                           mesh.dp_replicate, calls, accumulation * reduced / n)
            )  # fmt: skip
    return found


def expert_traffic(
    layers: Sequence[ExpertLayer],
    mesh: MeshShape,
    *,
    dispatcher: str,
    num_tokens: int,
    compute_dtype: torch.dtype,
    accumulation: int,
    forwards: int,
    answered: int,
) -> list[Collective]:
    """Tokens to their experts and back, forward and backward; [] without ep.

    Args:
        layers: those with experts.
        mesh: gives p.
        dispatcher: "all_to_all" or "all_gather", see ``expert_parallel``.
        num_tokens: t, the same on every process.
        compute_dtype: of what travels.
        accumulation: micro-batches of a step.
        forwards: of each, those that count first or are recomputed among them.
        answered: without what is recomputed, which ends before the answers of ``all_gather``
            would travel again.
    """
    if mesh.ep == 1:
        return []
    p, wide = mesh.ep, torch.promote_types(compute_dtype, torch.float32).itemsize
    forwards, answered = accumulation * forwards, accumulation * answered

    assigned = sum(each.assignments * each.dim for each in layers) * compute_dtype.itemsize
    tokens = sum(num_tokens * each.dim for each in layers) * compute_dtype.itemsize

    def one(why: str, what: What, calls: int, whole: int, times: int) -> Collective:
        return Collective(why, what, "ep", p, calls * times, whole * times, waits=True)

    if dispatcher == "all_to_all":
        counts = p * sum(each.num_experts for each in layers) * _COUNT
        mid = [each for each in layers if each.mid_weights]
        weights = sum(each.assignments for each in mid) * wide
        calls, whole = 2 * len(layers) + len(mid), 2 * assigned + weights
        return [
            one("experts: counts", "all_gather", len(layers), counts, forwards),
            one("experts: rows there and back", "all_to_all", calls, whole, forwards),
            one("experts: gradients of rows", "all_to_all", calls, whole, accumulation),
        ]
    counts = p * sum(each.num_experts + 2 for each in layers) * _COUNT
    places = p * sum(
        (each.assignments + (0 if each.slots is None else num_tokens * each.slots)) * _INT
        for each in layers
    )
    weighed = [each for each in layers for _ in range(each.mid_weights + each.output_weights)]
    weights = sum(each.assignments for each in weighed) * wide
    small = 2 * len(layers) + sum(each.slots is not None for each in layers)
    return [
        one("experts: counts and places", "all_gather", small, counts + places, forwards),
        one("experts: weights", "all_gather", len(weighed), p * weights, forwards),
        one("experts: tokens", "all_gather", len(layers), p * tokens, forwards),
        one("experts: answers", "all_to_all", len(layers), p * tokens, answered),
        one("experts: gradients of answers", "all_gather", len(layers), p * tokens, accumulation),
        one("experts: gradients of tokens", "all_to_all", len(layers), p * tokens, accumulation),
        one("experts: gradients of weights", "all_to_all", len(weighed), p * weights, accumulation),
    ]


def small_traffic(
    layers: Sequence[ExpertLayer],
    mesh: MeshShape,
    *,
    tally_size: int,
    global_counts: int,
    experts_apart: bool,
    dense_shards: int,
) -> list[Collective]:
    """What a step adds up besides: token counts, losses, loads, tallies, seconds, the norm.

    Args:
        layers: those with experts; all have the same number of them.
        mesh: the processes.
        tally_size: numbers that learning routers add up.
        global_counts: how often the balancing loss counts over all processes.
        experts_apart: experts live on a mesh of their own.
        dense_shards: processes that everything else is sharded over.
    """
    n, table = mesh.size, len(layers) * layers[0].num_experts if layers else 0
    found = []
    if n > 1:
        sums = 5 * _INT + 4 * _DOUBLE + 3 * table * _DOUBLE + 2 * n * _SECONDS
        calls = 4 + (tally_size > 0) + global_counts
        whole = sums + tally_size * _DOUBLE + global_counts * table * _DOUBLE
        found.append(Collective("counts, losses, loads", "all_reduce", "all", n, calls, whole))
    rest: Axis = "dp_shard × ep" if mesh.ep > 1 else "dp_shard"
    over: list[tuple[Axis, int]] = [(rest, dense_shards)]
    if experts_apart and mesh.ep < n:  # else they are summed with the rest, by all
        over.append(("dp_shard", mesh.dp_shard))
        over.append(("ep", mesh.ep))
    found += [
        Collective("norm of the gradients", "all_reduce", axis, size, 1, _DOUBLE)
        for axis, size in over
        if size > 1
    ]
    return found
