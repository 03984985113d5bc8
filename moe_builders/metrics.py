"""How evenly the experts are used: pure functions of load counts.

Letters: e num_experts · l layers with experts. Counts come from ``Routing.num_tokens_per_expert``
and leave masked tokens out; sum them over micro-batches and ranks before asking.
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


def layer_metrics(counts: Tensor) -> dict[str, list[float]]:
    """[l, e] counts -> each measure, layer by layer."""
    return {
        "max_violation": max_violation(counts).tolist(),
        "dead_experts": dead_experts(counts).tolist(),
        "load_entropy": load_entropy(counts).tolist(),
    }


def relative_load(counts: Tensor) -> Tensor:
    """[..., e] counts -> [..., e] load over the mean load: 1 is balanced, 0 is dead."""
    return load_share(counts) * counts.shape[-1]


def load_metrics(counts: Tensor) -> dict[str, float]:
    """[l, e] counts -> the few numbers worth a log line (worst layer first in mind)."""
    return {
        "max_violation": float(max_violation(counts).max()),
        "dead_experts": int(dead_experts(counts).sum()),
        "load_entropy": float(load_entropy(counts).mean()),
    }
