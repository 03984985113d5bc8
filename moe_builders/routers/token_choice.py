"""Tokens pick experts: the router of nearly every released model.

Letters: t tokens · d dim · e num_experts · k experts_per_token · g groups.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.routing import Routing, TokenInfo, route_by_choice

ScoreFunction = Literal["softmax", "sigmoid", "topk_softmax", "topk_sigmoid"]


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
            are selected, too, where sigmoids that all round to 1 would be a draw (Llama 4).
        normalize_weights: divide a token's weights by their sum (k > 1; with k = 1 every weight
            would be 1 and the router would get no gradient, so it is left alone).
        normalize_eps: added to that sum.
        normalize_min: what that sum counts for at least (ERNIE 4.5).
        route_scale: multiplies the weights at the end.
        expert_bias: keep a selection-only bias: a buffer, never given a gradient.
        gate_bias: the gate has a bias of its own (it does get a gradient).
        num_groups, groups_per_token: with more than one group, first the best groups are kept,
            then the best experts inside them. A group's score is the sum of its
            ``group_score_topk`` best members; the others are masked with -inf.
        group_score_topk: see above.

    Raises:
        InputError: a number out of its range.

    Source: softmax: Shazeer et al. 2017 (1701.06538); sigmoid, groups and bias: DeepSeek-V3
    (2412.19437) eq. 12–16; score of a group: transformers ``DeepseekV3TopkRouter``.
    """

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
        group_score_topk: int = 2,
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise InputError(
                f"experts_per_token is {experts_per_token}, but must lie between 1 and "
                f"num_experts ({num_experts})"
            )
        if score_function not in get_args(ScoreFunction):
            raise InputError(
                f"score_function {score_function!r} is not one of "
                f"{', '.join(get_args(ScoreFunction))}"
            )
        _check_groups(
            num_experts, experts_per_token, num_groups, groups_per_token, group_score_topk
        )
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.score_function = score_function
        self.normalize_weights = normalize_weights and experts_per_token > 1
        self.normalize_eps = normalize_eps
        self.normalize_min = normalize_min
        self.route_scale = route_scale
        self.num_groups = num_groups
        self.groups_per_token = groups_per_token
        self.group_score_topk = group_score_topk
        self.gate = nn.Linear(dim, num_experts, bias=gate_bias)
        self.expert_bias: Tensor | None
        bias = torch.zeros(num_experts, dtype=torch.float32) if expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are routed nowhere.
        """
        logits = gate_logits(self.gate, x)  # [t, e]
        if self.score_function.endswith("sigmoid"):
            scores = logits.sigmoid()
            # softmax of log-sigmoid = the scores over their sum, but also where all underflow
            probs = F.logsigmoid(logits).softmax(-1)
        else:
            scores = probs = logits.softmax(-1)
        if self.score_function.startswith("topk_"):
            scores = logits
        expert = self._select(scores.detach())  # [t, k]
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
            scores = self._keep_best_groups(scores)
        return scores.topk(self.experts_per_token, dim=-1).indices

    def _keep_best_groups(self, scores: Tensor) -> Tensor:
        by_group = scores.unflatten(-1, (self.num_groups, -1))  # [t, g, e/g]
        group_scores = by_group.topk(self.group_score_topk, dim=-1).values.sum(-1)  # [t, g]
        kept = group_scores.topk(self.groups_per_token, dim=-1).indices
        rejected = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
        # -inf, not 0: with a negative bias a 0 would win
        return by_group.masked_fill(rejected[..., None], float("-inf")).flatten(1)


def gate_logits(gate: nn.Linear, x: Tensor) -> Tensor:
    """The gate's output in fp32 (fp64 for fp64 inputs), whatever the storage: [t, d] -> [t, e]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if gate.bias is None else gate.bias.to(wide)
    return F.linear(x.to(wide), gate.weight.to(wide), bias)


def _check_groups(
    num_experts: int,
    experts_per_token: int,
    num_groups: int,
    groups_per_token: int,
    group_score_topk: int,
) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise InputError(f"num_groups is {num_groups}, but must divide num_experts ({num_experts})")
    if not 1 <= groups_per_token <= num_groups:
        raise InputError(
            f"groups_per_token is {groups_per_token}, but must lie between 1 and num_groups "
            f"({num_groups})"
        )
    if num_groups == 1:
        return
    size = num_experts // num_groups
    if not 1 <= group_score_topk <= size:
        raise InputError(
            f"group_score_topk is {group_score_topk}, but must lie between 1 and the "
            f"{size} experts of a group"
        )
    if experts_per_token > groups_per_token * size:
        raise InputError(
            f"experts_per_token is {experts_per_token}, but {groups_per_token} groups of {size} "
            f"hold only {groups_per_token * size} experts: raise groups_per_token"
        )
