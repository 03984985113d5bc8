"""Sizes and costs by hand and against flops.py; the table of a model; notes before training."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers_decoder import D, decoder_of
from torch import nn

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.families import deepseek_v3, glm4_moe, mixtral, qwen3_moe
from moe_builders.flops import count_parameters, model_flops
from moe_builders.moe import MoE, moe_layer
from moe_builders.moe_size import MoESize, dense_flops_per_token, matched_hidden_dim
from moe_builders.routers import ExpertChoiceTopKRouter, ThresholdRouter, TokenChoiceTopKRouter
from moe_builders.routers.capacity import Capacity
from moe_builders.summary import (
    architecture_table,
    describe_experts,
    describe_routing,
    is_causal,
    layer_size,
    strategy_of,
)


class SinkhornRouter(nn.Module):
    """Stands for any router that sees the whole batch while it trains."""

    balances_itself = True

    def __init__(self, *, dim, num_experts, experts_per_token):
        super().__init__()
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.gate = nn.Linear(dim, num_experts, bias=False)

    @property
    def causal(self):
        return not self.training


class HashRouter(nn.Module):
    num_experts, experts_per_token, causal = 4, 2, True


class SilentRouter(nn.Module):
    num_experts, experts_per_token = 4, 2


@dataclass
class PlainRouter:
    """No module: nothing to switch between training and evaluation."""

    num_experts: int = 4
    experts_per_token: int = 2
    causal: bool = True


class BareExperts(nn.Module):
    """Tells nothing of itself."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(D, D)


def router_of(kind=SinkhornRouter):
    return kind(dim=D, num_experts=4, experts_per_token=2)


def moe_of(router, *, capacity=None, experts=None, **changes):
    if experts is None:
        experts = GroupedExperts(dim=D, hidden_dim=8, num_experts=4)
    return MoE(router=router, experts=experts, capacity=capacity, **changes)


def decoder_with(*moes):
    return decoder_of(num_layers=len(moes), mlp=lambda layer: moes[layer])


# a layer in plain numbers


def test_a_layer_by_hand():
    size = MoESize(dim=10, hidden_dim=6, num_experts=8, experts_per_token=2)
    assert size.parameters_per_expert == 10 * 6 + 10 * 6 + 6 * 10
    assert size.parameters == 8 * 180 + 10 * 8
    assert size.active_parameters == 2 * 180 + 10 * 8
    assert size.flops_per_token == 2 * (2 * 10 * 6 * 2 + 2 * 6 * 10) + (2 * 10 * 8 + 8)
    dense = 2 * (10 * 40 * 2 + 40 * 10)
    assert size.reduction() == 1 - size.flops_per_token / dense
    assert size.reduction(6) == 1 - size.flops_per_token / (2 * 3 * 60) < 0  # 2 experts cost more
    assert size.name == "MoE_8x2_d6_top_k"


def test_an_ungated_layer_with_biases_by_hand():
    size = MoESize(
        dim=10, hidden_dim=6, num_experts=4, experts_per_token=1, gated=False, bias=True,
        strategy="sinkhorn",
    )  # fmt: skip
    assert size.parameters_per_expert == 10 * 6 + 6 * 10 + 6 + 10
    assert size.flops_per_token == 2 * (10 * 6 + 6 * 10) + (2 * 10 * 4 + 4)
    assert size.name == "MoE_4x1_d6_sinkhorn"
    gated = MoESize(dim=10, hidden_dim=6, num_experts=4, experts_per_token=1, bias=True)
    assert gated.parameters_per_expert == 3 * 60 + 2 * 6 + 10


def test_experts_in_a_latent_space_by_hand():
    size = MoESize(dim=10, latent_dim=5, hidden_dim=6, num_experts=4, experts_per_token=2)
    assert size.parameters == 4 * 3 * 5 * 6 + 10 * 4
    assert size.flops_per_token == 2 * (2 * 5 * 6 * 2 + 2 * 6 * 5) + (2 * 10 * 4 + 4)


def test_a_mean_number_of_experts():
    size = MoESize(dim=10, hidden_dim=6, num_experts=4, experts_per_token=1.5)
    assert size.active_parameters == 1.5 * 180 + 40
    assert size.name == "MoE_4x1.5_d6_top_k"


def test_a_dense_network_by_hand():
    assert dense_flops_per_token(dim=10, hidden_dim=40) == 2 * (10 * 40 * 2 + 40 * 10)
    assert dense_flops_per_token(dim=10, hidden_dim=40, gated=False) == 2 * (10 * 40 + 40 * 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts is not set"),
        ({"experts_per_token": None}, "experts_per_token is not set"),
        ({"experts_per_token": 5}, r"experts_per_token is 5, .*at most num_experts \(4\)"),
        ({"experts_per_token": 0}, "experts_per_token is 0, but must be above 0"),
        ({"num_experts": 0}, "num_experts is 0, but must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dim": -1}, "dim is -1"),
        ({"latent_dim": 0}, "latent_dim is 0"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    sizes = {"dim": 10, "hidden_dim": 6, "num_experts": 4, "experts_per_token": 2}
    with pytest.raises(InputError, match=message) as error:
        MoESize(**(sizes | changes))
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(("f", "k", "h"), [(3072, 2, 1536), (3072, 1, 3072), (9, 3, 3), (2, 2, 1)])
def test_width_that_costs_what_the_dense_one_does(f, k, h):
    assert matched_hidden_dim(intermediate_dim=f, experts_per_token=k) == h
    for gated in (True, False):
        size = MoESize(dim=8, hidden_dim=h, num_experts=k, experts_per_token=k, gated=gated)
        router = 2 * 8 * k + k
        dense = dense_flops_per_token(dim=8, hidden_dim=f, gated=gated)
        assert size.flops_per_token - router == dense


@pytest.mark.parametrize(
    ("f", "k", "nearest", "h"),
    [(3073, 2, 3072, 1536), (10, 4, 8, 2), (11, 4, 12, 3), (1, 4, 4, 1), (3071, 3, 3072, 1024)],
)
def test_a_width_that_does_not_divide_names_the_nearest(f, k, nearest, h):
    with pytest.raises(InputError, match=rf"{f} .*by {k} .*is {nearest}, with hidden_dim {h}$"):
        matched_hidden_dim(intermediate_dim=f, experts_per_token=k)
    assert matched_hidden_dim(intermediate_dim=nearest, experts_per_token=k) == h
    other = min(abs(f - n) for n in range(k, f + 2 * k, k))
    assert abs(f - nearest) == other


@pytest.mark.parametrize(("f", "k"), [(12, 0), (0, 2), (12, -3)])
def test_widths_that_cannot_be(f, k):
    with pytest.raises(InputError, match=rf"\({f}\) and experts_per_token \({k}\) must be at"):
        matched_hidden_dim(intermediate_dim=f, experts_per_token=k)


# the same of a model, against flops.py


def costs_of_the_layers(model, layers):
    """What flops.py counts in the mlp slots of these layers: FLOPs a token, parameters, active."""
    flops, counts = model_flops(model).per_token, count_parameters(model)
    for number in layers:
        model.layers[number].mlp = nn.Identity()
    without = count_parameters(model)
    return (
        flops - model_flops(model).per_token,
        counts.total - without.total,
        counts.active - without.active,
    )


def test_the_tiny_model_against_flops():
    with torch.device("meta"):
        model = qwen3_moe.qwen3_moe_tiny()
    sizes = [layer_size(layer.mlp) for layer in model.layers]
    flops, total, active = costs_of_the_layers(model, range(len(sizes)))
    gates = sum(size.num_experts for size in sizes)  # an operation on each logit
    assert sum(size.flops_per_token for size in sizes) - gates == flops
    assert sum(size.parameters for size in sizes) == total
    assert sum(size.active_parameters for size in sizes) == active


def test_dense_first_and_shared_experts_against_flops():
    """GLM-4.5-Air: one dense layer, then 45 with a shared expert beside 128 routed ones."""
    with torch.device("meta"):
        model = glm4_moe.glm4_5_air()
    sizes = [layer_size(layer.mlp) for layer in model.layers if isinstance(layer.mlp, MoE)]
    assert len(sizes) == len(model.layers) - 1
    assert {size.name for size in sizes} == {"MoE_128x8_d1408_top_k"}
    for slot in range(1, len(model.layers)):
        model.layers[slot].mlp.shared_experts = None
    flops, total, active = costs_of_the_layers(model, range(1, len(model.layers)))
    assert sum(size.flops_per_token for size in sizes) - 128 * len(sizes) == flops
    assert sum(size.parameters for size in sizes) == total
    assert sum(size.active_parameters for size in sizes) == active


@pytest.mark.parametrize(
    ("changes", "router"),
    [
        ({"activation": "relu2"}, None),
        ({"activation": "gelu_tanh", "bias": True}, None),
        ({"bias": True}, None),
        ({}, ExpertChoiceTopKRouter(dim=D, num_experts=4, capacity_factor=1.5)),
    ],
)
def test_layers_of_other_kinds_against_flops(changes, router):
    router = router_of() if router is None else router
    experts = GroupedExperts(dim=D, hidden_dim=8, num_experts=4, **changes)
    model = decoder_with(moe_of(router, experts=experts))
    size = layer_size(model.layers[0].mlp)
    flops, total, active = costs_of_the_layers(model, [0])
    assert size.flops_per_token - 4 == flops
    assert (size.parameters, size.active_parameters) == (total, active)


def test_a_latent_layer_against_flops():
    down, up = nn.Linear(D, 6, bias=False), nn.Linear(6, D, bias=False)
    experts = GroupedExperts(dim=6, hidden_dim=8, num_experts=4)
    moe = moe_of(router_of(), experts=experts, latent_down=down, latent_up=up)
    size = layer_size(moe)
    assert (size.dim, size.latent_dim) == (D, 6)
    flops, total, _ = costs_of_the_layers(decoder_with(moe), [0])
    assert size.flops_per_token - 4 + 2 * (D * 6 + 6 * D) == flops
    assert size.parameters + D * 6 + 6 * D == total


@pytest.mark.parametrize(
    ("builder", "name", "per_expert"),
    [  # 3 · d · h of the releases' config.json
        (mixtral.mixtral_8x7b, "MoE_8x2_d14336_top_k", 3 * 4096 * 14336),
        (qwen3_moe.qwen3_moe_30b_a3b, "MoE_128x8_d768_top_k", 3 * 2048 * 768),
        (deepseek_v3.deepseek_v3_671b, "MoE_256x8_d2048_top_k", 3 * 7168 * 2048),
    ],
)
def test_released_sizes(builder, name, per_expert):
    with torch.device("meta"):
        model = builder()
    size = layer_size(model.layers[-1].mlp)
    assert size.name == name
    assert size.parameters_per_expert == per_expert
    table = architecture_table(model)
    assert f"{count_parameters(model).total:,} parameters" in table
    assert f"{name}: {per_expert:,} parameters an expert" in table


def test_experts_that_tell_nothing():
    with pytest.raises(InputError, match="BareExperts do not tell their size: give them"):
        layer_size(moe_of(router_of(), experts=BareExperts()))
    model = decoder_with(moe_of(router_of(), experts=BareExperts()))
    table = architecture_table(model)
    assert "BareExperts" in table.splitlines()[2]
    assert "MoE_" not in table


# the table


def cells(table):
    """Each line of the table by its columns."""
    lines = table.split("\n\n")[0].splitlines()
    edges = [0]
    for width in map(len, lines[1].split("  ")):
        edges.append(edges[-1] + width + 2)
    return [[line[a:b].strip() for a, b in itertools.pairwise(edges)] for line in lines]


def test_the_table_by_hand():
    mlps = [
        nn.Linear(D, D),
        moe_layer(embed_dim=D, expert_hidden_dim=8, num_experts=4, experts_per_token=2,
                  shared_hidden_dim=10),
        moe_of(router_of(), capacity=Capacity(factor=1.25, eval_factor=2.0)),
        moe_of(router_of(), capacity=Capacity(factor=1.25, eval_factor=2.0)),
        moe_of(ExpertChoiceTopKRouter(dim=D, num_experts=4, capacity_factor=1.5),
               capacity=Capacity(factor=1.5)),
    ]  # fmt: skip
    model = decoder_of(num_layers=5, mlp=lambda layer: mlps[layer])
    header, _, *rows = cells(architecture_table(model))
    assert header[:7] == [
        "layers", "router", "experts", "per token", "hidden", "shared", "limit (train / eval)",
    ]  # fmt: skip
    assert [row[:7] for row in rows] == [
        ["layers.0", "dense", "", "", "Linear", "", ""],
        ["layers.1", "top_k", "4", "2", "8", "10", ""],
        ["layers.2 … layers.3", "sinkhorn", "4", "2", "8", "", "1.25 / 2"],
        ["layers.4", "expert_choice", "4", "1.5", "8", "", "1.5 / none"],
    ]
    assert header[7:] == ["causal in training", "causal in evaluation"]
    assert rows[2][7:] == ["no", "yes"]


def test_the_tables_totals_are_those_of_flops():
    with torch.device("meta"):
        model = qwen3_moe.qwen3_moe_tiny()
    counts, flops = count_parameters(model), model_flops(model)
    size = layer_size(model.layers[0].mlp)
    share = 100 * counts.active / counts.total
    text = architecture_table(model)
    assert f"{counts.total:,} parameters, {counts.active:,} of them active ({share:.1f} %)" in text
    assert f"{flops.per_token:,.0f} FLOPs a token in a forward, and {flops.per_pair:,.0f} f" in text
    saved = 100 * size.reduction()
    word = "below" if saved > 0 else "above"
    wanted = f"{size.flops_per_token:,.0f} FLOPs a token for router and experts, {abs(saved):.1f} %"
    assert f"{wanted} {word} a dense network of width {4 * size.dim}" in text
    assert text.count(size.name) == 1, "a line for each kind of layer, not for each layer"


def test_a_layer_that_costs_more_than_the_dense_one_says_so():
    wide = GroupedExperts(dim=D, hidden_dim=4 * D, num_experts=4)
    model = decoder_with(moe_of(router_of(), experts=wide))
    saved = layer_size(model.layers[0].mlp).reduction()
    assert saved < -1
    assert f"{-100 * saved:.1f} % above a dense network" in architecture_table(model)


def test_layers_deeper_inside_are_named_where_they_stand():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = moe_of(router_of())

        def forward(self, x, info=None):
            return self.moe(x, info)

    rows = cells(architecture_table(decoder_of(num_layers=1, mlp=lambda layer: Inner())))
    assert rows[2][:2] == ["layers.0.moe", "sinkhorn"]


@pytest.mark.parametrize(
    ("router", "strategy"),
    [
        (router_of(TokenChoiceTopKRouter), "top_k"),
        (router_of(), "sinkhorn"),
        (ExpertChoiceTopKRouter(dim=D, num_experts=4), "expert_choice"),
        (HashRouter(), "hash"),
        (type("FSDPForcedBalanceRouter", (), {})(), "forced_balance"),
        (type("MyGate", (), {})(), "my_gate"),
    ],
)
def test_strategies_come_from_class_names(router, strategy):
    assert strategy_of(router) == strategy


# what is worth knowing


def test_causality_in_both_modes_without_touching_the_model():
    moe = moe_of(router_of()).eval()
    assert is_causal(moe, training=False) is True
    assert is_causal(moe, training=True) is False
    assert not moe.training
    assert not moe.router.training
    assert is_causal(moe_of(SilentRouter()), training=True) is None
    assert is_causal(moe_of(PlainRouter()), training=True) is True


@pytest.mark.parametrize(
    ("limit", "training", "evaluation"),
    [
        ({"factor": 1.0}, True, True),
        ({"factor": 1.0, "eval_factor": 2.0}, True, True),
        ({"factor": 1.0, "slot_order": "rank_major"}, False, True),
        ({"eval_factor": 1.0, "slot_order": "rank_major"}, True, False),
        ({"factor": 1.0, "eval_factor": 2.0, "drop": "probs"}, False, False),
    ],
)
def test_a_limit_is_causal_where_earlier_tokens_come_first(limit, training, evaluation):
    moe = moe_of(HashRouter(), capacity=Capacity(**limit))
    assert is_causal(moe, training=True) is training
    assert is_causal(moe, training=False) is evaluation


def notes_of(*moes):
    return describe_routing(decoder_with(*moes))


def test_nothing_to_say_of_a_plain_causal_router():
    assert notes_of(moe_of(HashRouter()), moe_of(HashRouter())) == []


def test_notes_of_a_router_that_sees_later_tokens_in_training():
    notes = notes_of(moe_of(router_of()), moe_of(router_of()))
    assert all(note.startswith("layers.0 … layers.1: ") for note in notes)
    assert [note.split(": ", 1)[1] for note in notes] == [
        "training routes a token by later ones too, evaluation and generation do not: the two "
        "differ",
        "Sinkhorn in training only: evaluation takes the best softmax scores",
        "SinkhornRouter balances by itself: a balancing loss would fight it",
    ]


def test_notes_of_a_router_that_sees_later_tokens_always():
    [note] = notes_of(moe_of(PlainRouter(causal=False)))
    assert note.startswith("layers.0: evaluation, too, routes a token by later ones: generation")


def test_notes_of_a_router_that_does_not_tell():
    [note] = notes_of(moe_of(SilentRouter()))
    assert note == "layers.0: SilentRouter does not tell whether it is causal (an attribute causal)"


def test_a_router_has_a_limit_of_its_own():
    router = ThresholdRouter(
        dim=D, num_experts=4, capacity_factor=1.5, eval_capacity_factor=2.0, policy="all"
    )
    [training, evaluation] = notes_of(moe_of(router))
    assert "training drops what an expert gets above 0.75 times the mean load" in training
    assert "evaluation drops what an expert gets above 1 times the mean load" in evaluation
    layer = moe_of(router, capacity=Capacity(factor=0.5))
    assert "0.5 / 1 " in architecture_table(decoder_with(layer))
    assert len(notes_of(layer)) == 2
    [plain] = notes_of(moe_of(ThresholdRouter(dim=D, num_experts=4)))
    assert "0.625 times" in plain


def test_notes_of_limits_that_drop():
    found = notes_of(
        moe_of(HashRouter(), capacity=Capacity(factor=1.25)),
        moe_of(HashRouter(), capacity=Capacity(eval_factor=2.0)),
    )
    assert found == [
        "layers.0: training drops what an expert gets above 1.25 times the mean load (by "
        "position); a dropped token has the residual alone",
        "layers.1: evaluation drops what an expert gets above 2 times the mean load (by "
        "position); a dropped token has the residual alone",
    ]
    text = architecture_table(decoder_with(moe_of(router_of())))
    assert "note: layers.0: Sinkhorn in training only" in text


def test_a_routers_own_limit_is_told_and_the_tightest_counts():
    """A share of tokens, factor · n / e, is factor / k of the mean load, n · k / e."""
    router = ThresholdRouter(dim=D, num_experts=4, capacity_factor=1.25, eval_capacity_factor=3.0)
    text = architecture_table(decoder_with(moe_of(router)))
    assert "0.625 / 1.5" in text
    assert [note.split(" times")[0] for note in notes_of(moe_of(router))] == [
        "layers.0: training drops what an expert gets above 0.625",
        "layers.0: evaluation drops what an expert gets above 1.5",
    ]
    tighter = Capacity(factor=0.5, drop="probs")
    _, training, evaluation = notes_of(moe_of(router, capacity=tighter))
    assert "above 0.5 times the mean load (by probs)" in training
    assert "above 1.5 times" in evaluation


def test_experts_that_are_computed_alike_share_a_line():
    plain = [moe_of(router_of()) for _ in range(2)]
    loop = moe_of(router_of(), experts=GroupedExperts(dim=D, hidden_dim=8, num_experts=4,
                                                      backend="loop"))  # fmt: skip
    model = decoder_with(*plain, loop)
    lines = describe_experts(model, device=torch.device("cpu"), dtype=torch.float64)
    reason = "a CPU multiplies one expert after the other"
    assert [line.split(" (")[0] for line in lines] == [
        "layers.0 … layers.1: experts' products: a loop over experts",
        "layers.2: experts' products: a loop over experts",
    ]
    assert f"({reason})" in lines[0]
    assert "(the back end is loop)" in lines[1]
