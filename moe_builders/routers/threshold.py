"""Threshold gating: a token's second and further experts are taken if they weigh enough.

Letters: t tokens · d dim · e num_experts · k experts_per_token.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.routers.capacity import Capacity, CapacityScope, SlotOrder
from moe_builders.routers.coordinate_descent import soft_top_k
from moe_builders.routers.gate import JitterKind, jittered_logits, make_jitter, real_rows
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routers.scores import check_experts_per_token
from moe_builders.routing import Routing, TokenInfo, route_by_choice

ThresholdPolicy = Literal["random", "threshold", "all", "none"]


class ThresholdRouter(nn.Module):
    """Each token takes its best expert, and of the k - 1 next those that a policy lets through.

    probs = softmax(gate(x)); the k best, divided by their sum, are the weights g_1 … g_k. Choice
    r ≥ 2 is taken

    * "random": with probability min(1, g_r / threshold_r); in evaluation as "threshold", so that
      the same input gives the same answer, unless ``stochastic_eval``;
    * "threshold": if g_r ≥ threshold_r;
    * "all": always; "none": never.

    A choice that is not taken, or that finds its expert full, gives nothing; the others' weights
    stay as they are (they then sum to less than 1) and the residual carries the token. ``selected``
    holds all k choices, ``kept`` those that remain.

    One uniform number a choice is drawn per forward where the policy is random, from torch's global
    stream, after the gate's noise.

    Args:
        dim: d.
        num_experts: e.
        experts_per_token: k, 1 ≤ k ≤ e. With k = 1 the weight is the expert's prob itself: divided
            by their sum all would be 1, without a gradient.
        threshold: in [0, 1], while training; one for all choices or k - 1 of them, second choice
            first. 0: always taken.
        eval_threshold: the same in evaluation.
        policy: see above.
        stochastic_eval: evaluate with the policy "random" as it is.
        capacity_factor: while training an expert takes max(min(n, ⌊n·factor / e⌋), min_capacity)
            choices of a sequence of n tokens. None: all that come.
        eval_capacity_factor: the same in evaluation.
        min_capacity: see above.
        capacity_scope, slot_order: of ``Capacity``. With "rank_major", the original's order, a
            router with a capacity is not causal. What is not here ``MoE(capacity=...)`` offers.
        straight_through: the weights get a gradient also as if they multiplied the experts' input.
        normalize_eps: what the weights' sum and a threshold count for at least.
        differentiable_topk: weights from the scores of ``coordinate_descent`` instead of probs.
        jitter, jitter_scale: see ``Jitter``; ST-MoE's is "gumbel".

    Raises:
        InputError: a number out of its range or an unknown name.

    Source: Lepikhin et al. 2020 (2006.16668) algorithm 1; Zoph et al. 2022 (2202.08906) appendix C;
    more than two choices: st-moe-pytorch ``TopNGating``.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        experts_per_token: int = 2,
        threshold: float | Sequence[float] = 0.2,
        eval_threshold: float | Sequence[float] = 0.2,
        policy: ThresholdPolicy = "random",
        stochastic_eval: bool = False,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        capacity_scope: CapacityScope = "sequence",
        slot_order: SlotOrder = "token_major",
        straight_through: bool = True,
        normalize_eps: float = 1e-9,
        differentiable_topk: bool = False,
        jitter: JitterKind | None = None,
        jitter_scale: float = 0.0,
    ) -> None:
        super().__init__()
        check_experts_per_token(experts_per_token, num_experts)
        if policy not in get_args(ThresholdPolicy):
            raise InputError(
                f"policy {policy!r} is not one of {', '.join(get_args(ThresholdPolicy))}"
            )
        for name, factor in (
            ("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor),
        ):  # fmt: skip
            if factor is not None and not 0 < factor < math.inf:
                raise InputError(f"{name} is {factor}, but must be a number above 0 (or null)")
        if min_capacity < 0:
            raise InputError(f"min_capacity is {min_capacity}, but must be at least 0")
        if not normalize_eps > 0:
            raise InputError(f"normalize_eps is {normalize_eps}, but must be above 0")
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.threshold = _thresholds("threshold", threshold, experts_per_token)
        self.eval_threshold = _thresholds("eval_threshold", eval_threshold, experts_per_token)
        self.policy: ThresholdPolicy = policy
        self.stochastic_eval = stochastic_eval
        self.capacity: Capacity | None = None
        if capacity_factor is not None or eval_capacity_factor is not None:
            self.capacity = Capacity(
                factor=capacity_factor,
                eval_factor=eval_capacity_factor,
                minimum=min_capacity,
                scope=capacity_scope,
                slot_order=slot_order,
                share_of="tokens",
            )
        self.straight_through = straight_through
        self.normalize_eps = normalize_eps
        self.differentiable_topk = differentiable_topk
        self.jitter = make_jitter(jitter, jitter_scale)
        self.replay = ReplaySlot()
        self.gate = nn.Linear(dim, num_experts, bias=False)

    @property
    def causal(self) -> bool:
        """Whether, in the present mode, later tokens decide nothing (see ``Capacity``)."""
        return self.capacity is None or self.capacity.causal(training=self.training)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are routed nowhere, take no place and may hold anything; capacities
                are counted per sequence.
        """
        k = self.experts_per_token
        x = real_rows(x, info.mask)
        clean, logits = jittered_logits(self.gate, x, self.jitter, training=self.training)
        scores = probs = logits.softmax(-1)  # [t, e]
        if self.differentiable_topk:
            scores, best = soft_top_k(probs, k)
        else:
            best = probs.detach().topk(k, dim=-1).indices
        expert = info.decided(lambda: self.replay(best))  # [t, k]
        weights = scores.gather(1, expert)  # [t, k]
        if k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=self.normalize_eps)
        routing = route_by_choice(
            expert=expert,
            weights=weights,
            logits=clean,
            probs=probs,
            info=info,
            kept=self._taken(weights.detach(), info),
            # it is 1 and there for its gradient only
            straight_through=self.straight_through and torch.is_grad_enabled(),
        )
        if self.capacity is None:
            return routing
        return self.capacity.limit(routing, training=self.training)

    def _taken(self, weights: Tensor, info: TokenInfo) -> Tensor | None:
        """[t, k] bool, what the policy lets through; None: all."""
        policy: ThresholdPolicy = self.policy
        if policy == "all":
            return None
        first = torch.ones_like(weights[:, 0], dtype=torch.bool)  # [t]
        thresholds = self.threshold if self.training else self.eval_threshold
        columns = [first]
        if policy == "random" and (self.training or self.stochastic_eval):
            uniform = torch.rand_like(weights)  # the first choice's too: as the original draws
            columns += [
                uniform[:, r] < weights[:, r] / max(threshold, self.normalize_eps)
                for r, threshold in enumerate(thresholds, start=1)
            ]
        elif policy == "none":
            columns += [~first for _ in thresholds]
        else:
            columns += [weights[:, r] >= limit for r, limit in enumerate(thresholds, start=1)]
        taken = torch.stack(columns, dim=1)
        return info.decided(lambda: taken)


def _thresholds(name: str, value: float | Sequence[float], k: int) -> tuple[float, ...]:
    """One for each choice but the first."""
    if isinstance(value, int | float):
        given = (float(value),) * (k - 1)
    elif isinstance(value, str) or not all(isinstance(number, int | float) for number in value):
        raise InputError(f"{name} is {value!r}, but must be a number or a list of numbers")
    else:
        given = tuple(float(number) for number in value)
    if len(given) != k - 1:
        raise InputError(
            f"{name} has {len(given)} values, but with experts_per_token {k} there are {k - 1} "
            "choices after the first: give one for each, or a single number"
        )
    if not all(0 <= number <= 1 for number in given):
        raise InputError(f"{name} is {value}, but must lie between 0 and 1")
    return given
