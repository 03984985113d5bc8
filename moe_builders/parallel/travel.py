"""Rows of tensors on their way between processes, forward and backward.

Letters: p processes of a group · a rows at home (dead ones included) · n rows that are here ·
e experts of all, j of one process.

What is added up is added in the order of the processes, in fp32 or wider: the same bits every time.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Which rows travel.

    Attributes:
        sent, received: rows to and from each process.
        rows: a, of the list at home, dead ones included.
        order: [n] where a row that is sorted by expert stood when it arrived.
        back: [n] the inverse.
        here: [j] rows of each expert that is here.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    rows: int
    order: Tensor
    back: Tensor
    here: Tensor


def part_of(num_experts: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """First and one past the last expert of this process."""
    each, number = num_experts // dist.get_world_size(group), dist.get_rank(group)
    return number * each, (number + 1) * each


def everyones(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[m] -> [p, m]."""
    found = own.new_empty(dist.get_world_size(group), own.shape[0])
    _all_gather(found.view(-1), own.contiguous(), group)
    return found


def find_route(counts: Tensor, rows: int, group: dist.ProcessGroup) -> Route:
    """Where rows go; the host reads how many.

    Args:
        counts: [p, e] rows of every expert on every process.
        rows: a.
        group: the processes.
    """
    first, last = part_of(counts.shape[1], group)
    coming = counts[:, first:last]  # [p, j]
    leaving = counts[dist.get_rank(group)].view(counts.shape[0], -1)  # [p, j]
    both = torch.stack((leaving.sum(1), coming.sum(1))).tolist()
    n = sum(both[1])
    number = torch.arange(last - first, device=counts.device).repeat(counts.shape[0])
    expert = number.repeat_interleave(coming.flatten(), output_size=n)  # [n] as they arrive
    order = expert.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(n, device=counts.device)
    return Route(group, both[0], both[1], rows, order, back, coming.sum(0))


def gather(own: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
    """What all processes have, one after another; they need not have equally much."""
    most = max(sizes)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: own.shape[0]] = own
    found = own.new_empty(len(sizes) * most, *own.shape[1:])
    _all_gather(found, padded, group)
    return torch.cat([found[n * most : n * most + size] for n, size in enumerate(sizes)])


def send(rows: Tensor, route: Route) -> Tensor:
    """Live rows to their experts' processes, where they are sorted by expert: [a, …] -> [n, …]."""
    return _Travel.apply(rows, route, True)


def bring(answers: Tensor, route: Route) -> Tensor:
    """Answers home, in the order of the rows; zero for dead ones: [n, …] -> [a, …]."""
    return _Travel.apply(answers, route, False)


def join(own: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
    """What all processes have, one after another; ``sizes`` of each along dim 0."""
    return _Share.apply(own, group, sizes, True)


def sum_home(parts: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
    """At home the sum of what all processes have for it: the opposite of ``join``."""
    return _Share.apply(parts, group, sizes, False)


class _Travel(torch.autograd.Function):
    """Rows to the experts (dead ones stay), or answers home (zero for the dead)."""

    @staticmethod
    def forward(ctx, rows: Tensor, route: Route, out: bool) -> Tensor:
        ctx.route, ctx.out = route, out
        return _send(rows, route) if out else _bring(rows, route)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (_bring if ctx.out else _send)(grad, ctx.route), None, None


class _Share(torch.autograd.Function):
    """What all processes have, one after another; or at home the sum of what all have for it."""

    @staticmethod
    def forward(
        ctx, values: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...], out: bool
    ) -> Tensor:
        ctx.group, ctx.sizes, ctx.out = group, sizes, out
        return (gather if out else _added)(values, group, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (_added if ctx.out else gather)(grad, ctx.group, ctx.sizes), None, None, None


def _send(rows: Tensor, route: Route) -> Tensor:
    """[a, …] -> [n, …]."""
    arrived = _exchange(rows[: sum(route.sent)], route.sent, route.received, route.group)
    return arrived.index_select(0, route.order)


def _bring(answers: Tensor, route: Route) -> Tensor:
    """[n, …] -> [a, …]."""
    rows = answers.index_select(0, route.back)
    home = _exchange(rows, route.received, route.sent, route.group)
    dead = home.new_zeros(route.rows - home.shape[0], *home.shape[1:])
    return torch.cat((home, dead))


def _exchange(rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty(sum(got), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), got, sent, group=group)
    return found


def _added(parts: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
    """What each process has for this one, added up in their order."""
    own = sizes[dist.get_rank(group)]
    found = _exchange(parts, list(sizes), [own] * len(sizes), group)
    wide = torch.promote_types(parts.dtype, torch.float32)
    each = found.view(len(sizes), own, *parts.shape[1:])
    total = each[0].to(wide)
    for part in each[1:]:
        total = total + part
    return total.to(parts.dtype)


def _all_gather(found: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    # torch 2.13 warns of the old name, 2.11 does not know the new one
    gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather_into(found, own, group=group)
