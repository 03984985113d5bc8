"""Optimizer and learning-rate schedule from their config nodes."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, first_line, instantiate, signature_of
from moe_builders.training.param_groups import group_parameters

_NUMBERS = ("lr", "weight_decay", "eps")
_COSINE = "torchtune.training.get_cosine_schedule_with_warmup"
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
        InputError: torch's optimizers on bf16 weights, torchao's by their own name, what is no
            optimizer or wants what a step here does not give, arguments not taken, or a rule that
            matches nothing or says what cannot differ between groups.
    """
    rules = param_groups or ()
    component = component_of(node, path="optimizer")
    _check_kind(component, model)
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

    Raises:
        InputError: no schedule, or one that wants more than the number of the step.
    """
    if node is None:
        return None
    component = component_of(node, path="lr_scheduler")
    signature = signature_of(component)
    asks = signature is None or "num_training_steps" in signature.parameters
    steps = {"num_training_steps": num_steps} if asks else {}
    try:
        scheduler = instantiate(node, optimizer, path="lr_scheduler", **steps)
    except TypeError as error:
        raise _no_schedule(component) from error
    if isinstance(scheduler, Optimizer) or not callable(getattr(scheduler, "step", None)):
        raise _no_schedule(component)
    wanted = _required(scheduler.step)
    if wanted:
        raise InputError(
            f"lr_scheduler {component.__name__} asks for {wanted[0]} at each step, which no "
            f"schedule gets here: name one that needs nothing, such as {_COSINE}"
        )
    with warnings.catch_warnings():
        # torch expects an optimizer step before each of the schedule's
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(done):
            scheduler.step()
    return scheduler


def describe_schedule(node: Mapping[str, Any] | None, *, num_steps: int) -> list[str]:
    """What is worth saying of a schedule: a warm-up that the run does not outlast."""
    warmup = node.get("num_warmup_steps") if node is not None else None
    if not isinstance(warmup, int) or warmup < num_steps:
        return []
    return [
        f"lr_scheduler.num_warmup_steps is {warmup}, but the run has {num_steps} steps: it never "
        "reaches optimizer.lr"
    ]


def _no_schedule(component: Any) -> InputError:
    name = getattr(component, "__name__", component)
    return InputError(
        f"lr_scheduler._component_ names {name}, which makes no schedule of an optimizer: name one "
        f"that does, such as {_COSINE}"
    )


def _required(step: Callable[..., Any]) -> list[str]:
    """Arguments without which a method cannot be called."""
    signature = signature_of(step)
    if signature is None:
        return []
    return [
        p.name for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name != "self"
    ]  # fmt: skip


def _check_kind(component: Any, model: nn.Module) -> None:
    """Optimizers that could not take a single step here."""
    name = getattr(component, "__name__", str(component))
    if not inspect.isclass(component):
        return  # a function may build anything: it is asked afterwards
    if not issubclass(component, Optimizer):
        raise _no_optimizer(name)
    if _required(component.step):
        raise InputError(
            f"optimizer {name} computes the loss several times a step (it asks for a closure), "
            "which no step does here: name another, such as torch.optim.AdamW"
        )
    if issubclass(component, torch.optim.SparseAdam):
        raise InputError(
            f"optimizer {name} takes sparse gradients alone, but those of a language model are "
            "dense: name another, such as torch.optim.AdamW"
        )
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    other = next((n for n, shape in shapes.items() if len(shape) != 2), None)
    if name == "Muon" and other is not None:
        raise InputError(
            f"optimizer {name} takes matrices alone, but {other} is {shapes[other]} (norms are "
            "vectors, experts are stacks of matrices): name one that takes all, such as "
            "torch.optim.AdamW"
        )


def _no_optimizer(name: str) -> InputError:
    return InputError(
        f"optimizer._component_ names {name}, which is no optimizer: name one, such as "
        "torch.optim.AdamW"
    )


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
    component = component_of(node, path=path)
    _check_numbers(node, component, path)
    try:
        optimizer = instantiate(node, parameters, path=path)
    except TypeError as error:  # torch compares a rate with 0 before it asks what it is
        if not inspect.isclass(component):
            raise _no_optimizer(getattr(component, "__name__", str(component))) from error
        raise InputError(f"{path}: {first_line(error)}") from error
    if not isinstance(optimizer, Optimizer):
        raise _no_optimizer(getattr(component, "__name__", str(component)))
    return optimizer


def _check_numbers(node: Mapping[str, Any], component: Any, path: str) -> None:
    """torch takes what is no number, and NaN; some own defaults are null."""
    signature = signature_of(component)
    known = {} if signature is None else signature.parameters
    for key in _NUMBERS:
        value = node.get(key)
        if isinstance(value, str):
            raise InputError(f"{path}.{key} is the text {value!r}, but must be a number")
        if key in node and value is None and key in known and known[key].default is not None:
            raise InputError(
                f"{path}.{key} is null, but must be a number: set it, or take it out "
                f"(~{path}.{key})"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}.{key} is {value}, but must be a finite number")
    betas, default = node.get("betas"), known["betas"].default if "betas" in known else None
    wanted = len(default) if isinstance(default, tuple) else None
    if "betas" in node and not (
        isinstance(betas, list) and all(map(_is_number, betas)) and wanted in (None, len(betas))
    ):
        raise InputError(
            f"{path}.betas is {betas!r}, but must be a list of {wanted or ''} numbers, such as "
            f"{list(default or (0.9, 0.999))}".replace("  ", " ")
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
