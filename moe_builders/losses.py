"""Router losses as pure functions of a Routing, and the language-model loss as a sum.

Letters: t tokens · e num_experts · a assignments · b, s, v batch, sequence, vocabulary.

Every router loss is a sum over real tokens divided by ``num_tokens``. Give the step's total there
and the values of all micro-batches and ranks add up to the loss of one big batch; leave it out and
a single routing is averaged by itself. Masked tokens count in nothing.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.routing import Routing, expert_of_rows

Scope = Literal["sequence", "micro", "global"]
IGNORE_INDEX = -100  # torchtune's CROSS_ENTROPY_IGNORE_IDX: a position that is not trained on


def load_balancing_loss(
    routing: Routing,
    *,
    scope: Scope,
    counts: Tensor | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """Balancing loss e · Σ_j f_j · P_j of one layer: 1 when balanced, e when one expert takes all.

    f_j is the share of a scope's assignments that went to expert j (from the selection itself,
    before any drop; no gradient), P_j the mean score of expert j over the scope's tokens.

    Args:
        routing: one layer's decision.
        scope: over what f is counted. "sequence": each document by itself (exact under any split
            into micro-batches and ranks). "micro": this routing as it is. "global": ``counts``.
        counts: [e] assignments per expert of the whole scope, with scope "global" only.
        num_tokens: what the sum over tokens is divided by; default: the real tokens here.

    Returns:
        Scalar in the routing's precision; carries gradient through ``probs`` only.

    Raises:
        InputError: unknown scope, or counts given or missing against the scope.

    Source: Fedus et al. 2021 (2101.03961) eq. 4–6; sequence scope: DeepSeek-V3 (2412.19437)
    eq. 17–20; global scope: Qiu et al. 2025 (2501.11873).
    """
    if scope not in get_args(Scope):
        raise InputError(f"scope {scope!r} is not one of {', '.join(get_args(Scope))}")
    if (counts is not None) != (scope == "global"):
        raise InputError("scope 'global' takes counts [e] of the whole scope; the others take none")
    t, e = routing.probs.shape
    mask = routing.info.mask
    if scope == "sequence":
        share = _share_of_sequences(routing)  # [t, e] each token's row is its document's f
    else:
        counts = count_assignments(routing) if counts is None else counts
        share = counts.to(routing.probs.dtype) / counts.sum().clamp(min=1)  # [e]
    per_token = e * (routing.probs * share).sum(-1)  # [t]
    return _masked_sum(per_token, mask) / _divisor(num_tokens, mask, t)


def router_z_loss(routing: Routing, *, num_tokens: Tensor | int | None = None) -> Tensor:
    """Mean over real tokens of the squared log-sum-exp of the logits.

    Args:
        routing: one layer's decision.
        num_tokens: what the sum over tokens is divided by; default: the real tokens here.

    Source: Zoph et al. 2022 (2202.08906) eq. 5.
    """
    logits, mask = routing.logits, routing.info.mask
    if mask is not None:  # before the logarithm: its gradient at a NaN would be NaN, even times 0
        logits = torch.where(mask[:, None], logits, 0)
    per_token = logits.logsumexp(-1).square()  # [t]
    return _masked_sum(per_token, mask) / _divisor(num_tokens, mask, per_token.shape[0])


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over labelled tokens of -log p(label), in nats; 0 when none is labelled.

    Args:
        logits: [b, s, v] in fp32 or fp64.
        labels: [b, s] int, the token to predict at each position; IGNORE_INDEX = none.
    """
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def count_assignments(routing: Routing) -> Tensor:
    """[e] int64, live assignments of tokens in the mask, per expert.

    Equal to ``num_tokens_per_expert`` unless the routing's mask was narrowed after routing (for a
    loss over labelled tokens only).
    """
    e = routing.probs.shape[1]
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])  # [a]
    counted = _row_mask(routing, expert < e)  # [a]
    return torch.zeros(e + 1, dtype=torch.int64, device=expert.device).scatter_add(
        0, expert, counted.long()
    )[:e]


def _share_of_sequences(routing: Routing) -> Tensor:
    """[t, e] for each token, the share of its document's assignments each expert got."""
    t, e = routing.probs.shape
    device = routing.probs.device
    sequence = routing.info.sequence_ids
    if sequence is None:
        sequence = torch.zeros(t, dtype=torch.int64, device=device)
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])  # [a]
    counted = _row_mask(routing, expert < e)  # [a]
    cell = sequence.long()[routing.token_index] * (e + 1) + expert  # [a]; column e: dead rows
    counts = (
        torch.zeros(t * (e + 1), dtype=torch.int64, device=device)
        .scatter_add(0, cell, counted.long())
        .view(t, e + 1)[:, :e]
    )  # [t, e], row = document
    share = counts.to(routing.probs.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
    return share[sequence]


def _row_mask(routing: Routing, live: Tensor) -> Tensor:
    mask = routing.info.mask
    return live if mask is None else live & mask[routing.token_index]


def _masked_sum(per_token: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of real tokens; selected, not multiplied: a masked token may hold NaN."""
    return per_token.sum() if mask is None else torch.where(mask, per_token, 0).sum()


def _divisor(num_tokens: Tensor | int | None, mask: Tensor | None, t: int) -> Tensor | int:
    if num_tokens is not None:
        return num_tokens
    return t if mask is None else mask.sum().clamp(min=1)
