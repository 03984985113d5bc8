"""The router part of a step's loss: per layer, then the mean over layers.

Letters: l layers with experts · e num_experts.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.losses import count_assignments, load_balancing_loss, router_z_loss
from moe_builders.routing import Routing


def narrow_to(routings: Mapping[str, Routing], mask: Tensor) -> dict[str, Routing]:
    """The same decisions, seen only by the tokens in mask [t] (labelled ones, for instance)."""
    return {
        name: replace(routing, info=replace(routing.info, mask=mask))
        for name, routing in routings.items()
    }


def layer_counts(routings: Mapping[str, Routing]) -> Tensor:
    """[l, e] int64, assignments per layer and expert of the tokens in each routing's mask.

    Raises:
        InputError: no layer with experts, or layers with different numbers of them.
    """
    if not routings:
        raise InputError("the model has no MoE layer, so there is no routing to count or to train")
    counts = [count_assignments(routing) for routing in routings.values()]
    if len({len(c) for c in counts}) > 1:
        raise InputError("layers have different numbers of experts, so their loads make no table")
    return torch.stack(counts)


def router_losses(
    routings: Mapping[str, Routing],
    *,
    scope: str,
    num_tokens: Tensor | int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(load-balancing loss, z-loss), each the mean over layers of a sum over tokens / num_tokens.

    Args:
        routings: of one micro-batch, from ``collect_routing``.
        scope: "sequence", "micro" or "global".
        num_tokens: real tokens of the whole step over all processes.
        counts: [l, e] of the whole scope, with scope "global" only.
    """
    balance, z = [], []
    for layer, routing in enumerate(routings.values()):
        own = counts[layer] if counts is not None else None
        balance.append(
            load_balancing_loss(routing, scope=scope, counts=own, num_tokens=num_tokens)  # pyright: ignore[reportArgumentType]
        )
        z.append(router_z_loss(routing, num_tokens=num_tokens))
    return torch.stack(balance).mean(), torch.stack(z).mean()
