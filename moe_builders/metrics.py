"""How evenly the experts are used: pure functions of load tables.

Letters: e num_experts · l layers with experts. Tables come from ``training.objective.layer_loads``
and leave masked tokens out; sum them over micro-batches and ranks before asking. ``counts`` are
assignments before any was dropped, ``scores`` sums of the score distribution over tokens.
"""

import math

import torch
from torch import Tensor


def max_violation(counts: Tensor) -> Tensor:
    """[..., e] counts -> [...] worst expert's load over the mean load, minus 1; 0 is balanced.

    Source: Wang et al. 2024 (2408.15664) eq. 4.
    """
    counts = counts.double()
    mean = counts.mean(-1)
    return (counts.amax(-1) - mean) / mean.clamp(min=1e-12)  # 0 too where nothing was counted


def dead_experts(counts: Tensor) -> Tensor:
    """[..., e] counts -> [...] how many experts got no token."""
    return (counts == 0).sum(-1)


def load_share(counts: Tensor) -> Tensor:
    """[..., e] counts -> [..., e] share of the assignments; zeros when there were none."""
    counts = counts.double()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def load_entropy(counts: Tensor) -> Tensor:
    """[..., e] counts -> [...] entropy of the load over ln(e), in [0, 1]; 1 is balanced."""
    share = load_share(counts)
    if counts.shape[-1] == 1:
        return share.sum(-1)  # one expert is always balanced; ln(1) would divide 0 by 0
    return torch.special.entr(share).sum(-1) / math.log(counts.shape[-1])


def load_diversity(counts: Tensor) -> Tensor:
    """[..., e] counts -> [...] exp(entropy) / e, the share of experts as if each had as much as the
    next: 1 is balanced, 1/e is collapse, 0 where nothing was counted.
    """
    share = load_share(counts)
    alike = torch.special.entr(share).sum(-1).exp() / counts.shape[-1]
    return torch.where(share.sum(-1) > 0, alike, 0)


def load_cv(counts: Tensor) -> Tensor:
    """[..., e] counts -> [...] coefficient of variation: standard deviation (of a sample, e - 1)
    over the mean; 0 is balanced, √e is collapse.
    """
    counts = counts.double()
    spread = (counts - counts.mean(-1, keepdim=True)).square().sum(-1)
    deviation = (spread / max(counts.shape[-1] - 1, 1)).sqrt()
    return deviation / counts.mean(-1).clamp(min=1e-12)


def drop_rate(counts: Tensor, kept: Tensor) -> Tensor:
    """[..., e] assigned and kept -> [...] share of the assignments that were dropped."""
    asked = counts.double().sum(-1)
    return (asked - kept.double().sum(-1)) / asked.clamp(min=1)


def usage(scores: Tensor) -> Tensor:
    """[..., e] score sums -> [..., e] mean score; balanced is 1/e each. Zeros without a token."""
    return load_share(scores)  # a token's scores sum to 1, so their sum is the number of tokens


def usage_variance(scores: Tensor) -> Tensor:
    """[..., e] score sums -> [...] mean over experts of (usage - 1/e)²; 0 where nothing was."""
    used = usage(scores)
    spread = (used - 1 / scores.shape[-1]).square().mean(-1)
    return torch.where(scores.sum(-1) == 0, 0, spread)


def relative_load(counts: Tensor) -> Tensor:
    """[..., e] counts -> [..., e] load over the mean load: 1 is balanced, 0 is dead."""
    return load_share(counts) * counts.shape[-1]


def layer_metrics(load: Tensor) -> dict[str, list[float]]:
    """[3, l, e] assigned, kept, score sums -> each measure, layer by layer."""
    counts, kept, scores = load
    return {
        "max_violation": max_violation(counts).tolist(),
        "dead_experts": dead_experts(counts).tolist(),
        "load_entropy": load_entropy(counts).tolist(),
        "load_cv": load_cv(counts).tolist(),
        "load_diversity": load_diversity(counts).tolist(),
        "drop_rate": drop_rate(counts, kept).tolist(),
        "usage_variance": usage_variance(scores).tolist(),
    }


def load_metrics(load: Tensor) -> dict[str, float]:
    """[3, l, e] -> the few numbers worth a log line (worst layer first in mind)."""
    counts, kept, _ = load
    return {
        "max_violation": float(max_violation(counts).max()),
        "dead_experts": int(dead_experts(counts).sum()),
        "load_entropy": float(load_entropy(counts).mean()),
        "load_cv": float(load_cv(counts).mean()),
        "drop_rate": float(drop_rate(counts.flatten(), kept.flatten())),
    }


def detailed_metrics(load: Tensor) -> dict[str, float]:
    """[3, l, e] -> how layers and experts differ: spread of ``load_cv`` and ``load_diversity`` over
    layers, quantiles of ``relative_load`` over all experts (between two, in proportion).
    """
    counts, _, scores = load
    cv, diversity = load_cv(counts), load_diversity(counts)
    steps = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    lowest, p25, median, p75, highest = relative_load(counts).flatten().quantile(steps).tolist()
    return {
        "load_cv_median": float(cv.quantile(0.5)),
        "load_cv_min": float(cv.min()),
        "load_cv_max": float(cv.max()),
        "load_diversity": float(diversity.mean()),
        "load_diversity_min": float(diversity.min()),
        "dead_expert_frac": float((counts == 0).double().mean()),
        "utilisation_min": lowest,
        "utilisation_p25": p25,
        "utilisation_median": median,
        "utilisation_p75": p75,
        "utilisation_max": highest,
        "usage_variance": float(usage_variance(scores).mean()),
    }


def extreme_experts(counts: Tensor, number: int) -> dict[tuple[int, int], float]:
    """[l, e] counts -> {(layer, expert): relative load} of the least and the most used ones.

    Args:
        counts: of l layers.
        number: so many of each kind, over all layers; of experts alike the earlier ones first.
    """
    flat = relative_load(counts).flatten()
    order = flat.sort(stable=True).indices.tolist()
    chosen = dict.fromkeys(order[:number] + order[max(len(order) - number, 0) :])
    return {divmod(place, counts.shape[-1]): float(flat[place]) for place in chosen}
