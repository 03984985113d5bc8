"""How many assignments each expert has, from a routing's own decision: integers, no gradient.

Letters: t tokens · e num_experts · k experts_per_token · a assignments · n pairs of token and
expert (t·k where tokens choose, else a) · r rows of a table.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.ops.runs import expert_of_rows
from moe_builders.routing import Routing

Counted = Literal["assigned", "kept"]
Choices = Literal["all", "first"]


def count_assignments(routing: Routing) -> Tensor:
    """[e] int64, what tokens in the mask asked for, before any choice was dropped.

    Equal to ``num_tokens_per_expert`` unless choices were dropped, or the routing's mask was
    narrowed after routing (for a loss over labelled tokens only). Where experts pick the tokens,
    it is what they took.
    """
    return count_rows(routing, None, on="assigned", choices="all")[0]


def count_kept(routing: Routing) -> Tensor:
    """[e] int64, what of ``count_assignments`` was not dropped."""
    return count_rows(routing, None, on="kept", choices="all")[0]


def count_first_choices(routing: Routing, *, on: Counted = "assigned") -> Tensor:
    """[e] int64, tokens in the mask whose best expert this is.

    Args:
        routing: one layer's decision.
        on: "kept": without those whose first choice was dropped.

    Raises:
        InputError: the router's tokens do not choose, so that none is first.
    """
    return count_rows(routing, None, on=on, choices="first")[0]


def count_rows(routing: Routing, row_of: Tensor | None, *, on: Counted, choices: Choices) -> Tensor:
    """[r, e] int64, assignments per expert, by the row that each token belongs to.

    Args:
        routing: one layer's decision.
        row_of: [t] int in [0, t), and r is t; None: all tokens are row 0, and r is 1.
        on: "assigned": before drops; "kept": after.
        choices: "all", or each token's "first" one.

    Raises:
        InputError: "first" where tokens do not choose.
    """
    t, e = routing.probs.shape
    token, expert, counted = _pairs(routing, on, choices)  # [n] each
    rows = 1 if row_of is None else t
    cell = expert.long()  # [n] column e: dead rows
    if row_of is not None:
        cell = cell + row_of.long()[token] * (e + 1)
    table = torch.zeros(rows * (e + 1), dtype=torch.int64, device=cell.device)
    return table.scatter_add(0, cell, counted.long()).view(rows, e + 1)[:, :e]


def _pairs(routing: Routing, on: Counted, choices: Choices) -> tuple[Tensor, Tensor, Tensor]:
    """([n] token, [n] expert, [n] bool whether it counts) of every decision there could be."""
    mask, selected = routing.info.mask, routing.selected
    if selected is None:
        if choices == "first":
            raise InputError(
                "there are no first choices to count, because this router's tokens do not choose: "
                "use a loss over all choices"
            )
        token = routing.token_index  # [a]
        expert = expert_of_rows(routing.num_tokens_per_expert, token.shape[0])  # [a]
        live = expert < routing.probs.shape[1]
        return token, expert, live if mask is None else live & mask[token]
    if choices == "first":
        selected = selected[:, :1]  # [t, 1]
    t, k = selected.shape
    live = torch.ones_like(selected, dtype=torch.bool)  # [t, k]
    if mask is not None:
        live = live & mask[:, None]
    if on == "kept" and routing.kept is not None:
        live = live & routing.kept[:, :k]
    token = torch.arange(t, device=selected.device).repeat_interleave(k)  # [n]
    return token, selected.flatten(), live.flatten()
