"""Experts that stay on the host, a few of them at a time on the device: for generation.

Letters: a rows (assignments sorted by expert) · e num_experts · d dim.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.experts.grouped import GroupedExperts
from moe_builders.moe import moe_layers


class OffloadedExperts(nn.Module):
    """``GroupedExperts`` whose weights lie on the host; at most ``cache_size`` on the device.

    A forward brings in the experts that have rows, those that are there first; the one that was
    used longest ago makes room. The answers are those of the resident experts (the same bits on a
    CPU). No gradients and no dropout: this is for inference.

    Which experts are needed is read on the host: that cannot be helped, and a forward waits for
    it. The weights are no parameters: they follow no ``to(device)`` and no ``state_dict`` has
    them, so save a model before its experts are offloaded.

    Args:
        experts: not sharded, not on the meta device; weights elsewhere than on the host are copied
            there (pinned, where ``device`` is a GPU).
        cache_size: how many experts' weights the device holds at most.
        device: where to compute.

    Attributes:
        hits, misses: how often an expert that was needed was there, and was not.

    Raises:
        InputError: cache_size outside [1, e], or weights that cannot be offloaded.
    """

    def __init__(
        self, experts: GroupedExperts, *, cache_size: int, device: torch.device | str
    ) -> None:
        super().__init__()
        _check(experts, cache_size)
        self.device = torch.device(device)
        self._host: dict[str, Tensor] = {}
        for name, parameter in experts.named_parameters():
            value = parameter.detach().cpu()
            self._host[name] = value.pin_memory() if self.device.type == "cuda" else value
        self.num_experts, self.cache_size = experts.num_experts, cache_size
        self.hits = self.misses = 0
        with torch.device("meta"):  # computes whatever single expert it is given
            one = GroupedExperts(
                dim=experts.dim,
                hidden_dim=experts.hidden_dim,
                num_experts=1,
                activation=experts.activation,
                bias=experts.down_bias is not None,
                hidden_scale=experts.hidden_scale is not None,
                backend=experts.backend,
            )
        self._compute = (one,)  # in a tuple: no submodule, whose parameters would be counted
        self._slots = {
            name: torch.empty(cache_size, *value.shape[1:], dtype=value.dtype, device=self.device)
            for name, value in self._host.items()
        }
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # expert -> slot, longest unused first

    @property
    def resident(self) -> tuple[int, ...]:
        """The experts on the device, the one that goes next first."""
        return tuple(self._slot_of)

    def forward(
        self, x: Tensor, num_tokens_per_expert: Tensor, row_weights: Tensor | None = None
    ) -> Tensor:
        """See ``GroupedExperts.forward``.

        Raises:
            InputError: gradients are on.
        """
        if torch.is_grad_enabled():
            raise InputError(
                "offloaded experts have no gradients: call the model under torch.no_grad(), or "
                "train it before its experts are offloaded"
            )
        counts = num_tokens_per_expert.tolist()
        ends = num_tokens_per_expert.cumsum(0).tolist()
        needed = [expert for expert, rows in enumerate(counts) if rows]
        there = [expert for expert in needed if expert in self._slot_of]
        y = torch.zeros_like(x)  # [a, d]
        for expert in [*there, *(expert for expert in needed if expert not in there)]:
            rows = slice(ends[expert] - counts[expert], ends[expert])
            weights = None if row_weights is None else row_weights[rows]
            y[rows] = self._apply_expert(expert, x[rows], weights)
        return y

    def _apply_expert(self, expert: int, x: Tensor, row_weights: Tensor | None) -> Tensor:
        slot = self._slot(expert)
        weights = {name: slots[slot : slot + 1] for name, slots in self._slots.items()}
        count = torch.full((1,), x.shape[0], device=x.device)
        return torch.func.functional_call(self._compute[0], weights, (x, count, row_weights))

    def _slot(self, expert: int) -> int:
        """Where the expert's weights are on the device, brought there if need be."""
        if expert in self._slot_of:
            self.hits += 1
            self._slot_of.move_to_end(expert)
            return self._slot_of[expert]
        self.misses += 1
        full = len(self._slot_of) == self.cache_size
        slot = self._slot_of.popitem(last=False)[1] if full else len(self._slot_of)
        for name, slots in self._slots.items():
            # the stream keeps the order: what still computes with the old weights comes first
            slots[slot].copy_(self._host[name][expert], non_blocking=True)
        self._slot_of[expert] = slot
        return slot


def offload_experts(model: nn.Module, *, cache_size: int, device: torch.device | str) -> None:
    """Put every MoE layer's experts on the host, in place; the rest of the model stays where it is.

    Args:
        model: filled, in evaluation mode, on one process.
        cache_size: experts of each layer on the device at a time.
        device: where the rest of the model is.

    Raises:
        InputError: no MoE layer, or one whose experts are no ``GroupedExperts``; nothing has been
            changed then.
    """
    layers = dict(moe_layers(model))
    if not layers:
        raise InputError(f"a {type(model).__name__} without a MoE layer has no experts to offload")
    for name, layer in layers.items():
        if not isinstance(layer.experts, GroupedExperts):
            raise InputError(
                f"the experts of {name or 'the layer'} are {type(layer.experts).__name__}, but "
                "only GroupedExperts can be offloaded: merge_experts stacks those that can be"
            )
        _check(layer.experts, cache_size)
    for layer in layers.values():
        assert isinstance(layer.experts, GroupedExperts)
        layer.experts = OffloadedExperts(layer.experts, cache_size=cache_size, device=device)


def _check(experts: GroupedExperts, cache_size: int) -> None:
    if not 1 <= cache_size <= experts.num_experts:
        raise InputError(
            f"cache_size is {cache_size}, but must be from 1 to the number of experts "
            f"({experts.num_experts})"
        )
    for name, parameter in experts.named_parameters():
        if type(parameter.data) is not Tensor or parameter.is_meta:
            raise InputError(
                f"the experts' {name} is a {type(parameter.data).__name__} on {parameter.device}, "
                "but only plain tensors that hold values can be offloaded: fill the model first, "
                "on one process"
            )
