"""Experts on several processes: how their tokens get there, and how the experts are dealt out.

Letters: p processes of an ep group · t tokens of one, T of all · a assignments of one, A of all ·
n rows of the experts that are here · e experts of all, j of one process · k experts_per_token ·
d dim.

Both dispatchers first exchange all counts, and the host reads them (once a layer and forward):
how much travels is known only then. What is sent back is added up in a fixed order.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_builders.dispatch import Assigned, Dispatcher, Experts, dispatch_locally
from moe_builders.errors import InputError
from moe_builders.parallel.plan import check_expert_parallel
from moe_builders.parallel.travel import (
    bring,
    everyones,
    find_route,
    gather,
    join,
    part_of,
    send,
    sum_home,
)


class AllToAll:
    """Every row travels to its expert's process, and the answer back: t·k·d values each way.

    Exactly the sums of one process: an expert's rows stand in the order of the processes they come
    from, and a token's answers are weighed and added at home.

    Args:
        group: the processes that share the experts, in the order of their parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, tokens: Tensor, assigned: Assigned, experts: Experts) -> Tensor:
        """See ``Dispatcher``."""
        counts = everyones(assigned.num_tokens_per_expert, self.group)  # [p, e]
        route = find_route(counts, assigned.token_index.shape[0], self.group)

        def elsewhere(
            rows: Tensor, num_tokens_per_expert: Tensor, row_weights: Tensor | None = None
        ) -> Tensor:
            weights = None if row_weights is None else send(row_weights, route)  # [n]
            return bring(experts(send(rows, route), route.here, weights), route)  # [a, d]

        return dispatch_locally(tokens, assigned, elsewhere)


class AllGather:
    """Every token travels to every process, partial sums back: (p-1)·t·d values each way.

    Fewer than ``AllToAll`` sends where p - 1 < k; memory for the tokens of all p processes. A
    token's answers are added up process by process, in fp32 or wider: one rounding more than on
    one process.

    Args:
        group: the processes that share the experts, in the order of their parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, tokens: Tensor, assigned: Assigned, experts: Experts) -> Tensor:
        """See ``Dispatcher``."""
        own = assigned.num_tokens_per_expert
        t, a = tokens.shape[0], assigned.token_index.shape[0]
        known = torch.cat((own, own.new_tensor([t, a])))  # [e + 2]
        of_all = everyones(known, self.group)  # [p, e + 2]
        host, (first, last) = of_all.tolist(), part_of(own.shape[0], self.group)
        t_of, a_of = (tuple(each[n] for each in host) for n in (-2, -1))
        live = sum(sum(each[first:last]) for each in host)
        joined = self._join(assigned, of_all[:, :-2], live, t_of, a_of)
        everybodys = join(tokens, self.group, t_of)  # [T, d]
        return sum_home(dispatch_locally(everybodys, joined, experts), self.group, t_of)

    def _join(
        self, assigned: Assigned, counts: Tensor, live: int, t_of: tuple[int, ...],
        a_of: tuple[int, ...],
    ) -> Assigned:  # fmt: skip
        """What all processes assigned to the experts that are here, as one list."""
        device, e = counts.device, counts.shape[1]
        first, last = part_of(e, self.group)
        numbers = torch.arange(e + 1, device=device)  # e: dead
        experts = []
        for own, rows in zip(counts, a_of, strict=True):
            dead = rows - own.sum(0, keepdim=True)
            experts.append(numbers.repeat_interleave(torch.cat((own, dead)), output_size=rows))
        expert = torch.cat(experts)  # [A] of the rows of all processes
        key = torch.where((expert >= first) & (expert < last), expert - first, last - first)
        # one dead row, for tokens that have no answer here
        order = key.argsort(stable=True)[: live + 1]
        offsets = torch.cat([
            torch.full((rows,), start, device=device)
            for start, rows in zip(accumulate((0, *t_of)), a_of, strict=False)
        ])  # [A] where the tokens of a row's process begin  # fmt: skip
        token = gather(assigned.token_index, self.group, a_of) + offsets  # [A]
        slot_of = None
        if assigned.slot_of is not None:
            slot_of = self._slots(assigned.slot_of, order, live, t_of, a_of)

        def weights(own: Tensor | None) -> Tensor | None:
            if own is None:
                return None
            kept = join(own, self.group, a_of).index_select(0, order)
            dead = torch.arange(order.shape[0], device=device) >= live
            return kept.masked_fill(dead, 0)

        return Assigned(
            token.index_select(0, order), counts[:, first:last].sum(0), slot_of,
            input_weights=weights(assigned.input_weights),
            row_weights=weights(assigned.row_weights),
            output_weights=weights(assigned.output_weights),
        )  # fmt: skip

    def _slots(
        self, own: Tensor, order: Tensor, live: int, t_of: tuple[int, ...], a_of: tuple[int, ...]
    ) -> Tensor:
        """[T, k] where each token's rows stand in the joined list; the dead row if elsewhere."""
        stands = torch.full((sum(a_of),), live, device=order.device)  # [A]
        stands[order[:live]] = torch.arange(live, device=order.device)
        of_each = gather(own, self.group, t_of).split(t_of)
        slots = [slots + n for slots, n in zip(of_each, accumulate((0, *a_of)), strict=False)]
        return stands[torch.cat(slots)]


_DISPATCHERS: dict[str, Callable[[dist.ProcessGroup], Dispatcher]] = {
    "all_to_all": AllToAll,
    "all_gather": AllGather,
}


def check_dispatcher(name: str) -> None:
    """Refuse what is no name of a dispatcher."""
    if name not in _DISPATCHERS:
        raise InputError(f"ep_dispatcher {name!r} is not one of {', '.join(_DISPATCHERS)}")


def deal_out_experts(model: nn.Module, name: str, mesh: DeviceMesh, *, dispatcher: str) -> None:
    """Keep this process's part of a layer's experts, and let its tokens find the others.

    Args:
        model: on the meta device or real.
        name: of the experts' module; its parent has a ``dispatcher``.
        mesh: of the ep axis alone.
        dispatcher: a name.

    Raises:
        InputError: experts that are no batched tensors, a number that ep does not divide, or
            experts that no MoE hands tokens to.
    """
    experts = model.get_submodule(name)
    layer = model.get_submodule(name.rpartition(".")[0])
    num_experts = getattr(experts, "num_experts", 0)
    stacked = all(p.ndim and p.shape[0] == num_experts for p in experts.parameters())
    if not stacked or not hasattr(experts, "part") or not hasattr(layer, "dispatcher"):
        raise InputError(
            f"ep is {mesh.size()}, but the experts of {name} ({type(experts).__name__}) are no "
            "GroupedExperts of a MoE layer, which alone can be dealt out: set ep=1, or stack them "
            "(moe_builders.experts.stacking)"
        )
    check_expert_parallel(ep=mesh.size(), num_experts=num_experts, layer=name)
    group = mesh.get_group()
    first, last = part_of(num_experts, group)
    for key, parameter in list(experts.named_parameters(recurse=False)):
        own = parameter.detach()[first:last].clone(memory_format=torch.contiguous_format)
        shared = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        experts.register_parameter(key, nn.Parameter(shared, parameter.requires_grad))
    experts.part = _here  # pyright: ignore[reportArgumentType] nn.Module takes any attribute
    layer.dispatcher = _DISPATCHERS[dispatcher](group)  # pyright: ignore[reportArgumentType]


def _here(parameter: Tensor) -> Tensor:
    """A parameter's experts of this process, and its gradient's."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
