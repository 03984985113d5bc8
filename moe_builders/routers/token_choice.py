"""Tokens pick experts: the router of nearly every released model.

Letters: t tokens · d dim · e num_experts · k experts_per_token · g groups.
"""

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from moe_builders.routers.bias import (
    QUANTILE_RANGES,
    BiasRule,
    needed_bias_histogram,
    quantile_step,
    selection_counts,
    sign_step,
)
from moe_builders.routers.buffers import wide_buffers
from moe_builders.routers.gate import (
    Jitter,
    JitterKind,
    check_precision,
    jittered_logits,
    make_jitter,
    real_rows,
)
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routers.scores import (
    ScoreFunction,
    WeightsFrom,
    check_experts_per_token,
    check_groups,
    check_scores,
    keep_best_groups,
    scores_and_probs,
)
from moe_builders.routing import Routing, TokenInfo, route_by_choice


class TokenChoiceTopKRouter(nn.Module):
    """Each token takes its k best experts.

    logits = gate(x); scores = softmax or sigmoid of the logits; the k best scores (plus
    ``expert_bias``, which steers selection only) are selected; the selected scores, normalised and
    scaled, are the weights. All of it in fp32 (fp64 for fp64 inputs).

    Causal: a token's routing depends on that token alone.

    Args:
        dim: d.
        num_experts: e.
        experts_per_token: k, 1 ≤ k ≤ e.
        score_function: "softmax" over all experts; "sigmoid" per expert; "topk_softmax": the k
            best logits are selected and the softmax runs over these k only; "topk_sigmoid": logits
            are selected, too, where sigmoids that all round to 1 would be a draw (Llama 4);
            "sqrtsoftplus": √log(1 + exp(logit)) per expert.
        normalize_weights: divide a token's weights by their sum (k > 1; with k = 1 every weight
            would be 1 and the router would get no gradient, so it is left alone).
        normalize_eps: added to that sum.
        normalize_min: what that sum counts for at least (ERNIE 4.5).
        route_scale: multiplies the weights at the end.
        expert_bias: keep a selection-only bias: a buffer, never given a gradient, fp32 or wider
            whatever the module is cast to (its steps are smaller than what bf16 can tell apart).
        gate_bias: the gate has a bias of its own (it does get a gradient), 0 at first.
        num_groups, groups_per_token: with more than one group, first the best groups are kept,
            then the best experts inside them. A group's score is the sum of its
            ``group_score_topk`` best members; the others are masked with -inf.
        group_score_topk: see above; "auto": k // groups_per_token, at least 1 (Megatron's rule).
        weights_from: "scores", or "biased": the bias counts in the weights, too.
        gate_precision: "fp32", "fp64" or "bf16", what the gate's product is computed in; None: as
            everything here.
        jitter, jitter_scale: noise in training, see ``Jitter``. Selection, weights and probs come
            from the noised logits; so does ``Routing.logits``, except with "gumbel".

    Attributes:
        jitter: the noise; may be set later.
        bias_rule: how ``expert_bias`` learns from whole steps; None: it does not.
        replay: where the selection passes through, see ``RouterReplay``.

    Raises:
        InputError: a number or a name out of its range.

    Source: softmax: Shazeer et al. 2017 (1701.06538); sigmoid, groups and bias: DeepSeek-V3
    (2412.19437) eq. 12–16; score of a group: transformers ``DeepseekV3TopkRouter``.
    """

    causal = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        experts_per_token: int,
        score_function: ScoreFunction = "softmax",
        normalize_weights: bool = True,
        normalize_eps: float = 1e-20,
        normalize_min: float = 0.0,
        route_scale: float = 1.0,
        expert_bias: bool = False,
        gate_bias: bool = False,
        num_groups: int = 1,
        groups_per_token: int = 1,
        group_score_topk: int | Literal["auto"] = 2,
        weights_from: WeightsFrom = "scores",
        gate_precision: str | None = None,
        jitter: JitterKind | None = None,
        jitter_scale: float = 0.0,
    ) -> None:
        super().__init__()
        check_experts_per_token(experts_per_token, num_experts)
        check_scores(
            score_function=score_function, weights_from=weights_from, expert_bias=expert_bias
        )
        check_precision(gate_precision)
        self.group_score_topk = check_groups(
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            num_groups=num_groups,
            groups_per_token=groups_per_token,
            group_score_topk=group_score_topk,
        )
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.score_function: ScoreFunction = score_function
        self.normalize_weights = normalize_weights and experts_per_token > 1
        self.normalize_eps = normalize_eps
        self.normalize_min = normalize_min
        self.route_scale = route_scale
        self.num_groups = num_groups
        self.groups_per_token = groups_per_token
        self.weights_from = weights_from
        self.gate_precision = gate_precision
        self.jitter: Jitter | None = make_jitter(jitter, jitter_scale)
        self.bias_rule: BiasRule | None = None
        self.replay = ReplaySlot()
        self.gate = nn.Linear(dim, num_experts, bias=gate_bias)
        if gate_bias:
            nn.init.zeros_(self.gate.bias)  # no expert is preferred before anything is learned
        self.expert_bias: Tensor | None
        bias = torch.zeros(num_experts, dtype=torch.float32) if expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are routed nowhere.
        """
        x = real_rows(x, info.mask)
        logits, noised = jittered_logits(
            self.gate, x, self.jitter, training=self.training, precision=self.gate_precision
        )  # [t, e] twice
        scores, probs = scores_and_probs(noised, self.score_function)
        expert = info.decided(lambda: self.replay(self._select(scores.detach())))  # [t, k]
        if self.weights_from == "biased" and self.expert_bias is not None:
            scores = scores + self.expert_bias.to(scores.dtype)
        weights = scores.gather(1, expert)  # [t, k]
        if self.score_function == "topk_sigmoid":
            weights = weights.sigmoid()
        if self.score_function == "topk_softmax":
            weights = weights.softmax(-1)
        elif self.normalize_weights:
            total = weights.sum(-1, keepdim=True)  # [t, 1]
            if self.normalize_min > 0:
                total = total.clamp(min=self.normalize_min)
            weights = weights / (total + self.normalize_eps)
        if self.route_scale != 1.0:
            weights = weights * self.route_scale
        return route_by_choice(
            expert=expert, weights=weights, logits=logits, probs=probs, info=info
        )

    def _select(self, scores: Tensor) -> Tensor:
        """[t, e] -> [t, k], the chosen experts."""
        if self.expert_bias is not None:
            scores = scores + self.expert_bias.to(scores.dtype)
        if self.num_groups > 1:
            scores = keep_best_groups(
                scores,
                num_groups=self.num_groups,
                groups_per_token=self.groups_per_token,
                group_score_topk=self.group_score_topk,
            )
        return scores.topk(self.experts_per_token, dim=-1).indices

    @property
    def tally_size(self) -> int:
        """Numbers that ``tally`` gives."""
        rule = self.bias_rule
        if rule is None or self.expert_bias is None or rule.update_rate == 0 or self._frozen():
            return 0
        return self.num_experts * (1 if rule.rule == "sign" else rule.bins)

    def tally(self, routing: Routing) -> Tensor:
        """[n] fp64, what the bias learns from: see ``LearningRouter``.

        The sign rule counts what real tokens selected, before any drop; the quantile rule what
        biases they would need, from ``Routing.logits`` (noised, except with "gumbel"). n = 0 where
        nothing is learned: without a bias or a rule, at rate 0, and under a frozen gate.
        """
        rule, bias = self.bias_rule, self.expert_bias
        if self.tally_size == 0 or rule is None or bias is None:
            return routing.logits.new_zeros(0, dtype=torch.float64)  # [0]
        if rule.rule == "sign":
            return selection_counts(routing)
        with torch.no_grad():
            scores, _ = scores_and_probs(routing.logits, self.score_function)
            return needed_bias_histogram(
                scores,
                bias,
                experts_per_token=self.experts_per_token,
                mask=routing.info.mask,
                half=self._histogram_half(rule),
                n=rule.bins,
            )

    @torch.no_grad()
    def learn(self, tally: Tensor) -> None:
        """Move ``expert_bias`` once, in place; ``tally`` [n] is the whole step's sum."""
        rule, bias = self.bias_rule, self.expert_bias
        if rule is None or bias is None or tally.numel() == 0:
            return
        if rule.rule == "sign":
            moved = sign_step(bias, tally, rule)
        else:
            moved = quantile_step(
                bias,
                tally,
                rule,
                experts_per_token=self.experts_per_token,
                half=self._histogram_half(rule),
            )
        bias.copy_(moved)

    def _frozen(self) -> bool:
        return not self.gate.weight.requires_grad

    def _histogram_half(self, rule: BiasRule) -> float:
        return rule.histogram_range or QUANTILE_RANGES[self.score_function]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``half``, ``to_empty`` and the like do, but the bias stays fp32 or wider."""
        with wide_buffers(self):
            return super()._apply(fn, recurse)
