"""Which tokens each expert picks: among a whole micro-batch, or in each document by itself.

Letters: t tokens · e num_experts · c capacity (tokens per expert).
"""

import math

import torch
from torch import Tensor

from moe_builders.routing import TokenInfo


def pick_in_batch(
    probs: Tensor, info: TokenInfo, capacity_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert's best tokens of all: c = ⌈capacity_factor · real tokens / e⌉.

    Args:
        probs: [t, e], without gradient.
        info: masked tokens are not picked and do not raise c.
        capacity_factor: > 0 and ≤ e.

    Returns:
        [e, slots] int token, best first; [e, slots] bool live; [e] int32 counts, c each. slots is
        static: c as if all tokens were real.
    """
    t, e = probs.shape
    wishes, mask = probs.t(), info.mask  # [e, t]
    if mask is not None:
        wishes = wishes.masked_fill(~mask, -1)
    slots = math.ceil(capacity_factor * t / e)
    token = info.decided(lambda: wishes.topk(slots, dim=-1).indices)  # [e, slots]
    num_real = torch.full((), t, device=probs.device) if mask is None else mask.sum()
    capacity = _capacity(num_real, capacity_factor, e)  # []
    live = (torch.arange(slots, device=probs.device) < capacity).expand(e, slots)
    return token, live, capacity.expand(e).to(torch.int32)


def pick_in_sequences(probs: Tensor, info: TokenInfo, capacity_factor: float) -> Tensor:
    """Each expert's best tokens of each document: c = ⌈capacity_factor · its real tokens / e⌉.

    A document of n real tokens has c ≤ n. That is all that can be said before its length is known:
    t documents of one token give every expert t tokens, so no list of e·c rows with a c much below
    t holds every case.

    Args:
        probs: [t, e], without gradient.
        info: documents and mask; of equal probabilities the earlier token is picked.
        capacity_factor: > 0 and ≤ e.

    Returns:
        [t, e] bool, whether expert j took token i.
    """
    t, e = probs.shape
    device, mask = probs.device, info.mask
    document = torch.zeros(t, dtype=torch.int64, device=device)
    if info.sequence_ids is not None:
        document = info.sequence_ids.long()
    wishes = probs.t()  # [e, t]
    if mask is not None:
        wishes = wishes.masked_fill(~mask, -1)  # the last of their document
    best = wishes.sort(dim=-1, descending=True, stable=True).indices  # [e, t]
    by_document, order = document[best].sort(dim=-1, stable=True)  # [e, t] each
    token = best.gather(-1, order)  # [e, t] document by document, best first
    nothing = torch.zeros(t, dtype=torch.int64, device=device)
    ones = torch.ones_like(nothing)
    length = nothing.scatter_add(0, document, ones)  # [t] by document, padding included
    num_real = length if mask is None else nothing.scatter_add(0, document, mask.long())
    start = length.cumsum(0) - length  # [t]
    rank = torch.arange(t, device=device) - start[by_document]  # [e, t]
    live = rank < _capacity(num_real, capacity_factor, e)[by_document]  # [e, t]
    return torch.zeros(e, t, dtype=torch.bool, device=device).scatter(-1, token, live).t()


def _capacity(num_real: Tensor, capacity_factor: float, num_experts: int) -> Tensor:
    """⌈capacity_factor · num_real / e⌉ in fp64, as Python would: fp32 may round up one too many.

    Divided by a tensor: by a number, a GPU multiplies with its reciprocal, which rounds otherwise.
    """
    wide = num_real.double()
    return (wide * capacity_factor / torch.full_like(wide, num_experts)).ceil().long()
