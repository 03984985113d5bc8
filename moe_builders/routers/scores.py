"""How logits become scores, which choice scores allow, and which arguments go together.

Letters: t tokens · e num_experts · k experts_per_token · g groups.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_builders.errors import InputError

ScoreFunction = Literal["softmax", "sigmoid", "topk_softmax", "topk_sigmoid", "sqrtsoftplus"]
WeightsFrom = Literal["scores", "biased"]


def scores_and_probs(logits: Tensor, function: ScoreFunction) -> tuple[Tensor, Tensor]:
    """(what experts are selected by, the distribution over the experts): [t, e] -> [t, e] twice.

    The rows of the second sum to 1 at any level of the logits, and their gradient is finite: what
    does not sum to 1 by itself is the softmax of the scores' logarithms, which is the scores over
    their sum, but also where all of them underflow.

    Args:
        logits: [t, e] in fp32 or fp64.
        function: see ``TokenChoiceTopKRouter``; the "topk_" ones select by the logits.
    """
    if function == "sqrtsoftplus":
        logs = log_softplus(logits) / 2
        return logs.exp(), logs.softmax(-1)
    if function.endswith("sigmoid"):
        scores = logits if function == "topk_sigmoid" else logits.sigmoid()
        return scores, F.logsigmoid(logits).softmax(-1)
    probs = logits.softmax(-1)
    return logits if function == "topk_softmax" else probs, probs


def log_softplus(z: Tensor) -> Tensor:
    """log(log(1 + exp(z))): z itself far below 0, where exp(z) underflows."""
    high = z.clamp(min=-40)  # below, log(1 + u) = u in fp64, too
    return (-F.logsigmoid(-high)).log() + (z - high)


def keep_best_groups(
    scores: Tensor, *, num_groups: int, groups_per_token: int, group_score_topk: int
) -> Tensor:
    """-inf for the experts outside of a token's best groups: [t, e] -> [t, e].

    A group's score is the sum of its ``group_score_topk`` best members.
    """
    by_group = scores.unflatten(-1, (num_groups, -1))  # [t, g, e/g]
    group_scores = by_group.topk(group_score_topk, dim=-1).values.sum(-1)  # [t, g]
    kept = group_scores.topk(groups_per_token, dim=-1).indices
    rejected = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
    # -inf, not 0: with a negative bias a 0 would win
    return by_group.masked_fill(rejected[..., None], float("-inf")).flatten(1)


def check_experts_per_token(experts_per_token: int, num_experts: int) -> None:
    """Refuse a k outside of [1, e].

    Raises:
        InputError: both numbers.
    """
    if not 1 <= experts_per_token <= num_experts:
        raise InputError(
            f"experts_per_token is {experts_per_token}, but must lie between 1 and "
            f"num_experts ({num_experts})"
        )


def check_scores(*, score_function: str, weights_from: str, expert_bias: bool) -> None:
    """Refuse names that are not known, or that need a bias where there is none.

    Raises:
        InputError: one sentence for the first.
    """
    if score_function not in get_args(ScoreFunction):
        raise InputError(
            f"score_function {score_function!r} is not one of {', '.join(get_args(ScoreFunction))}"
        )
    if weights_from not in get_args(WeightsFrom):
        raise InputError(
            f"weights_from {weights_from!r} is not one of {', '.join(get_args(WeightsFrom))}"
        )
    if weights_from == "biased" and not expert_bias:
        raise InputError("weights_from is 'biased', but there is no bias: set expert_bias to true")


def check_groups(
    *,
    num_experts: int,
    experts_per_token: int,
    num_groups: int,
    groups_per_token: int,
    group_score_topk: int | Literal["auto"],
) -> int:
    """The ``group_score_topk`` that counts: "auto" is k // groups_per_token, at least 1.

    Raises:
        InputError: a number out of its range.
    """
    if num_groups < 1 or num_experts % num_groups:
        raise InputError(f"num_groups is {num_groups}, but must divide num_experts ({num_experts})")
    if not 1 <= groups_per_token <= num_groups:
        raise InputError(
            f"groups_per_token is {groups_per_token}, but must lie between 1 and num_groups "
            f"({num_groups})"
        )
    if isinstance(group_score_topk, str) and group_score_topk != "auto":
        raise InputError(
            f"group_score_topk is {group_score_topk!r}, but must be a whole number or auto"
        )
    if group_score_topk == "auto":
        best = max(1, experts_per_token // groups_per_token)
    else:
        best = group_score_topk
    if num_groups == 1:
        return best
    size = num_experts // num_groups
    if not 1 <= best <= size:
        raise InputError(
            f"group_score_topk is {group_score_topk}, but must lie between 1 and the "
            f"{size} experts of a group"
        )
    if experts_per_token > groups_per_token * size:
        raise InputError(
            f"experts_per_token is {experts_per_token}, but {groups_per_token} groups of {size} "
            f"hold only {groups_per_token * size} experts: raise groups_per_token"
        )
    return best
