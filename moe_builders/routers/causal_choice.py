"""How a token decides by itself which experts take it, learned from what experts picked.

Letters: t tokens · e num_experts · m at most so many experts per token · a assignments.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_builders.ops.runs import expert_of_rows
from moe_builders.routing import Routing, TokenInfo, route_by_choice


def experts_as_listed(
    taken: Tensor,
    *,
    logits: Tensor,
    probs: Tensor,
    info: TokenInfo,
    at_most: int | None,
    own_loss: Tensor | None = None,
) -> Routing:
    """A Routing in which each token has any number of experts, up to m; weights are probs.

    The list has t·m rows, whatever was taken. ``selected`` and ``kept`` are None: the list is the
    choice, and a row that is not used was not dropped.

    Args:
        taken: [t, e] bool, decided.
        logits, probs: [t, e].
        info: masked tokens are not taken, whatever ``taken`` says.
        at_most: m, the most probable ones stay; None: e.
        own_loss: [t], of ``Routing``.
    """
    if at_most is None or at_most == probs.shape[1]:
        expert = torch.arange(probs.shape[1], device=probs.device).expand_as(probs)  # [t, e]
        weights = probs
    else:
        wishes = torch.where(taken, probs.detach(), -1)
        expert = info.decided(lambda: wishes.topk(at_most, dim=-1).indices)  # [t, m]
        taken, weights = taken.gather(1, expert), probs.gather(1, expert)  # [t, m] each
    routing = route_by_choice(
        expert=expert,
        weights=weights,
        logits=logits,
        probs=probs,
        info=info,
        kept=taken,
        own_loss=own_loss,
    )
    return replace(routing, selected=None, kept=None)


def membership(token: Tensor, live: Tensor, num_tokens: int) -> Tensor:
    """[t, e] bool from each expert's picks: [e, slots] distinct tokens, and which of them count."""
    taken = torch.zeros(token.shape[0], num_tokens, dtype=torch.bool, device=token.device)
    return taken.scatter(-1, token, live).t()


def membership_loss(logits: Tensor, taken: Tensor, mask: Tensor | None) -> Tensor:
    """[t] binary cross-entropy of "expert j took it", mean over experts; 0 where masked.

    Args:
        logits: [t, e]; above 0 says yes.
        taken: [t, e] bool.
        mask: [t] bool.
    """
    each = F.binary_cross_entropy_with_logits(logits, taken.to(logits.dtype), reduction="none")
    per_token = each.mean(-1)  # [t]
    return per_token if mask is None else torch.where(mask, per_token, 0)


@torch.no_grad()
def tally_cutoffs(routing: Routing, *, by_sequence: bool) -> Tensor:
    """[2e] fp64: per expert the sum of the worst weights it took, and of how many that is the sum.

    Args:
        routing: what experts picked, weights = probs.
        by_sequence: one for each document in which it took any, else one in all.
    """
    t, e = routing.probs.shape
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])  # [a]
    cell, documents = expert, 1  # column e: dead rows
    if by_sequence and routing.info.sequence_ids is not None:
        cell = routing.info.sequence_ids.long()[routing.token_index] * (e + 1) + expert
        documents = t
    worst = torch.full(
        (documents * (e + 1),), torch.inf, dtype=torch.float64, device=routing.weights.device
    ).scatter_reduce(0, cell, routing.weights.double(), "amin")
    worst = worst.view(documents, e + 1)[:, :e]
    there = worst < torch.inf
    return torch.cat([torch.where(there, worst, 0).sum(0), there.sum(0).double()])


def learn_cutoffs(cutoff: Tensor, updates: Tensor, tally: Tensor, *, decay: float) -> None:
    """Move cutoffs [e] in place towards the tally's mean; the first is taken as it is.

    Args:
        cutoff: [e].
        updates: [e], how often each was moved; counted here.
        tally: [2e] of ``tally_cutoffs``, added up over a step; an expert that took nothing in all
            of it keeps its cutoff.
        decay: how much of the old one stays.
    """
    total, number = tally.to(cutoff.device).double().chunk(2)  # [e] each
    mean = total / number.clamp(min=1)
    moved = torch.where(updates > 0, decay * cutoff.double() + (1 - decay) * mean, mean)
    cutoff.copy_(torch.where(number > 0, moved, cutoff.double()))
    updates.add_(number > 0)
