"""How many tokens an expert takes at most, for any router: what is over the limit is dropped.

Letters: t tokens · e num_experts · k experts_per_token · a = t·k assignments · n real tokens of a
sequence · c capacity.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.routing import Routing, route_by_choice

DropPolicy = Literal["position", "probs"]
SlotOrder = Literal["token_major", "rank_major"]
CapacityScope = Literal["sequence", "micro"]
CapacityShare = Literal["choices", "tokens"]


@dataclass(frozen=True)
class Capacity:
    """A limit of tokens per expert; a choice beyond it is dropped.

    A dropped choice gives nothing to its token, and the other choices' weights stay as they are:
    the residual around the layer carries what is missing. Masked tokens and choices that the
    router itself dropped take no place. Limits are counted from real tokens on the device.

    c = max(min(n, share), minimum), n the real tokens of one sequence (or of the micro-batch), and
    share = ⌈n·k·factor / e⌉ (``share_of`` "choices") or ⌊n·factor / e⌋ ("tokens").

    Causal with drop "position" and slot order "token_major": given the lengths of the sequences,
    no token's routing depends on a later one. "rank_major" (a later token's first choice comes
    before an earlier token's second) and "probs" (a later token may weigh more) are not; the length
    decides c in all of them, so a sequence cut short may drop otherwise than the whole one.

    Attributes:
        factor: while training, > 0; 1 gives every expert room for its mean load. None: no limit.
        eval_factor: in evaluation and generation. None: no limit there.
        minimum: c is at least this, ≥ 0, for short sequences.
        scope: each "sequence" (``TokenInfo.sequence_ids``; None: all tokens are one) has its own
            places, or the micro-batch ("micro") has them together, in the order of its tokens.
        drop: "position": the first c of an expert stay; "probs": the c of the highest weight stay,
            the earlier one where weights are equal.
        slot_order: who comes first. "token_major": a token with all its choices, best first, then
            the next token; "rank_major": all tokens' first choices before any second (GShard).
        share_of: see above: "choices" as Switch and Megatron, "tokens" as GShard and ST-MoE.
        pad: give every expert exactly c rows, c of the micro-batch with no token masked, so that
            shapes and counts never vary. Needs scope "micro". Rows in excess hold zeros, weigh 0
            and change no output and no gradient.

    Raises:
        InputError: no factor at all, a number out of its range, an unknown name, or a pad per
            sequence.

    Source: Lepikhin et al. 2020 (2006.16668) algorithm 1; Fedus et al. 2021 (2101.03961) eq. 3;
    Zoph et al. 2022 (2202.08906) appendix C.
    """

    factor: float | None = None
    eval_factor: float | None = None
    minimum: int = 4
    scope: CapacityScope = "sequence"
    drop: DropPolicy = "position"
    slot_order: SlotOrder = "token_major"
    share_of: CapacityShare = "choices"
    pad: bool = False

    def __post_init__(self) -> None:
        if self.factor is None and self.eval_factor is None:
            raise InputError("a capacity without factor and eval_factor limits nothing: set one")
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}, but must be a number above 0 (or null)")
        if self.minimum < 0:
            raise InputError(f"minimum is {self.minimum}, but must be at least 0")
        _check_name("scope", self.scope, CapacityScope)
        _check_name("drop", self.drop, DropPolicy)
        _check_name("slot_order", self.slot_order, SlotOrder)
        _check_name("share_of", self.share_of, CapacityShare)
        if self.pad and self.scope != "micro":
            raise InputError(
                "pad gives every expert a fixed number of rows in a micro-batch, but scope is "
                f"{self.scope!r}: set scope to 'micro'"
            )

    def causal(self, *, training: bool) -> bool:
        """Whether the limit, in this mode, hides later tokens from earlier ones (see above)."""
        if self._factor(training) is None:
            return True
        return self.drop == "position" and self.slot_order == "token_major"

    def limit(self, routing: Routing, *, training: bool) -> Routing:
        """Drop what is over the limit.

        Args:
            routing: of a router whose tokens choose.
            training: which of the two factors counts.

        Returns:
            The same routing where there is no limit; otherwise one whose ``kept`` is narrowed to
            what is left and whose list of assignments follows it. A masked token's ``kept`` is
            left as it was. With ``pad`` the list has e·c rows, ``slot_of`` is None and
            ``num_tokens_per_expert`` counts the rows that are computed, c each (0 where no token
            is real): what tokens asked for and got is in ``selected`` and ``kept``.

        Raises:
            InputError: the routing holds no choices of tokens.
        """
        factor = self._factor(training)
        if factor is None:
            return routing
        expert, slot_of = routing.selected, routing.slot_of
        if expert is None or slot_of is None:
            raise InputError(
                "a capacity drops choices of tokens, but this routing has none (its experts pick "
                "tokens, or it was padded before): leave the capacity out"
            )
        t, k = expert.shape
        live = torch.ones_like(expert, dtype=torch.bool) if routing.kept is None else routing.kept
        if routing.info.mask is not None:
            live = live & routing.info.mask[:, None]  # [t, k]
        # every place of the list is some choice's: a sum of one term each in backward
        weights = routing.weights.index_select(0, slot_of.flatten()).view(t, k)
        kept = routing.info.decided(  # [t, k]
            lambda: self._within(routing, expert, live, weights.detach(), factor) | ~live
        )
        limited = route_by_choice(
            expert=expert,
            weights=weights,
            logits=routing.logits,
            probs=routing.probs,
            info=routing.info,
            kept=kept if routing.kept is None else kept & routing.kept,
            straight_through=routing.input_weights is not None,
            own_loss=routing.own_loss,
        )
        if not self.pad:
            return limited
        share = t * (k if self.share_of == "choices" else 1) * factor / routing.logits.shape[1]
        whole = math.ceil(share) if self.share_of == "choices" else math.floor(share)
        return _pad(limited, max(min(t, whole), self.minimum))

    def _factor(self, training: bool) -> float | None:
        return self.factor if training else self.eval_factor

    def _within(
        self, routing: Routing, expert: Tensor, live: Tensor, weights: Tensor, factor: float
    ) -> Tensor:
        """[t, k] bool, whether a live choice finds a place; anything for the others.

        Choices are sorted by (sequence, expert), in each run by who comes first: the distance from
        the run's beginning is the place. No tensor is larger than [a].
        """
        (t, k), e = expert.shape, routing.logits.shape[1]
        mask, sequence = routing.info.mask, routing.info.sequence_ids
        real = torch.ones(t, dtype=torch.int64, device=expert.device)
        if mask is not None:
            real = mask.long()
        if self.scope == "sequence" and sequence is not None:
            num_sequences, sequence = t, sequence.long()
        else:
            num_sequences, sequence = 1, torch.zeros_like(real)
        n = real.new_zeros(num_sequences).scatter_add(0, sequence, real)  # [t] or [1]
        cells = num_sequences * e  # of a sequence and an expert; one more for dead choices
        cell = torch.where(live, sequence[:, None] * e + expert, cells)  # [t, k]
        if self.slot_order == "rank_major":
            cell, weights = cell.t(), weights.t()  # [k, t]
        cell = cell.flatten()  # [a]
        if self.drop == "probs":
            heaviest = weights.flatten().sort(descending=True, stable=True).indices
            by_cell, order = cell[heaviest].sort(stable=True)
            order = heaviest[order]
        else:
            by_cell, order = cell.sort(stable=True)
        rows = torch.arange(t * k, device=cell.device)
        place = rows - torch.searchsorted(by_cell, by_cell)  # [a]
        limit = self._limit(n, k, e, factor)
        own_limit = limit[(by_cell // e).clamp(max=num_sequences - 1)]  # [a]
        within = torch.empty_like(live.flatten())
        within[order] = place < own_limit
        return within.view(t, k) if self.slot_order == "token_major" else within.view(k, t).t()

    def _limit(self, n: Tensor, k: int, e: int, factor: float) -> Tensor:
        """c for each count of real tokens; in fp64, as the same formula in Python's numbers."""
        # a tensor: a GPU multiplies by a number's reciprocal instead, and 49 · (1 / 49) is below 1
        experts = torch.full_like(n, e, dtype=torch.float64)
        if self.share_of == "choices":
            share = (n.double() * k * factor / experts).ceil()
        else:
            share = (n.double() * factor / experts).floor()
        return share.long().clamp(min=self.minimum)  # more than n never ask for one expert


def _pad(routing: Routing, c: int) -> Routing:
    """A limited routing as e runs of c rows."""
    counts, a = routing.num_tokens_per_expert.long(), routing.token_index.shape[0]
    e, t = counts.shape[0], routing.logits.shape[0]
    straight = routing.input_weights
    if straight is None:
        straight = torch.ones_like(routing.weights)
    if t == 0 or c == 0:  # the same parts as with rows: other processes may have some
        return replace(routing, slot_of=None, input_weights=straight)
    device, mask = counts.device, routing.info.mask
    place = torch.arange(c, device=device).expand(e, c)
    filled = (place < counts[:, None]).flatten()  # [e·c]
    source = ((counts.cumsum(0) - counts)[:, None] + place).clamp(max=a - 1).flatten()  # [e·c]
    # rows in excess read a real token: a masked one may hold NaN, which no product makes zero
    spare = torch.zeros((), dtype=torch.int64, device=device)
    rows = torch.full_like(counts, c)
    if mask is not None:
        spare = mask.byte().argmax()
        rows = torch.where(mask.any(), rows, 0)
    return replace(
        routing,
        token_index=torch.where(filled, routing.token_index[source], spare),
        weights=torch.where(filled, routing.weights.index_select(0, source), 0),
        num_tokens_per_expert=rows.to(routing.num_tokens_per_expert.dtype),
        slot_of=None,
        input_weights=torch.where(filled, straight.index_select(0, source), 0),
    )


def _check_name(name: str, value: str, known: Any) -> None:
    if value not in get_args(known):
        raise InputError(f"{name} {value!r} is not one of {', '.join(get_args(known))}")
