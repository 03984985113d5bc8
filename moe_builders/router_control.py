"""What a run lays over a model's routers: another router, noise, capacity, learning after a step.

Letters: e num_experts · n numbers that routers tally.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_builders.decoder import MoEDecoder
from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, instantiate, signature_of
from moe_builders.moe import MoE
from moe_builders.routers.bias import BiasRule, check_bias_rule
from moe_builders.routers.capacity import Capacity
from moe_builders.routers.gate import Jitter
from moe_builders.routing import LearningRouter


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """(name, layer) of every MoE, in layer order."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield name, module


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
        if not hasattr(router, "forward") or there != wanted:
            raise InputError(
                f"router._component_ built a {type(router).__name__} for {there} experts, but "
                f"{name} has {wanted}: leave num_experts out and it is filled in"
            )
        layer.router = router


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
        for _, layer in moe_layers(model):
            layer.capacity = capacity
    if expert_bias["update_rate"] > 0:
        set_bias_rule(model, BiasRule(**expert_bias))


def set_jitter(model: nn.Module, jitter: Jitter) -> None:
    """Noise on the gates of all layers while they train.

    Raises:
        InputError: a router that has no place for noise.
    """
    for name, layer in moe_layers(model):
        if not hasattr(layer.router, "jitter"):
            raise InputError(
                f"routing.jitter is {jitter.kind}, but the router of {name} "
                f"({type(layer.router).__name__}) takes no noise: set routing.jitter=none"
            )
        layer.router.jitter = jitter  # pyright: ignore[reportAttributeAccessIssue]


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
    tallies = [
        layer.router.tally(layer.last_routing)
        for _, layer in moe_layers(model)
        if isinstance(layer.router, LearningRouter) and layer.last_routing is not None
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
