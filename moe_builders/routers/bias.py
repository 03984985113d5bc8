"""Loss-free balancing: how a selection-only bias moves after a step, as functions of counts.

Letters: t tokens · e num_experts · k experts_per_token · n bins of a histogram.

Counts are added up over micro-batches and processes before a rule sees them, so that the bias
moves once a step and to the same value everywhere.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.routing import Routing

BiasRuleName = Literal["sign", "quantile"]
# selection scores whose differences, and so the biases that even them out, have a known size
QUANTILE_RANGES = {"sigmoid": 1.0, "topk_softmax": 16.0, "topk_sigmoid": 16.0}


@dataclass(frozen=True)
class BiasRule:
    """How an ``expert_bias`` learns.

    Attributes:
        update_rate: ≥ 0; 0: the bias stays as it is. "sign": what is added or subtracted;
            "quantile": the part of the way that is gone, ≤ 1.
        rule: "sign" (auxiliary-loss-free balancing): up for an expert with less than the mean
            load, down with more, unchanged at the mean. "quantile": towards the bias with which
            each expert would have got its share of this step's tokens, the other cutoffs staying
            where they are.
        recenter: subtract the mean afterwards. A constant changes no selection; without this it
            may drift.
        bins: n of the quantile's histogram, ≥ 2.
        histogram_range: the histogram covers the mean bias ± this; None: 1 for sigmoid scores, 16
            where logits select. What lies outside counts in the outermost bins.

    Raises:
        InputError: a number out of its range, an unknown rule.

    Source: sign: Wang et al. 2024 (2408.15664) algorithm 1, DeepSeek-V3 (2412.19437) section
    2.1.2; quantile: the balancing of Kimi K3's router.
    """

    update_rate: float
    rule: BiasRuleName = "sign"
    recenter: bool = False
    bins: int = 512
    histogram_range: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(BiasRuleName):
            raise InputError(
                f"expert_bias.rule {self.rule!r} is not one of {', '.join(get_args(BiasRuleName))}"
            )
        most = math.inf if self.rule == "sign" else 1
        if not 0 <= self.update_rate <= most or math.isinf(self.update_rate):
            limit = "at least 0 and finite" if self.rule == "sign" else "between 0 and 1"
            raise InputError(
                f"expert_bias.update_rate is {self.update_rate}, but with rule {self.rule} must be "
                f"{limit}"
            )
        if self.bins < 2:
            raise InputError(f"bins is {self.bins}, but a histogram needs at least 2")
        if self.histogram_range is not None and not 0 < self.histogram_range < math.inf:
            raise InputError(f"histogram_range is {self.histogram_range}, but must be above 0")


def check_bias_rule(router: Any, rule: BiasRule) -> None:
    """Refuse a rule that a router cannot follow.

    Args:
        router: any; needs ``expert_bias``, and for the quantile rule what
            ``TokenChoiceTopKRouter`` has.
        rule: to be its ``bias_rule``.

    Raises:
        InputError: no bias to move, a frozen gate under a bias that moves, or scores that the
            quantile rule is not made for.
    """
    kind = type(router).__name__
    if getattr(router, "expert_bias", None) is None:
        raise InputError(
            f"expert_bias.update_rate is {rule.update_rate}, but the {kind} has no expert_bias: "
            "build it with expert_bias true, or leave the section out"
        )
    gate = getattr(router, "gate", None)
    if rule.update_rate > 0 and gate is not None and not gate.weight.requires_grad:
        raise InputError(
            f"expert_bias.update_rate is {rule.update_rate}, but the gate is frozen, and its bias "
            "with it: set update_rate to 0 or train the gate"
        )
    if rule.rule != "quantile":
        return
    function = getattr(router, "score_function", None)
    if function not in QUANTILE_RANGES:
        raise InputError(
            f"expert_bias.rule quantile is for the score functions {', '.join(QUANTILE_RANGES)}, "
            f"but the {kind}'s is {function}: use rule sign"
        )
    if router.num_groups > 1:
        raise InputError(
            f"expert_bias.rule quantile knows no groups, but num_groups is {router.num_groups}: "
            "use rule sign"
        )
    if router.experts_per_token == router.num_experts:
        raise InputError(
            f"expert_bias.rule quantile needs an expert that is left out, but experts_per_token is "
            f"num_experts ({router.num_experts}): there is nothing to balance"
        )


def selection_counts(routing: Routing) -> Tensor:
    """[e] fp64, how many real tokens asked for each expert, before anything was dropped."""
    assert routing.selected is not None, "tokens choose in a router with an expert_bias"
    e, selected, mask = routing.logits.shape[1], routing.selected, routing.info.mask
    if mask is not None:
        selected = torch.where(mask[:, None], selected, e)
    counts = torch.zeros(e + 1, dtype=torch.int64, device=selected.device)  # [e + 1] last: masked
    place = selected.flatten()
    return counts.scatter_add(0, place, torch.ones_like(place))[:e].double()


def sign_step(bias: Tensor, counts: Tensor, rule: BiasRule) -> Tensor:
    """The next bias by the sign rule: b + update_rate · sign(mean load - load).

    Args:
        bias: [e].
        counts: [e] fp64, tokens per expert of the whole step; all 0: nothing moves.
        rule: how.
    """
    # whole numbers: a GPU's mean, a product with 1/e, misses the load of an expert that is at it
    below = counts.sum() - counts * counts.shape[0]  # [e]
    step = below.sign().to(bias.dtype) * rule.update_rate
    return _recentered(bias + step, rule)


def needed_bias_histogram(
    scores: Tensor,
    bias: Tensor,
    *,
    experts_per_token: int,
    mask: Tensor | None,
    half: float,
    n: int,
) -> Tensor:
    """[e · n] fp64: for each expert, how many tokens would need which bias to select it.

    A token's cutoff is its (k + 1)-th biased score, the best that is left out. At a bias of
    cutoff - score an expert stands at that cutoff.

    Args:
        scores: [t, e] what experts are selected by, without the bias.
        bias: [e].
        experts_per_token: k, below e.
        mask: [t] bool, True = counts; None: all.
        half, n: n bins of equal width from mean(bias) - half to mean(bias) + half.
    """
    e = bias.shape[0]
    shift = bias.double().mean().to(scores.dtype)
    level = bias.to(scores.dtype) - shift  # [e] a constant selects nothing
    cutoff = (scores + level).topk(experts_per_token + 1, dim=-1).values[:, -1:]  # [t, 1]
    place = ((cutoff - scores + half) * (n / (2 * half))).floor()  # [t, e]
    # a masked token may hold NaN, which is no whole number
    real = torch.ones_like(place, dtype=torch.bool) if mask is None else mask[:, None]
    place = torch.where(real, place, 0).clamp(0, n - 1).long()
    cell = (place + torch.arange(e, device=place.device) * n).flatten()
    counts = torch.zeros(e * n, dtype=torch.int64, device=place.device)  # [e * n]
    return counts.scatter_add(0, cell, real.expand(place.shape).flatten().long()).double()


def quantile_step(
    bias: Tensor, histogram: Tensor, rule: BiasRule, *, experts_per_token: int, half: float
) -> Tensor:
    """The next bias by the quantile rule; linear inside a bin.

    Args:
        bias: [e], as it was when the histogram was made.
        histogram: [e · n] fp64 of ``needed_bias_histogram``, of the whole step; all 0: nothing
            moves.
        rule: how.
        experts_per_token: k.
        half: of the histogram.
    """
    e = bias.shape[0]
    counts = histogram.view(e, rule.bins)
    below = counts.cumsum(-1)  # [e, n] tokens up to and with this bin
    share = below[:, -1:] * (experts_per_token / e)  # [e, 1] tokens that each expert should get
    place = torch.searchsorted(below, share).clamp(max=rule.bins - 1)  # [e, 1]
    inside = counts.gather(1, place)
    part = (share - (below.gather(1, place) - inside)) / inside.clamp(min=1)
    wide = bias.double()
    wanted = wide.mean() - half + (place + part).squeeze(1) * (2 * half / rule.bins)  # [e]
    moved = torch.where(share.squeeze(1) > 0, wide.lerp(wanted, rule.update_rate), wide)
    return _recentered(moved.to(bias.dtype), rule)


def _recentered(bias: Tensor, rule: BiasRule) -> Tensor:
    return bias - bias.double().mean().to(bias.dtype) if rule.recenter else bias
