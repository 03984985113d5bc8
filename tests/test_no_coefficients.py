"""Coefficients live in the recipe: a module that is given one says so with a TypeError."""

import inspect

import pytest

import moe_builders.routers
from moe_builders import GroupedExperts, MoE, moe_decoder, moe_experts, moe_layer
from moe_builders.routers import TokenChoiceTopKRouter

KEYS = ["load_balancing_coef", "z_coef", "aux_loss_coeff", "router_aux_loss_coef"]
ROUTERS = [
    getattr(moe_builders.routers, name)
    for name in moe_builders.routers.__all__
    if name.endswith("Router")
]
SIZES = {"embed_dim": 4, "expert_hidden_dim": 4, "num_experts": 4}


@pytest.mark.parametrize("key", KEYS)
def test_modules_and_builders_take_none(key):
    experts = {"dim": 4, "hidden_dim": 4, "num_experts": 4}
    router = {"dim": 4, "num_experts": 4, "experts_per_token": 2}
    whole = {"router": TokenChoiceTopKRouter(**router), "experts": GroupedExperts(**experts)}
    for build, arguments in (
        (TokenChoiceTopKRouter, router),
        (GroupedExperts, experts),
        (MoE, whole),
        (moe_layer, SIZES),
        (moe_experts, SIZES),
    ):
        build(**arguments)
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
            build(**arguments, **{key: 0.1})


@pytest.mark.parametrize("component", [*ROUTERS, MoE, GroupedExperts, moe_layer, moe_decoder])
def test_no_signature_swallows_what_it_does_not_know(component):
    taken = inspect.signature(component).parameters.values()
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in taken)
    assert not {parameter.name for parameter in taken} & set(KEYS)
