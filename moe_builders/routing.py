"""The routing decision as a value, and what a router may know of its tokens.

Letters: t tokens · e num_experts · k experts_per_token · a assignments (static: dead ones stay,
at the end).
"""

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from moe_builders.ops.permute import sort_by_expert

# a module named router inside a layer, at any depth: sharded, stored, decayed by rules of its own
ROUTER_MODULE = re.compile(r"layers\.\d+\.(.+\.)?router")


def is_router_parameter(name: str) -> bool:
    """Whether a dotted parameter name lies in a module that ``ROUTER_MODULE`` names."""
    return re.match(ROUTER_MODULE.pattern + r"\.", name) is not None


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a model's parameter is stored in when the model is in ``dtype``: routers not below fp32.

    Their updates are small beside their weights and decide which expert learns; they are few.
    """
    return torch.promote_types(dtype, torch.float32) if is_router_parameter(name) else dtype


@dataclass(frozen=True)
class TokenInfo:
    """What a router may know of its tokens besides their vectors.

    Made where lengths are known (collate, packing), never by comparing token ids.

    Attributes:
        mask: [t] bool, True = a real token. None: all real.
        sequence_ids: [t] int in [0, t), the document a token belongs to. None: one document.
        input_ids: [t] int, vocabulary ids.
    """

    mask: Tensor | None = None
    sequence_ids: Tensor | None = None
    input_ids: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, and how much each answer counts.

    Attributes:
        token_index: [a] int, sorted by expert (stable); dead assignments come last.
        weights: [a] fp32 (fp64 for fp64 inputs), the combine weight, carries the router's
            gradient; 0 where dead.
        num_tokens_per_expert: [e] int, live assignments only.
        slot_of: [t, k] int, where token t's k-th choice stands in the sorted list; None where
            tokens have no fixed number of choices (expert choice).
        logits: [t, e] the gate's output.
        probs: [t, e] the score distribution over the experts; each row sums to 1 (a sigmoid
            router's scores are normalised here, see ``TokenChoiceTopKRouter``).
        info: what was known of the tokens.
    """

    token_index: Tensor
    weights: Tensor
    num_tokens_per_expert: Tensor
    slot_of: Tensor | None
    logits: Tensor
    probs: Tensor
    info: TokenInfo


# FSDP hooks and activation checkpointing look through registered values for tensors.
register_dataclass(TokenInfo)
register_dataclass(Routing)


class Router(Protocol):
    """Anything that turns token vectors into a Routing; an nn.Module if it has parameters."""

    num_experts: int

    def __call__(self, x: Tensor, info: TokenInfo) -> Routing:
        """x: [t, d]."""
        ...


def route_by_choice(
    *, expert: Tensor, weights: Tensor, logits: Tensor, probs: Tensor, info: TokenInfo
) -> Routing:
    """Build the Routing of a token-choice decision; masked tokens go nowhere.

    Args:
        expert: [t, k] int, distinct experts of each token.
        weights: [t, k] combine weights.
        logits: [t, e].
        probs: [t, e].
        info: the tokens' mask decides which assignments live.
    """
    live = None if info.mask is None else info.mask[:, None].expand_as(expert)  # [t, k]
    if live is not None:
        weights = torch.where(live, weights, 0)
    assigned = sort_by_expert(expert, logits.shape[1], live)
    return Routing(
        token_index=assigned.token_index,
        weights=weights.flatten().index_select(0, assigned.order),  # [a]
        num_tokens_per_expert=assigned.num_tokens_per_expert,
        slot_of=assigned.slot_of,
        logits=logits,
        probs=probs,
        info=info,
    )


def expert_of_rows(num_tokens_per_expert: Tensor, num_rows: int) -> Tensor:
    """[a] int, the expert of each sorted row; e (one past the last) for dead rows."""
    ends = num_tokens_per_expert.cumsum(0)  # [e]
    rows = torch.arange(num_rows, device=ends.device)
    return torch.searchsorted(ends, rows, right=True)


def check_routing(routing: Routing) -> None:
    """Verify a routing's promises; for tests and for authors of routers (reads tensors on host).

    Raises:
        ValueError: one sentence for the first promise that does not hold.
    """
    t, e = routing.logits.shape
    a = routing.token_index.shape[0]
    counts, token = routing.num_tokens_per_expert.cpu(), routing.token_index.cpu()
    mask = routing.info.mask
    real = torch.ones(t, dtype=torch.bool) if mask is None else mask.cpu()
    live = expert_of_rows(counts, a) < e  # [a]
    wide = torch.promote_types(routing.logits.dtype, torch.float32)
    row_sums = routing.probs.detach().cpu()[real].sum(-1)
    promises = (  # in this order: each may rely on those above
        (
            f"logits must be fp32 or fp64, got {routing.logits.dtype}",
            lambda: routing.logits.dtype == wide,
        ),
        (f"weights must be [{a}] like token_index", lambda: routing.weights.shape == (a,)),
        (
            f"num_tokens_per_expert must be [{e}] and not negative",
            lambda: counts.shape == (e,) and (counts >= 0).all(),
        ),
        (
            f"there are {int(counts.sum())} live assignments, more than the list's {a} rows",
            lambda: counts.sum() <= a,
        ),
        (f"token_index must lie in [0, {t})", lambda: ((token >= 0) & (token < t)).all()),
        ("a masked token was given to an expert", lambda: real[token[live]].all()),
        (
            "a dead assignment has a weight other than 0",
            lambda: (routing.weights.detach().cpu()[~live] == 0).all(),
        ),
        (
            "probs of a real token do not sum to 1",
            lambda: torch.allclose(row_sums, torch.ones_like(row_sums), atol=1e-5),
        ),
    )
    for sentence, holds in promises:
        if not holds():
            raise ValueError(f"not a valid Routing: {sentence}")
    if routing.slot_of is not None:
        back = routing.token_index[routing.slot_of]  # [t, k]
        if not torch.equal(back, torch.arange(t, device=back.device)[:, None].expand_as(back)):
            raise ValueError("not a valid Routing: slot_of does not lead back to its own token")
