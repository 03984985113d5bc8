"""What no key of a configuration can tell alone: keys that need each other, or exclude each other.

Everything that can be said before a model is built is said here.
"""

import math
from typing import TYPE_CHECKING

from moe_builders.errors import InputError
from moe_builders.training.objective import check_form
from moe_builders.training.renamed import refuse_coefficients

if TYPE_CHECKING:
    from moe_builders.training.config import RecipeConfig


def check_together(config: "RecipeConfig") -> None:
    """Hold the keys against each other.

    Raises:
        InputError: the first that do not go together, and what to change.
    """
    if config.seed >= 2**63:
        raise InputError(f"seed is {config.seed}, but must be below 2**63")
    _check_routing(config)
    _check_stepping(config)
    _check_experts(config)
    _check_validation(config)


def _check_routing(config: "RecipeConfig") -> None:
    losses, bias, routing = config.router_losses, config.expert_bias, config.routing
    refuse_coefficients(config.model, "model")
    refuse_coefficients(config.router, "router")
    if losses.global_exact and losses.load_balancing_scope != "global":
        raise InputError(
            "router_losses.global_exact goes with router_losses.load_balancing_scope=global"
        )
    check_form(
        form=losses.load_balancing_form,
        on=losses.load_balancing_on,
        scope=losses.load_balancing_scope,
    )
    if bias.update_rate > 0 and config.freeze_router:
        raise InputError(
            f"expert_bias.update_rate is {bias.update_rate}, but freeze_router keeps the routers "
            "as they are: set expert_bias.update_rate=0, or freeze_router=false"
        )
    if bias.rule == "quantile" and not 0 < bias.update_rate <= 1:
        raise InputError(
            f"expert_bias.update_rate is {bias.update_rate}, but must be above 0 and at most 1 "
            "with expert_bias.rule=quantile: it is the part of the way that a step goes"
        )
    if routing.jitter == "none" and routing.jitter_scale > 0:
        raise InputError(
            f"routing.jitter_scale is {routing.jitter_scale}, but routing.jitter is none: choose a "
            "kind of noise, or set routing.jitter_scale=0"
        )
    if routing.jitter != "none" and routing.jitter_scale == 0:
        raise InputError(
            f"routing.jitter is {routing.jitter}, but routing.jitter_scale is 0.0: set how much "
            "noise, or routing.jitter=none"
        )
    if routing.pad_to_capacity and routing.capacity_factor is None:
        raise InputError(
            "routing.pad_to_capacity needs a capacity: set routing.capacity_factor too, or "
            "routing.pad_to_capacity=false"
        )
    if routing.pad_to_capacity and routing.capacity_scope != "micro":
        raise InputError(
            "routing.pad_to_capacity gives every expert a fixed number of rows in a micro-batch, "
            f"but routing.capacity_scope is {routing.capacity_scope}: set it to micro"
        )
    if routing.capacity_factor is None and routing.eval_capacity_factor is None:
        usual = type(routing)()
        for key in ("min_capacity", "capacity_scope", "drop"):
            value = getattr(routing, key)
            if value != getattr(usual, key):
                raise InputError(
                    f"routing.{key} is {value}, but there is no capacity: set "
                    f"routing.capacity_factor, or leave routing.{key} out"
                )
    if bias.recenter and bias.update_rate == 0:
        raise InputError(
            "expert_bias.recenter is true, but no bias moves: set expert_bias.update_rate, or "
            "leave expert_bias.recenter out"
        )
    for key in ("capacity_factor", "eval_capacity_factor"):
        if getattr(routing, key) == math.inf:
            raise InputError(f"routing.{key} is inf, but must be finite, or null for no limit")


def _check_stepping(config: "RecipeConfig") -> None:
    if config.optimizer_in_bwd and config.gradient_accumulation_steps > 1:
        raise InputError(
            "optimizer_in_bwd frees each gradient as it comes, so "
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, but must be 1: "
            "raise batch_size instead"
        )
    if config.optimizer_in_bwd and config.clip_grad_norm is not None:
        raise InputError(
            "optimizer_in_bwd steps before the gradients' norm is known, so clip_grad_norm is "
            f"{config.clip_grad_norm}, but must be null: set clip_grad_norm=null"
        )
    if config.ac_mode != "full" and not config.enable_activation_checkpointing:
        raise InputError(
            f"ac_mode is {config.ac_mode}, but nothing is recomputed: set "
            "enable_activation_checkpointing=true too"
        )
    if config.enable_activation_offloading and not config.enable_activation_checkpointing:
        raise InputError(
            "enable_activation_offloading moves what activation checkpointing keeps: set "
            "enable_activation_checkpointing=true too"
        )


def _check_experts(config: "RecipeConfig") -> None:
    liger = config.expert_backend == "liger"
    whole = config.enable_activation_checkpointing and config.ac_mode == "full"
    if config.recompute_up and whole:
        raise InputError(
            "recompute_up makes again in backward what a recomputed layer has made just before: "
            "set ac_mode=selective, or recompute_up=false"
        )
    if config.recompute_up and liger:
        raise InputError(
            "recompute_up is of the package's own experts, but expert_backend is liger: set "
            "expert_backend=auto, or recompute_up=false"
        )
    if liger and config.ep > 1:
        raise InputError(
            f"expert_backend is liger, whose experts are all on one process, but ep is {config.ep}:"
            " set expert_backend=auto, or ep=1"
        )
    if liger and config.deterministic:
        raise InputError(
            "expert_backend is liger, which adds up gradients in no fixed order: set "
            "expert_backend=auto, or deterministic=false"
        )


def _check_validation(config: "RecipeConfig") -> None:
    for key in ("run_val_every_n_steps", "early_stop_patience"):
        value = getattr(config, key)
        if value is not None and config.dataset_val is None:
            raise InputError(
                f"{key} is {value}, but there is nothing to validate on: set dataset_val, or "
                f"{key}=null"
            )
    if config.early_stop_patience is not None and config.run_val_every_n_steps is None:
        raise InputError(
            f"early_stop_patience is {config.early_stop_patience}, but nothing is validated during "
            "the run: set run_val_every_n_steps, or early_stop_patience=null"
        )
