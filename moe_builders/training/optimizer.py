"""Optimizer and learning-rate schedule from their config nodes."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, first_line, instantiate, signature_of
from moe_builders.training.param_groups import group_parameters

_NUMBERS = ("lr", "weight_decay", "eps")
_SMALL_DEFAULTS = {"weight_decay": 0.0, "quantize": False}  # of those that know the argument


def build_optimizer(
    node: Mapping[str, Any],
    model: nn.Module,
    *,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
) -> Optimizer:
    """An optimizer over all parameters that take a gradient, in groups.

    Norms, biases and routers are not decayed and, by the optimizers of ``low_bit``, not quantised,
    unless a rule of ``param_groups`` says so; see ``param_groups.group_parameters``.

    Args:
        node: component; gets the groups.
        model: sharded or not.
        param_groups: rules {"match": regex of names, argument of the optimizer: value, ...}.

    Raises:
        InputError: torch's optimizers on bf16 weights, torchao's by their own name, arguments not
            taken, or a rule that matches nothing or says what cannot differ between groups.
    """
    rules = param_groups or ()
    component = component_of(node, path="optimizer")
    _check_weights(node, component, model)
    signature = signature_of(component)
    takes = () if signature is None else signature.parameters
    groups = group_parameters(
        model, rules, small_defaults={k: v for k, v in _SMALL_DEFAULTS.items() if k in takes}
    )
    _check_rules(node, rules)
    return _instantiate(node, groups, path="optimizer")


def build_scheduler(
    node: Mapping[str, Any] | None, optimizer: Optimizer, *, num_steps: int, done: int = 0
) -> LRScheduler | None:
    """A schedule over the run's optimizer steps; None for a constant rate.

    Args:
        node: torchtune's get_cosine_schedule_with_warmup, or anything that takes an optimizer
            (and ``num_training_steps``, if it has that argument).
        optimizer: whose rates it sets, each group's in proportion to the group's own.
        num_steps: of the whole run.
        done: steps of it that lie behind; the schedule is walked up to there, so that a run that
            goes on has the rates of the configuration of now.
    """
    if node is None:
        return None
    signature = signature_of(component_of(node, path="lr_scheduler"))
    asks = signature is None or "num_training_steps" in signature.parameters
    steps = {"num_training_steps": num_steps} if asks else {}
    scheduler = instantiate(node, optimizer, path="lr_scheduler", **steps)
    with warnings.catch_warnings():
        # torch expects an optimizer step before each of the schedule's
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(done):
            scheduler.step()
    return scheduler


def _check_weights(node: Mapping[str, Any], component: Any, model: nn.Module) -> None:
    package = str(getattr(component, "__module__", "")).partition(".")[0]
    name = node["_component_"]
    if package == "torchao":
        # its stochastic rounding mixes plain and sharded tensors and fails in the first step; its
        # small states get bf16 of bf16 weights, unnoticed
        raise InputError(
            f"optimizer {name} does not know of sharded bf16 weights: name "
            "moe_builders.training.low_bit.AdamW8bit, AdamW4bit or AdamW, which are built on it"
        )
    narrow = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    if package == "torch" and narrow:  # they write an update into the weights as it is
        raise InputError(
            f"param_dtype=bf16 with {name} would round most updates away: set param_dtype=fp32 "
            "(with compute_dtype=bf16), or an optimizer that rounds stochastically "
            "(moe_builders.training.low_bit.AdamW, AdamW8bit or AdamW4bit)"
        )


def _check_rules(node: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> None:
    """The optimizer itself says what it takes: throw-away ones of a single number."""
    for number, rule in enumerate(rules):
        whole = _instantiate(node, [nn.Parameter(torch.zeros(1))], path="optimizer")
        path, own = f"param_groups[{number}]", {k: v for k, v in rule.items() if k != "match"}
        _instantiate({**node, **own}, [nn.Parameter(torch.zeros(1))], path=path)
        for key in own:
            if key not in whole.defaults:
                raise InputError(
                    f"{path}.{key} cannot differ between groups: set optimizer.{key}; groups may "
                    f"differ in {', '.join(whole.defaults)}"
                )


def _instantiate(node: Mapping[str, Any], parameters: Sequence[Any], *, path: str) -> Optimizer:
    for key in _NUMBERS:
        if isinstance(node.get(key), str):
            raise InputError(f"{path}.{key} is the text {node[key]!r}, but must be a number")
    try:
        return instantiate(node, parameters, path=path)
    except TypeError as error:  # torch compares a rate with 0 before it asks what it is
        raise InputError(f"{path}: {first_line(error)}") from error
