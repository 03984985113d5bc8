"""What a run lays over a model's routers: another router, noise, capacity, learning after a step.

Letters: e num_experts · n numbers that routers tally.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from moe_builders import routers
from moe_builders.decoder import MoEDecoder
from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, instantiate, signature_of
from moe_builders.moe import MoE, moe_layers
from moe_builders.routers.bias import BiasRule, check_bias_rule
from moe_builders.routers.capacity import Capacity
from moe_builders.routers.expert_choice import ExpertChoiceTopKRouter
from moe_builders.routers.gate import Jitter, check_gate
from moe_builders.routing import LearningRouter


def find_router(component: Mapping[str, Any] | None) -> None:
    """Look for a router component before any work is done; None is fine.

    Raises:
        InputError: there is none of that name.
    """
    if component is not None:
        _check_name(component)
        component_of(component, path="router")


def replace_routers(model: MoEDecoder, component: Mapping[str, Any]) -> None:
    """Put a new router into every MoE, before the model is filled and sharded.

    ``dim``, ``num_experts``, ``experts_per_token`` and ``vocab_size`` are filled in from the model
    where the component takes them and does not set them. A gate called ``gate`` takes over the
    place of the old one in checkpoints.

    Args:
        model: on the meta device or real.
        component: {"_component_": "package.Router", argument: value, ...}.

    Raises:
        InputError: no MoE, or a component that cannot be built or is no router for these experts.
    """
    layers = list(moe_layers(model))
    if not layers:
        raise InputError("router is set, but the model has no MoE layer: leave router out")
    find_router(component)
    signature = signature_of(component_of(component, path="router"))
    takes = set() if signature is None else set(signature.parameters)
    weight = model.tok_embeddings.weight
    for name, layer in layers:
        known = {
            "dim": model.tok_embeddings.embedding_dim,
            "num_experts": layer.router.num_experts,
            "experts_per_token": getattr(layer.router, "experts_per_token", None),
            "vocab_size": model.tok_embeddings.num_embeddings,
        }
        fill = {
            key: value
            for key, value in known.items()
            if key in takes and key not in component and value is not None
        }
        with weight.device:
            router: Any = instantiate(component, path="router", **fill)
        there, wanted = getattr(router, "num_experts", None), layer.router.num_experts
        if not hasattr(router, "forward") or there is None:
            raise InputError(
                f"router._component_ built a {type(router).__name__}, which is no router: a router "
                "has num_experts and forward(x, info), as those of moe_builders.routers"
            )
        if there != wanted:
            raise InputError(
                f"router._component_ built a {type(router).__name__} for {there} experts, but "
                f"{name} has {wanted}: leave num_experts out and it is filled in"
            )
        check_gate(router, known["dim"])
        layer.router = router


def _check_name(component: Any) -> None:
    """A class's name alone, as one would type it, gets the dotted path of the nearest router."""
    name = component.get("_component_") if isinstance(component, Mapping) else None
    if not isinstance(name, str) or "." in name:
        return
    known = {kind.lower(): kind for kind in routers.__all__}
    typed = name.lower().replace("_", "")
    near = get_close_matches(typed, known, n=1) or get_close_matches(
        f"{typed}router", known, n=1, cutoff=0.8
    )
    raise InputError(
        f"router._component_ is {name!r}, but must be a dotted path, such as "
        f"moe_builders.routers.{known[near[0]] if near else 'TokenChoiceTopKRouter'}"
    )


def control_routers(
    model: nn.Module, routing: Mapping[str, Any], expert_bias: Mapping[str, Any]
) -> None:
    """Lay a configuration's ``routing`` and ``expert_bias`` over all layers.

    Args:
        model: as built; what is not set stays as the model was built with.
        routing: fields of ``training.config.RoutingConfig``.
        expert_bias: fields of ``training.config.ExpertBiasConfig``.

    Raises:
        InputError: a router that cannot do what is asked.
    """
    if routing["jitter"] != "none":
        set_jitter(model, Jitter(routing["jitter"], routing["jitter_scale"]))
    if routing["capacity_factor"] is not None or routing["eval_capacity_factor"] is not None:
        capacity = Capacity(
            factor=routing["capacity_factor"],
            eval_factor=routing["eval_capacity_factor"],
            minimum=routing["min_capacity"],
            scope=routing["capacity_scope"],
            drop=routing["drop"],
            pad=routing["pad_to_capacity"],
        )
        for name, layer in moe_layers(model):
            _check_choices(name, layer, routing)
            layer.capacity = capacity
    if expert_bias["update_rate"] > 0:
        set_bias_rule(model, BiasRule(**expert_bias))


def _check_choices(name: str, layer: MoE, routing: Mapping[str, Any]) -> None:
    """A limit drops choices of tokens; where experts choose there are none to drop."""
    if isinstance(layer.router, ExpertChoiceTopKRouter):
        key = (
            "capacity_factor" if routing["capacity_factor"] is not None else "eval_capacity_factor"
        )
        raise InputError(
            f"routing.{key} is {routing[key]}, but in {name} experts choose tokens "
            f"(ExpertChoiceTopKRouter), whose own capacity_factor says how many: set "
            f"routing.{key}=null"
        )


def set_jitter(model: nn.Module, jitter: Jitter) -> None:
    """Noise on the gates of all layers while they train.

    Raises:
        InputError: a router that has no place for noise.
    """
    for name, layer in moe_layers(model):
        router: Any = layer.router
        if not hasattr(router, "jitter"):
            raise InputError(
                f"routing.jitter is {jitter.kind}, but the router of {name} "
                f"({type(router).__name__}) takes no noise: set routing.jitter=none"
            )
        router.jitter = jitter


def set_bias_rule(model: nn.Module, rule: BiasRule) -> None:
    """How the selection-only biases of all routers that have one learn.

    Raises:
        InputError: no router has an ``expert_bias``, or one cannot follow this rule.
    """
    routers = [layer.router for _, layer in moe_layers(model)]
    biased: list[Any] = [r for r in routers if getattr(r, "expert_bias", None) is not None]
    if not biased:
        raise InputError(
            f"expert_bias.update_rate is {rule.update_rate}, but no router has a selection-only "
            "bias: build the model with expert_bias=true, or set expert_bias.update_rate=0"
        )
    for router in biased:
        check_bias_rule(router, rule)
        router.bias_rule = rule


def tally_routers(model: nn.Module) -> Tensor:
    """[n] fp64, what routers want added up of their last forward; n = 0 where none learns so."""
    routed = [(layer.router, layer.last_routing) for _, layer in moe_layers(model)]
    tallies = [
        # nothing, but on the device that the others are on
        router.tally(routing)
        if isinstance(router, LearningRouter)
        else routing.logits.new_zeros(0, dtype=torch.float64)
        for router, routing in routed
        if routing is not None
    ]
    return torch.cat(tallies) if tallies else torch.zeros(0, dtype=torch.float64)


def teach_routers(model: nn.Module, tally: Tensor) -> None:
    """Let routers learn from a whole step's tallies, once, after the optimizer's step.

    Args:
        model: whose last forward was of that step.
        tally: [n], ``tally_routers`` summed over micro-batches and processes.
    """
    start = 0
    for _, layer in moe_layers(model):
        if isinstance(layer.router, LearningRouter):
            end = start + layer.router.tally_size
            layer.router.learn(tally[start:end])
            start = end
