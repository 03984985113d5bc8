"""The routing decision as a value, and what a router may know of its tokens.

Letters: t tokens · e num_experts · k experts_per_token · a assignments (static: dead ones stay,
at the end).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from moe_builders.decisions import Decisions
from moe_builders.ops.permute import sort_by_expert
from moe_builders.ops.runs import expert_of_rows

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
        decisions: of a forward that will be recomputed. None: it will not.
    """

    mask: Tensor | None = None
    sequence_ids: Tensor | None = None
    input_ids: Tensor | None = None
    decisions: Decisions | None = None

    def decided(self, choose: Callable[[], Tensor]) -> Tensor:
        """What ``choose`` gives; in a recomputation, what it gave in the forward.

        To be put around everything that compares: selections, cutoffs, drops.

        Args:
            choose: gives a tensor of whole numbers or bools. A recomputation does not call it: it
                must draw no random numbers and keep nothing for backward.
        """
        return choose() if self.decisions is None else self.decisions.take(choose)


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
        selected: [t, k] int, the experts each token asked for, best first, before anything was
            dropped: what balance is measured on. None where experts pick: the list says it.
        kept: [t, k] bool, False where a policy or a full expert dropped the choice. None: none.
        input_weights: [a] multiplies an assignment's row before its expert sees it (a
            straight-through estimator's 1, which carries a gradient). None: 1.
        own_loss: [t] a loss that the router itself asks for, a value per token. None: none.
    """

    token_index: Tensor
    weights: Tensor
    num_tokens_per_expert: Tensor
    slot_of: Tensor | None
    logits: Tensor
    probs: Tensor
    info: TokenInfo
    selected: Tensor | None = None
    kept: Tensor | None = None
    input_weights: Tensor | None = None
    own_loss: Tensor | None = None


# FSDP hooks and activation checkpointing look through registered values for tensors.
register_dataclass(TokenInfo)
register_dataclass(Routing)


class Router(Protocol):
    """Anything that turns token vectors into a Routing; an nn.Module if it has parameters.

    What it decides by comparing goes through ``TokenInfo.decided``, so that a recomputation decides
    the same. It may also have

    * ``experts_per_token``: k, or the mean where it varies (what FLOPs are counted with);
    * ``causal``: bool, whether in its present mode (training or not) a token's routing depends on
      itself and on earlier tokens only;
    * ``balances_itself``: True where a balancing loss would fight the router's own balancing;
    * ``tally`` and ``learn``, see ``LearningRouter``.
    """

    num_experts: int

    def __call__(self, x: Tensor, info: TokenInfo) -> Routing:
        """x: [t, d]."""
        ...


@runtime_checkable
class LearningRouter(Protocol):
    """A router with buffers that learn from whole steps, outside of gradients.

    Training adds up the tallies of a step's micro-batches over all processes and hands the sum to
    ``learn`` after the optimizer's step. Evaluation, generation and recomputation never do.

    Attributes:
        tally_size: n; 0 where nothing is to be learned.
    """

    tally_size: int

    def tally(self, routing: Routing) -> Tensor:
        """[n] fp64, what is to be added up."""
        ...

    def learn(self, tally: Tensor) -> None:
        """Move the buffers once; ``tally`` [n] is the whole step's."""
        ...


def route_by_choice(
    *,
    expert: Tensor,
    weights: Tensor,
    logits: Tensor,
    probs: Tensor,
    info: TokenInfo,
    kept: Tensor | None = None,
    straight_through: bool = False,
    own_loss: Tensor | None = None,
) -> Routing:
    """Build the Routing of a token-choice decision; masked tokens go nowhere.

    Args:
        expert: [t, k] int, distinct experts of each token, best first.
        weights: [t, k] combine weights.
        logits: [t, e].
        probs: [t, e].
        info: the tokens' mask decides which assignments live.
        kept: [t, k] bool, False where a choice is dropped; None: all are kept.
        straight_through: the weights' gradient also as if they multiplied the experts' input.
        own_loss: [t], see ``Routing``.
    """
    live = None if info.mask is None else info.mask[:, None].expand_as(expert)  # [t, k]
    if kept is not None:
        live = kept if live is None else live & kept
    if live is not None:
        weights = torch.where(live, weights, 0)
    assigned = sort_by_expert(expert, logits.shape[1], live)
    weights = weights.flatten().index_select(0, assigned.order)  # [a]
    return Routing(
        token_index=assigned.token_index,
        weights=weights,
        num_tokens_per_expert=assigned.num_tokens_per_expert,
        slot_of=assigned.slot_of,
        logits=logits,
        probs=probs,
        info=info,
        selected=expert,
        kept=kept,
        input_weights=1 + (weights - weights.detach()) if straight_through else None,
        own_loss=own_loss,
    )


def dense_weights(routing: Routing) -> Tensor:
    """[t, e] the combine weight of every pair, 0 where there is none; carries the gradient.

    For looking at and for comparing: order inside a token's choices does not matter here.
    """
    t, e = routing.logits.shape
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])  # [a]
    place = routing.token_index * (e + 1) + expert  # column e: dead rows
    flat = routing.weights.new_zeros(t * (e + 1)).index_add(0, place, routing.weights)
    return flat.view(t, e + 1)[:, :e]


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
