"""Experts pick tokens: perfectly even load, but not causal.

Letters: t tokens · d dim · e num_experts · c capacity (tokens per expert) · a = e·c assignments.
"""

import math

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.routers.token_choice import gate_logits
from moe_builders.routing import Routing, TokenInfo


class ExpertChoiceTopKRouter(nn.Module):
    """Each expert takes its c best tokens, c = ⌈capacity_factor · real tokens / e⌉.

    **Not causal**: whether a token is taken depends on all other tokens of the batch, later ones
    included. A language model trained this way sees a little of the future in training, and its
    tokens are routed differently when they are generated one at a time.

    A token may be taken by no expert (it passes on the residual) or by several. Masked tokens are
    never taken and do not raise the capacity: padding changes nothing.

    Args:
        dim: d.
        num_experts: e.
        capacity_factor: mean number of experts per token, > 0 and ≤ e.

    Raises:
        InputError: a number out of its range.

    Source: Zhou et al. 2022 (2202.09368) eq. 1–4; scores: softmax over the experts.
    """

    def __init__(self, *, dim: int, num_experts: int, capacity_factor: float = 1.0) -> None:
        super().__init__()
        if not 0 < capacity_factor <= num_experts:
            raise InputError(
                f"capacity_factor is {capacity_factor}, but must be above 0 and at most "
                f"num_experts ({num_experts})"
            )
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are never taken.
        """
        t, e = x.shape[0], self.num_experts
        logits = gate_logits(self.gate, x)  # [t, e]
        probs = logits.softmax(-1)
        wishes = probs.detach().t()  # [e, t]
        mask = info.mask
        if mask is not None:
            wishes = wishes.masked_fill(~mask, -1)
        slots = math.ceil(self.capacity_factor * t / e)  # static: as if all tokens were real
        token = wishes.topk(slots, dim=-1).indices  # [e, slots] best first
        num_real = torch.full((), t, device=x.device) if mask is None else mask.sum()
        # in fp64, as the line above: in fp32 it may round up to one more than there are slots
        capacity = (num_real.double() * self.capacity_factor / e).ceil().long()  # []
        live = (torch.arange(slots, device=x.device) < capacity).expand(e, slots).flatten()  # [a]
        # dead slots to the end, order kept
        order = (~live).to(torch.uint8).sort(stable=True).indices  # [a]
        expert = torch.arange(e, device=x.device).repeat_interleave(slots)  # [a]
        token = token.flatten()
        weights = torch.where(live, probs[token, expert], 0)  # [a]
        return Routing(
            token_index=token[order],
            weights=weights[order],
            num_tokens_per_expert=capacity.expand(e).to(torch.int32),
            slot_of=None,
            logits=logits,
            probs=probs,
            info=info,
        )
