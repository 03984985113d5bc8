"""Optimizer and learning-rate schedule from their config nodes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, first_line, instantiate, signature_of


def build_optimizer(node: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """An optimizer over all parameters that take a gradient.

    Raises:
        InputError: torch's or torchao's optimizers on bf16 weights, or arguments not taken.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    component = component_of(node, path="optimizer")
    # torch's own write an update into the weights as it is; torchao 0.15's stochastic rounding,
    # which would do, mixes plain and sharded tensors and fails in its first step
    package = str(getattr(component, "__module__", "")).partition(".")[0]
    if package in ("torch", "torchao") and any(p.dtype == torch.bfloat16 for p in parameters):
        raise InputError(
            f"param_dtype=bf16 with {node['_component_']} would round most updates away: set "
            "param_dtype=fp32 (with compute_dtype=bf16)"
        )
    for key in ("lr", "weight_decay", "eps"):
        if isinstance(node.get(key), str):
            raise InputError(f"optimizer.{key} is the text {node[key]!r}, but must be a number")
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
            (and ``num_training_steps``, if it has that argument).
        optimizer: whose rate it sets.
        num_steps: of the whole run.
    """
    if node is None:
        return None
    signature = signature_of(component_of(node, path="lr_scheduler"))
    asks = signature is None or "num_training_steps" in signature.parameters
    steps = {"num_training_steps": num_steps} if asks else {}
    return instantiate(node, optimizer, path="lr_scheduler", **steps)
