"""Optimizer and learning-rate schedule from their config nodes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, first_line, instantiate


def build_optimizer(node: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """An optimizer over all parameters that take a gradient.

    Raises:
        InputError: one of torch's optimizers on bf16 weights, or arguments it does not take.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    component = component_of(node, path="optimizer")
    # torch's own write an update into the weights as it is
    plain = str(getattr(component, "__module__", "")).startswith("torch.optim")
    if plain and any(p.dtype == torch.bfloat16 for p in parameters):
        raise InputError(
            f"param_dtype=bf16 with {node['_component_']} would round most updates away: set "
            "param_dtype=fp32 (with compute_dtype=bf16), or use an optimizer that rounds "
            "stochastically (torchao.optim.AdamW8bit with bf16_stochastic_round: true)"
        )
    try:
        return instantiate(node, parameters, path="optimizer")
    except TypeError as error:  # torch compares a rate with 0 before it asks what it is
        raise InputError(f"optimizer: {first_line(error)}") from error


def build_scheduler(
    node: Mapping[str, Any] | None, optimizer: Optimizer, *, num_steps: int
) -> LRScheduler | None:
    """A schedule over the run's optimizer steps; None for a constant rate.

    Args:
        node: torchtune's get_cosine_schedule_with_warmup, or anything that takes an optimizer
            and ``num_training_steps``.
        optimizer: whose rate it sets.
        num_steps: of the whole run.
    """
    if node is None:
        return None
    return instantiate(node, optimizer, num_training_steps=num_steps, path="lr_scheduler")


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory in use on a GPU so far; None on the CPU, where nobody counts it."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
