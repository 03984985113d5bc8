"""Which parameters learn, in which groups: by hand on a model with every kind of name."""

import pytest
import torch
from torch import nn

from moe_builders.decoder import moe_decoder
from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.moe import MoE
from moe_builders.routers.token_choice import TokenChoiceTopKRouter
from moe_builders.training.optimizer import build_optimizer, build_scheduler
from moe_builders.training.param_groups import (
    MATRICES,
    SMALL,
    freeze,
    group_parameters,
    is_small,
    learning_rates,
)

ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1}


@pytest.fixture
def net():
    return qwen3_moe_tiny(vocab_size=16)


def names_of(net, group):
    known = {id(p): name for name, p in net.named_parameters()}
    return [known[id(p)] for p in group["params"]]


def with_biases():
    """A decoder whose experts, router and attention have biases, its router one level deeper."""

    class Deeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 4
            self.router = TokenChoiceTopKRouter(
                dim=8, num_experts=4, experts_per_token=1, gate_bias=True)  # fmt: skip

    experts = GroupedExperts(dim=8, hidden_dim=4, num_experts=4, activation="swiglu", bias=True)
    return moe_decoder(vocab_size=8, embed_dim=8, num_layers=2, num_heads=2, head_dim=4,
                       max_seq_len=8, attention=nn.Linear(8, 8),
                       mlp=MoE(router=Deeper(), experts=experts))  # fmt: skip


def test_norms_biases_and_routers_are_a_group_without_decay(net):
    matrices, small = build_optimizer(ADAMW, net).param_groups
    assert (matrices["name"], small["name"]) == (MATRICES, SMALL)
    assert (matrices["weight_decay"], small["weight_decay"]) == (0.1, 0.0)
    kept = names_of(net, small)
    assert all("norm" in name or ".router." in name for name in kept)
    assert [n for n in kept if "router" in n] == [
        "layers.0.mlp.router.gate.weight", "layers.1.mlp.router.gate.weight"]  # fmt: skip
    assert "layers.0.mlp.experts.gate_up_proj" in names_of(net, matrices)
    assert "tok_embeddings.weight" in names_of(net, matrices)
    assert len(kept) + len(matrices["params"]) == len(list(net.parameters()))


def test_a_bias_per_expert_is_a_bias_and_a_router_may_lie_deeper():
    net = with_biases()
    small = {name for name, p in net.named_parameters() if is_small(name, p)}
    layer = {"attn.bias", "sa_norm.weight", "mlp_norm.weight", "mlp.router.router.gate.weight",
             "mlp.router.router.gate.bias", "mlp.experts.gate_up_bias",
             "mlp.experts.down_bias"}  # fmt: skip
    assert small == {f"layers.{i}.{n}" for i in range(2) for n in layer} | {"norm.weight"}
    assert net.layers[0].mlp.experts.gate_up_bias.ndim == 2
    freeze(net, [], freeze_router=True)
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in small if "router" in n}


def test_a_scale_per_expert_is_small():
    """Decay would pull it from 1 to 0; it has two dims only because it is stacked."""
    scale = torch.ones(4, 8)
    assert is_small("layers.0.mlp.experts.hidden_scale", scale)
    assert is_small("layers.0.mlp.experts.3.hidden_scale", scale[0])
    assert not is_small("layers.0.mlp.experts.down_proj", scale)


def test_the_first_rule_that_matches_wins_and_small_ones_stay_apart(net):
    rules = [
        {"match": "router", "lr": 1e-6},
        {"match": r"layers\.1\.", "lr": 1e-4, "weight_decay": 0.2},
        {"match": r"attn|router", "weight_decay": 0.3},
    ]
    groups = build_optimizer(ADAMW, net, param_groups=rules).param_groups
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert found == {
        "matrices": (1e-3, 0.1),
        "norms, biases, router": (1e-3, 0.0),
        "router: norms, biases, router": (1e-6, 0.0),
        r"layers\.1\.: matrices": (1e-4, 0.2),
        r"layers\.1\.: norms, biases, router": (1e-4, 0.2),  # the rule says it
        "attn|router: matrices": (1e-3, 0.3),
        "attn|router: norms, biases, router": (1e-3, 0.3),
    }
    assert list(found)[:2] == ["matrices", "norms, biases, router"]
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    by_name = {g["name"]: names_of(net, g) for g in groups}
    assert all(n.startswith("layers.0.attn") for n in by_name["attn|router: matrices"])
    assert "layers.1.mlp.router.gate.weight" in by_name["router: norms, biases, router"]
    again = build_optimizer(ADAMW, net, param_groups=rules).param_groups
    assert [names_of(net, g) for g in groups] == [names_of(net, g) for g in again]


def test_an_optimizer_without_decay_gets_none(net):
    groups = group_parameters(net, [], small_defaults={})
    assert all(set(group) == {"params", "name"} for group in groups)
    lbfgs_like = build_optimizer({"_component_": "torch.optim.Rprop", "lr": 0.1}, net)
    assert all("weight_decay" not in group for group in lbfgs_like.param_groups)


def test_frozen_parameters_are_in_no_group(net):
    freeze(net, ["tok_embeddings", r"attn\..*norm"], freeze_router=True)
    inside = [n for g in build_optimizer(ADAMW, net).param_groups for n in names_of(net, g)]
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert sorted(inside) == sorted(trained)
    assert not [n for n in inside if "router" in n or "tok_" in n or "q_norm" in n]
    assert "layers.0.sa_norm.weight" in inside


@pytest.mark.parametrize(
    ("patterns", "router", "message"),
    [
        (["rooter"], False, r"^freeze\[0\] 'rooter' is found in no parameter's name \(near are: "
         r"layers.0.mlp.router.gate.weight, layers.1.mlp.router.gate.weight\)$"),
        (["attn", "12345"], False, r"^freeze\[1\] '12345' .*\(names look like: layers.0.attn.*, …"),
        (["layers.(0"], False, r"^freeze\[0\] is 'layers.\(0', which is no regex: missing \)"),
        (["."], False, "freeze all [0-9]+ parameters: leave some to learn"),
        (["layers", "norm", "tok_", "out"], True, "leave some to learn"),
    ],
)  # fmt: skip
def test_a_freeze_that_cannot_be_meant(net, patterns, router, message):
    with pytest.raises(InputError, match=message) as caught:
        freeze(net, patterns, freeze_router=router)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in net.parameters()), "nothing was touched"


def test_freeze_router_needs_one():
    with pytest.raises(InputError, match="no layer has a module named router"):
        freeze(nn.Linear(2, 2), [], freeze_router=True)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "roter", "lr": 1}], r"param_groups\[0\].match 'roter' is found in no "
         r"parameter's name \(near are: layers.0.mlp.router"),
        ([{"match": "router"}, {"match": "router.gate", "lr": 1.0}],
         r"\[1\].match 'router.gate' is found only in names that an earlier rule takes"),
        ([{"match": "^output", "lr": 1.0}],
         r"\[0\].match '\^output' is found only in names of frozen parameters \(output.weight\)"),
        ([{"match": "(", "lr": 1.0}], r"param_groups\[0\].match is '\(', which is no regex"),
        ([{"lr": 1.0}], r"param_groups\[0\] is {'lr': 1.0}, but must be match: <regex of names>"),
        (["router"], r"param_groups\[0\] is 'router', but must be match"),
        ([{"match": "attn", "lrr": 1.0}], r"unknown key param_groups\[0\].lrr \(did you mean 'lr'"),
        ([{"match": "attn", "lr": -1.0}], r"param_groups\[0\]: AdamW: Invalid learning rate: -1.0"),
        ([{"match": "attn"}, {"match": "mlp", "lr": "high"}],
         r"param_groups\[1\].lr is the text 'high', but must be a number"),
        ([{"match": "attn", "fused": 3}], r"param_groups\[0\].fused is 3, but must be true"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_meant(net, rules, message):
    freeze(net, ["^output"])
    with pytest.raises(InputError, match=message) as caught:
        build_optimizer(ADAMW, net, param_groups=rules)
    assert "\n" not in str(caught.value)


def test_what_cannot_differ_between_groups(net):
    node = {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 1e-3}
    rules = [{"match": "attn", "block_size": 64}]
    with pytest.raises(InputError, match=r"param_groups\[0\].block_size cannot differ between gr"):
        build_optimizer(node, net, param_groups=rules)


def test_a_mistake_of_the_optimizers_own_node_is_said_of_it(net):
    with pytest.raises(InputError, match=r"^optimizer: AdamW: Invalid learning rate: -2"):
        build_optimizer(ADAMW | {"lr": -2.0}, net, param_groups=[{"match": "attn", "eps": 1.0}])


def test_rates_of_groups_follow_the_schedule_in_proportion(net):
    rules = [{"match": "router", "lr": 1e-5}, {"match": "tok_", "weight_decay": 0.0}]
    optimizer = build_optimizer(ADAMW, net, param_groups=rules)
    schedule = {"_component_": "torchtune.training.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 2}  # fmt: skip
    scheduler = build_scheduler(schedule, optimizer, num_steps=10)
    for step, share in enumerate((0.0, 0.5, 1.0)):
        rates = learning_rates(optimizer)
        assert rates == pytest.approx({"lr": 1e-3 * share, "lr/router": 1e-5 * share}), step
        optimizer.step()
        scheduler.step()


def test_decay_reaches_matrices_alone(net):
    """With gradients of zero AdamW changes what it decays and nothing else."""
    optimizer = build_optimizer(ADAMW, net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        wanted = before[name] * (1 if is_small(name, parameter) else 1 - 1e-3 * 0.1)
        torch.testing.assert_close(parameter, wanted, rtol=1e-7, atol=0)
