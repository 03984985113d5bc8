"""Router, noise, capacity and bias rule laid over a built model; learning after a step."""

import copy

import pytest
import torch
from helpers import assert_near
from torch import nn

from moe_builders.errors import InputError
from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.generic import moe_transformer
from moe_builders.moe import collect_routing, moe_layers
from moe_builders.router_control import (
    control_routers,
    replace_routers,
    tally_routers,
    teach_routers,
)
from moe_builders.routers import HashRouter, SinkhornRouter, TokenChoiceTopKRouter

NO_BIAS = {"update_rate": 0.0, "rule": "sign", "recenter": False}
PLAIN = {
    "capacity_factor": None, "eval_capacity_factor": None, "min_capacity": 4,
    "capacity_scope": "sequence", "drop": "position", "pad_to_capacity": False, "jitter": "none",
    "jitter_scale": 0.0,
}  # fmt: skip


def routers_of(model):
    return [layer.router for _, layer in moe_layers(model)]


def small(**changes):
    arguments = {
        "vocab_size": 50, "embed_dim": 16, "num_layers": 3, "num_heads": 2, "num_experts": 4,
        "experts_per_token": 2, "expert_hidden_dim": 8, "max_seq_len": 32,
    } | changes  # fmt: skip
    return moe_transformer(**arguments)


def test_a_router_is_filled_in_from_the_model():
    model = qwen3_moe_tiny(vocab_size=50)
    replace_routers(model, {"_component_": "moe_builders.routers.HashRouter",
                            "experts_per_token": 3})  # fmt: skip
    for router in routers_of(model):
        assert isinstance(router, HashRouter)
        assert (router.num_experts, router.experts_per_token) == (8, 3)
        assert router.gate.in_features == 64
    model(torch.randint(0, 50, (2, 7)))


def test_layers_share_no_router():
    model = qwen3_moe_tiny()
    replace_routers(model, {"_component_": "moe_builders.routers.SinkhornRouter"})
    first, second = routers_of(model)
    assert isinstance(first, SinkhornRouter)
    assert first.gate.weight.data_ptr() != second.gate.weight.data_ptr()


def test_a_router_on_the_meta_device_stays_there():
    with torch.device("meta"):
        model = qwen3_moe_tiny()
    replace_routers(model, {"_component_": "moe_builders.routers.TokenChoiceTopKRouter"})
    assert all(p.is_meta for p in model.parameters())
    assert all(r.experts_per_token == 2 for r in routers_of(model))


@pytest.mark.parametrize(
    ("component", "sentence"),
    [
        ({"_component_": "moe_builders.routers.TokenChoiceTopKRouter", "num_experts": 4},
         r"built a TokenChoiceTopKRouter for 4 experts, but layers.0.mlp has 8: leave num_experts"),
        ({"_component_": "torch.nn.Identity"}, r"built a Identity, which is no router: a rou"),
        ({"_component_": "SinkhornRouter"}, r"path, such as moe_builders.routers.SinkhornRouter$"),
        ({"_component_": "sinkhorn"}, r"path, such as moe_builders.routers.SinkhornRouter$"),
        ({"_component_": "expert_choice"}, r"such as moe_builders.routers.ExpertChoiceTopKRouter$"),
        ({"_component_": "xyz"}, r"such as moe_builders.routers.TokenChoiceTopKRouter$"),
        ({"_component_": "moe_builders.routers.Sinkhorn"}, r"did you mean 'SinkhornRouter'"),
        ({"_component_": "moe_builders.routers.SinkhornRouter", "dim": 7},
         r"the SinkhornRouter's dim is 7, but its tokens have \d+: give it dim="),
        ("moe_builders.routers.HashRouter", r"here router: {_component_: moe_builders.routers.Ha"),
        ({"_component_": "moe_builders.routers.Nothing"}, r"router._component_ is"),
        ({"_component_": "moe_builders.routers.TokenChoiceTopKRouter", "topk": 2},
         r"unknown key router.topk"),
    ],
)  # fmt: skip
def test_a_wrong_router_is_refused(component, sentence):
    with pytest.raises(InputError, match=sentence):
        replace_routers(qwen3_moe_tiny(), component)


def test_a_model_without_experts_takes_no_router():
    model = small(dense_layers=[0, 1, 2], intermediate_dim=8)
    with pytest.raises(InputError, match="no MoE layer"):
        replace_routers(model, {"_component_": "moe_builders.routers.HashRouter"})


def test_jitter_reaches_every_gate_and_only_in_training():
    model = small()
    tokens = torch.randint(0, 50, (2, 9))
    control_routers(model, PLAIN | {"jitter": "logit_gaussian", "jitter_scale": 0.5}, NO_BIAS)
    logits = []
    for _ in range(2):
        model(tokens)
        logits.append([r.logits for r in collect_routing(model).values()])
    assert all(not torch.equal(a, b) for a, b in zip(*logits, strict=True))
    model.eval()
    model(tokens)
    first = collect_routing(model)["layers.0.mlp"].logits
    model(tokens)
    assert torch.equal(collect_routing(model)["layers.0.mlp"].logits, first)


def test_a_router_without_noise_says_so():
    model = small()
    replace_routers(model, {"_component_": "moe_builders.routers.HashRouter"})
    with pytest.raises(InputError, match=r"HashRouter\) takes no noise"):
        control_routers(model, PLAIN | {"jitter": "gumbel", "jitter_scale": 1.0}, NO_BIAS)


def test_capacity_holds_in_every_layer_in_training_and_not_in_evaluation():
    model = small()
    control_routers(model, PLAIN | {"capacity_factor": 0.5, "min_capacity": 1}, NO_BIAS)
    tokens = torch.randint(0, 50, (1, 32))
    model(tokens)
    for routing in collect_routing(model).values():
        assert int(routing.num_tokens_per_expert.max()) <= 8  # 32 · 2 · 0.5 / 4
    model.eval()
    model(tokens)
    for routing in collect_routing(model).values():
        assert int(routing.num_tokens_per_expert.sum()) == 64


@pytest.mark.parametrize("key", ["capacity_factor", "eval_capacity_factor"])
def test_where_experts_choose_no_capacity_is_laid_over(key):
    model = small()
    replace_routers(model, {"_component_": "moe_builders.routers.ExpertChoiceTopKRouter"})
    with pytest.raises(InputError, match=rf"routing.{key} is 1.5, but in layers.0.mlp experts"):
        control_routers(model, PLAIN | {key: 1.5}, NO_BIAS)
    assert all(layer.capacity is None for _, layer in moe_layers(model))


def test_the_bias_rule_needs_a_bias():
    with pytest.raises(InputError, match="no router has a selection-only bias"):
        control_routers(small(), PLAIN, NO_BIAS | {"update_rate": 0.01})


def test_routers_learn_once_from_a_whole_step():
    """Two micro-batches, three layers: the sign rule on their common load, layer by layer."""
    torch.manual_seed(0)
    model = small(expert_bias=True)
    control_routers(model, PLAIN, NO_BIAS | {"update_rate": 0.01})
    tally, loads = 0.0, [0, 0, 0]
    for _ in range(2):
        model(torch.randint(0, 50, (3, 11)))
        tally = tally + tally_routers(model)
        for layer, routing in enumerate(collect_routing(model).values()):
            loads[layer] = loads[layer] + routing.num_tokens_per_expert
    assert all(not router.expert_bias.any() for router in routers_of(model)), "forwards move none"
    teach_routers(model, tally)
    for router, load in zip(routers_of(model), loads, strict=True):
        load = load.double()
        assert_near(router.expert_bias.double(), 0.01 * (load.mean() - load).sign(), 1e-6)


def test_nothing_is_tallied_where_nothing_learns():
    model = small(expert_bias=True)
    model(torch.randint(0, 50, (1, 5)))
    assert tally_routers(model).shape == (0,)
    before = copy.deepcopy(model.state_dict())
    teach_routers(model, tally_routers(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_lies_where_the_routing_lies():
    """Not on the host: what is added up of a step is on the device that trains."""
    with torch.device("meta"):
        model = small(router=SinkhornRouter(dim=16, num_experts=4, experts_per_token=2))
    model(torch.zeros(1, 5, dtype=torch.int64, device="meta"))
    assert tally_routers(model).device.type == "meta"


class TestGenericBuilder:
    def test_the_pattern_of_dense_layers(self):
        model = small(num_layers=6, moe_every_n_layers=2, dense_layers=[1], intermediate_dim=24)
        assert [name for name, _ in moe_layers(model)] == ["layers.3.mlp", "layers.5.mlp"]
        assert model.layers[0].mlp.w1.out_features == 24

    def test_copies_of_a_router_start_apart(self):
        router = TokenChoiceTopKRouter(dim=16, num_experts=4, experts_per_token=2)
        first, second, third = routers_of(small(router=router))
        assert first is not router
        assert torch.equal(first.gate.weight, router.gate.weight)
        assert not torch.equal(second.gate.weight, third.gate.weight)
        assert not torch.equal(second.gate.weight, first.gate.weight)

    def test_gate_biases_of_copies_start_at_zero_too(self):
        router = TokenChoiceTopKRouter(dim=16, num_experts=4, experts_per_token=2, gate_bias=True)
        assert not any(own.gate.bias.any() for own in routers_of(small(router=router)))

    def test_a_router_per_layer(self):
        def router(layer):
            return TokenChoiceTopKRouter(dim=16, num_experts=4, experts_per_token=layer + 1)

        assert [r.experts_per_token for r in routers_of(small(router=router))] == [1, 2, 3]

    def test_latent_experts_shared_experts_and_one_head_dim(self):
        model = small(latent_dim=8, shared_hidden_dim=12, shared_gate=True, head_dim=10)
        layer = model.layers[0].mlp
        assert layer.experts.dim == 8
        assert layer.router.gate.in_features == 16
        logits = model(torch.randint(0, 50, (2, 6)))
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"moe_every_n_layers": 0}, "moe_every_n_layers is 0, but must be at least 1"),
            ({"dense_layers": [1]}, r"layers \[1\] are dense: give intermediate_dim"),
            ({"dense_layers": [0, 3, -1], "intermediate_dim": 8},
             r"dense_layers holds \[-1, 3\], but layers are 0 to 2"),
            ({"router": "sinkhorn"}, r"router is 'sinkhorn', but must be a router, or a function"),
            ({"router": SinkhornRouter(dim=8, num_experts=4, experts_per_token=2)},
             r"the SinkhornRouter's dim is 8, but its tokens have 16: give it dim=16"),
            ({"capacity": 1.0}, r"capacity is 1.0, but must be a Capacity: in a config"),
            ({"capacity": {"factor": 1.0}}, r"capacity is {'factor': 1.0}, but must be a Capac"),
            ({"num_heads": 3}, r"num_heads is 3, but must divide embed_dim \(16\)"),
        ],
    )  # fmt: skip
    def test_refused(self, changes, sentence):
        with pytest.raises(InputError, match=sentence):
            small(**changes)

    def test_norms_can_be_left_out(self):
        model = small(qk_norm=False, tie_word_embeddings=True)
        assert sum(isinstance(m, nn.RMSNorm) for m in model.modules()) == 7
