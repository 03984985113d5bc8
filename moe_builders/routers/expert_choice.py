"""Experts pick tokens: perfectly even load, not causal; and ways to route causally afterwards.

Letters: t tokens · d dim · e num_experts · c capacity (tokens per expert) · m at most so many
experts per token · a assignments (e·c; t·m where tokens decide and with scope "sequence").
"""

from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.routers.buffers import wide_buffers
from moe_builders.routers.causal_choice import (
    experts_as_listed,
    learn_cutoffs,
    membership,
    membership_loss,
    tally_cutoffs,
)
from moe_builders.routers.expert_picks import pick_in_batch, pick_in_sequences
from moe_builders.routers.gate import (
    JitterKind,
    check_precision,
    gate_logits,
    jittered_logits,
    make_jitter,
    real_rows,
)
from moe_builders.routing import Routing, TokenInfo

ChoiceScope = Literal["batch", "sequence"]
InferenceWay = Literal["predictor", "bce", "threshold_ema"]


class ExpertChoiceTopKRouter(nn.Module):
    """Each expert takes its c best tokens, c = ⌈capacity_factor · real tokens / e⌉.

    **Not causal in training**: whether a token is taken depends on the others, later ones included.
    A language model trained this way sees a little of the future, and tokens that are generated one
    at a time cannot be routed like that. So ``eval()`` refuses unless ``inference`` says how a
    token then decides by itself:

    * "threshold_ema": expert j takes it where probs_j reaches the expert's cutoff, a moving average
      of the worst probability that j took in training. Nothing to train; ``learn`` moves it, and
      before its first time the cutoff is the mean probability 1/e.
    * "predictor": where a second head, ``predictor``, says so (logit > 0). Its loss trains nothing
      but itself: input and target are detached.
    * "bce": where the gate's own logit is above 0. Its loss trains gate and model as well.

    The losses are ``Routing.own_loss``: binary cross-entropy of "expert j took it", mean over the
    experts, in training only. A token may be taken by no expert (it passes on the residual) or by
    several. Its weights are the probabilities of those that took it. Masked tokens are never taken
    and do not raise the capacity: padding changes nothing.

    **What it costs.** Where tokens decide (and with scope "sequence") nothing bounds how many
    experts take a token but e, and shapes must not depend on the decision: the list has t·e rows,
    dead ones included. ``max_experts_per_token`` = m makes it t·m: with random gates and tokens
    m = 2 · capacity_factor drops less than 1 % of what experts pick, 3 · capacity_factor nothing.

    Args:
        dim: d.
        num_experts: e.
        capacity_factor: mean number of experts per token, > 0 and ≤ e.
        scope: tokens that an expert chooses among: all of the micro-batch ("batch") or each
            document's for itself ("sequence", c from the document's length; the same under any
            split into micro-batches).
        inference: how tokens decide in ``eval()``; None: they cannot.
        ema_decay: of the cutoffs, per optimizer step, in [0, 1).
        allow_noncausal_eval: experts pick in ``eval()`` as in training, whatever ``inference``
            is: to measure with the leak.
        max_experts_per_token: a token that more experts take stays with its m most probable ones;
            None: e. Without effect where experts pick with scope "batch".
        jitter, jitter_scale: noise in training, see ``Jitter``.
        gate_precision: of ``gate_logits``.

    Raises:
        InputError: a number out of its range or an unknown name.

    Source: Zhou et al. 2022 (2202.09368) eq. 1–4, scores: softmax over the experts; predictor and
    bce: Raposo et al. 2024 (2404.02258) section 3.5; threshold_ema: 2603.11535.
    """

    balances_itself = True  # every expert takes c: a balancing loss has nothing to say

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        capacity_factor: float = 1.0,
        scope: ChoiceScope = "batch",
        inference: InferenceWay | None = None,
        ema_decay: float = 0.99,
        allow_noncausal_eval: bool = False,
        max_experts_per_token: int | None = None,
        jitter: JitterKind | None = None,
        jitter_scale: float = 0.0,
        gate_precision: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < capacity_factor <= num_experts:
            raise InputError(
                f"capacity_factor is {capacity_factor}, but must be above 0 and at most "
                f"num_experts ({num_experts})"
            )
        if scope not in get_args(ChoiceScope):
            raise InputError(f"scope {scope!r} is not one of {', '.join(get_args(ChoiceScope))}")
        if inference is not None and inference not in get_args(InferenceWay):
            raise InputError(
                f"inference {inference!r} is not one of {', '.join(get_args(InferenceWay))} "
                "(or null)"
            )
        if not 0 <= ema_decay < 1:
            raise InputError(f"ema_decay is {ema_decay}, but must be at least 0 and below 1")
        if max_experts_per_token is not None and not 1 <= max_experts_per_token <= num_experts:
            raise InputError(
                f"max_experts_per_token is {max_experts_per_token}, but must lie between 1 and "
                f"num_experts ({num_experts})"
            )
        check_precision(gate_precision)
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.scope = scope
        self.inference = inference
        self.ema_decay = ema_decay
        self.allow_noncausal_eval = allow_noncausal_eval
        self.max_experts_per_token = max_experts_per_token
        self.jitter = make_jitter(jitter, jitter_scale)
        self.gate_precision = gate_precision
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.predictor = nn.Linear(dim, num_experts) if inference == "predictor" else None
        self.cutoff: Tensor | None
        self.cutoff_updates: Tensor | None
        kept = inference == "threshold_ema"
        mean = torch.full((num_experts,), 1 / num_experts, dtype=torch.float32)  # [e]
        self.register_buffer("cutoff", mean if kept else None)
        # how many steps an expert's cutoff has seen
        self.register_buffer("cutoff_updates", torch.zeros_like(mean) if kept else None)

    @property
    def causal(self) -> bool:
        """Whether a token's routing depends on itself alone, in the present mode."""
        return not self.training and not self.allow_noncausal_eval and self.inference is not None

    def train(self, mode: bool = True) -> Self:
        """Change the mode.

        Raises:
            InputError: evaluation, but no way to route in it.
        """
        if not mode:
            self._check_evaluation()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to`` and the like do, but the cutoffs stay in fp32 or wider."""
        with wide_buffers(self):
            return super()._apply(fn, recurse)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are never taken; sequence_ids are the documents of scope "sequence".

        Raises:
            InputError: evaluation without a way to route in it.
        """
        if not self.training:
            self._check_evaluation()
        x = real_rows(x, info.mask)
        logits, used = jittered_logits(
            self.gate, x, self.jitter, training=self.training, precision=self.gate_precision
        )  # [t, e] each
        probs = used.softmax(-1)
        if self.causal:
            decided = self._decide(x, logits, probs)
            taken = info.decided(lambda: decided)  # [t, e]
            m = self.max_experts_per_token
            return experts_as_listed(taken, logits=logits, probs=probs, info=info, at_most=m)
        if self.scope == "sequence":
            wishes, factor = probs.detach(), self.capacity_factor
            taken = info.decided(lambda: pick_in_sequences(wishes, info, factor))  # [t, e]
            return experts_as_listed(
                taken,
                logits=logits,
                probs=probs,
                info=info,
                at_most=self.max_experts_per_token,
                own_loss=self._own_loss(x, logits, taken, info),
            )
        token, live, counts = pick_in_batch(probs.detach(), info, self.capacity_factor)
        expert = torch.arange(self.num_experts, device=x.device)[:, None].expand_as(token)
        weights = torch.where(live, probs[token, expert], 0)  # [e, c]
        # dead slots to the end, order kept
        order = (~live).flatten().to(torch.uint8).sort(stable=True).indices  # [a]
        return Routing(
            token_index=token.flatten()[order],
            weights=weights.flatten()[order],
            num_tokens_per_expert=counts,
            slot_of=None,
            logits=logits,
            probs=probs,
            info=info,
            own_loss=self._own_loss(x, logits, membership(token, live, x.shape[0]), info),
        )

    @property
    def tally_size(self) -> int:
        """Numbers that ``tally`` gives."""
        return 0 if self.cutoff is None else 2 * self.num_experts

    def tally(self, routing: Routing) -> Tensor:
        """[2e] fp64: per expert the sum of cutoffs and how many there were; [0] without cutoffs.

        A cutoff is the worst probability that an expert took: one per micro-batch, or one per
        document with scope "sequence". To be given a training forward's routing.
        """
        if self.cutoff is None:
            return routing.probs.new_zeros(0, dtype=torch.float64)
        return tally_cutoffs(routing, by_sequence=self.scope == "sequence")

    @torch.no_grad()
    def learn(self, tally: Tensor) -> None:
        """Move the cutoffs towards the step's mean; an expert's first ones are taken as they are.

        Args:
            tally: [2e], the sum over a step's micro-batches and processes.
        """
        if self.cutoff is not None and self.cutoff_updates is not None:
            learn_cutoffs(self.cutoff, self.cutoff_updates, tally, decay=self.ema_decay)

    def _decide(self, x: Tensor, logits: Tensor, probs: Tensor) -> Tensor:
        """[t, e] bool, whether expert j takes token i, from token i alone."""
        if self.inference == "bce":
            return logits.detach() > 0
        if self.predictor is not None:
            return gate_logits(self.predictor, x.detach()) > 0
        assert self.cutoff is not None
        return probs.detach() >= self.cutoff

    def _own_loss(self, x: Tensor, logits: Tensor, taken: Tensor, info: TokenInfo) -> Tensor | None:
        if not self.training or self.inference in (None, "threshold_ema"):
            return None
        if self.predictor is not None:
            logits = gate_logits(self.predictor, x.detach())
        return membership_loss(logits, taken, info.mask)

    def _check_evaluation(self) -> None:
        if self.inference is None and not self.allow_noncausal_eval:
            raise InputError(
                "expert choice cannot route a token without the ones after it: give the router "
                "inference='threshold_ema', 'predictor' or 'bce' before training, or "
                "allow_noncausal_eval=True to measure with the leak"
            )
