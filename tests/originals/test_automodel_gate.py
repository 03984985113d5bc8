"""Token choice against NeMo Automodel's Gate: weights, selection, balancing loss, bias updates."""

import itertools

import pytest
import torch
from helpers import assert_near

from moe_builders.losses import load_balancing_loss
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.bias import BiasRule
from moe_builders.routers.replay import RouterReplay
from moe_builders.routing import TokenInfo, dense_weights

layers = pytest.importorskip("nemo_automodel.components.moe.layers")
MoEConfig = pytest.importorskip("nemo_automodel.components.moe.config").MoEConfig

D, E, K, T = 16, 16, 4, 128
THEIR_NAMES = {
    "softmax": ("softmax", True),
    "topk_softmax": ("softmax", False),
    "softmax, biased": ("softmax_with_bias", True),
    "sqrtsoftplus": ("sqrtsoftplus", False),
    "sigmoid": ("sigmoid_with_bias", False),
    "sigmoid, older": ("sigmoid", False),
}


def pair(name, *, bias=False, groups=False, norm=True, scale=1.0, gate_bias=False, k=K, **theirs):
    """(their gate, our router) with the same numbers."""
    score_function, before = THEIR_NAMES[name]
    arguments = {
        "n_routed_experts": E, "n_shared_experts": 0, "n_activated_experts": k,
        "n_expert_groups": 4 if groups else 1, "n_limited_groups": 2 if groups else 1,
        "train_gate": True, "gate_bias_update_factor": 0.0, "aux_loss_coeff": 0.5,
        "score_func": score_function, "softmax_before_topk": before, "route_scale": scale,
        "dim": D, "inter_dim": D, "moe_inter_dim": D, "norm_topk_prob": norm,
        "router_bias": gate_bias, "force_e_score_correction_bias": bias, "dtype": torch.float32,
    }  # fmt: skip
    original = layers.Gate(MoEConfig(**(arguments | theirs)))
    biased = bias or original.e_score_correction_bias is not None
    ours = TokenChoiceTopKRouter(
        dim=D,
        num_experts=E,
        experts_per_token=k,
        score_function=name.partition(",")[0],
        normalize_weights=norm,
        route_scale=scale,
        expert_bias=biased,
        gate_bias=gate_bias,
        num_groups=4 if groups else 1,
        groups_per_token=2 if groups else 1,
        # without a bias the older sigmoid scores a group by its best member
        group_score_topk=1 if name == "sigmoid, older" and not biased else 2,
        weights_from="biased"
        if theirs.get("router_weight_uses_score_correction_bias")
        else "scores",
    )
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        original.weight.copy_(ours.gate.weight.normal_(0, 0.4, generator=stream))
        if gate_bias:
            original.bias.copy_(ours.gate.bias.normal_(0, 0.4, generator=stream))
        if biased:
            value = ours.expert_bias.normal_(0, 0.1, generator=stream)
            if "with_bias" not in score_function or name == "softmax, biased":
                # rejected groups are masked with 0 there: right only where all scores are above
                value.abs_()
            original.e_score_correction_bias.copy_(value)
    return original, ours


def tokens(t=T, seed=1):
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(t, D, generator=stream), torch.rand(t, generator=stream) > 0.3


def dense(indices, weights):
    """[t, e]."""
    return torch.zeros(indices.shape[0], E).scatter(1, indices, weights)


def cases():
    for name, bias, groups, norm, scale, gate_bias in itertools.product(
        THEIR_NAMES, *[(False, True)] * 3, (1.0, 2.5), (False, True)
    ):
        # their plain softmax knows neither; their sqrtsoftplus no groups
        if name in ("softmax", "topk_softmax") and (bias or groups):
            continue
        if name == "sqrtsoftplus" and groups:
            continue
        yield name, bias, groups, norm, scale, gate_bias


@pytest.mark.parametrize(("name", "bias", "groups", "norm", "scale", "gate_bias"), list(cases()))
def test_gate(name, bias, groups, norm, scale, gate_bias):
    theirs, ours = pair(name, bias=bias, groups=groups, norm=norm, scale=scale, gate_bias=gate_bias)
    x, mask = tokens()
    everything = torch.ones(T, dtype=torch.bool)
    weights, indices, _ = theirs(x, everything, None)
    routing = ours(x, TokenInfo())
    assert torch.equal(routing.selected.sort(-1).values, indices.sort(-1).values)
    assert_near(dense_weights(routing), dense(indices, weights), 1e-6)

    _, _, loss = theirs(x, mask, None)
    masked = ours(x, TokenInfo(mask=mask))
    load = theirs._compute_expert_load(indices, mask)
    assert masked.num_tokens_per_expert.tolist() == load.tolist()
    if norm or "softmax" in name:  # without it their P of a sigmoid is no distribution
        assert_near(load_balancing_loss(masked, scope="micro"), loss, 1e-6)

    theirs.aux_loss_coeff = 0.0  # they hang its gradient on the weights
    weights, indices, _ = theirs(x, everything, None)
    probe = torch.randn(T, E, generator=torch.Generator().manual_seed(2))
    (dense(indices, weights) * probe).sum().backward()
    (dense_weights(routing) * probe).sum().backward()
    assert_near(ours.gate.weight.grad, theirs.weight.grad, 1e-5)


@pytest.mark.parametrize("groups", [False, True])
def test_weights_of_biased_scores(groups):
    theirs, ours = pair(
        "sigmoid, older", bias=True, groups=groups, router_weight_uses_score_correction_bias=True
    )
    x, mask = tokens()
    weights, indices, _ = theirs(x, mask, None)
    routing = ours(x, TokenInfo())
    assert torch.equal(routing.selected.sort(-1).values, indices.sort(-1).values)
    assert_near(dense_weights(routing), dense(indices, weights), 1e-6)


def test_one_expert_per_token():
    for name in THEIR_NAMES:
        theirs, ours = pair(name, k=1)
        x, mask = tokens()
        weights, indices, _ = theirs(x, mask, None)
        assert_near(dense_weights(ours(x, TokenInfo())), dense(indices, weights), 1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "sqrtsoftplus", "softmax, biased", "sigmoid, older"])
def test_the_bias_after_three_steps(name):
    """Loads of two micro-batches with padding, then an update: the same bits."""
    theirs, ours = pair(name, gate_bias_update_factor=0.01)
    ours.bias_rule = BiasRule(0.01)
    for step in range(3):
        tally = torch.zeros(E, dtype=torch.float64)
        for micro in range(2):
            x, mask = tokens(seed=10 * step + micro)
            theirs(x, mask, None)
            tally += ours.tally(ours(x, TokenInfo(mask=mask)))
        assert tally.tolist() == theirs._cumulative_expert_load.tolist()
        theirs.update_bias()
        ours.learn(tally)
        assert torch.equal(ours.expert_bias, theirs.e_score_correction_bias)


@pytest.mark.parametrize("name", ["softmax, biased", "sigmoid, older"])
def test_where_theirs_masks_with_0_a_shift_changes_nothing_here(name):
    """A constant must not change a selection; rejected experts with 0 beat negative scores."""
    theirs, ours = pair(name, bias=True, groups=True)
    x, mask = tokens()
    before = ours(x, TokenInfo()).selected.sort(-1).values
    theirs_before = theirs(x, mask, None)[1].sort(-1).values
    with torch.no_grad():
        ours.expert_bias -= 1.5
        theirs.e_score_correction_bias -= 1.5
    assert torch.equal(ours(x, TokenInfo()).selected.sort(-1).values, before)
    assert not torch.equal(theirs(x, mask, None)[1].sort(-1).values, theirs_before)


def test_replay():
    """Recorded there, replayed here: the same weights, from each one's own scores."""
    theirs, ours = pair("sigmoid", bias=True, enable_routing_replay=True)
    replay = type(theirs.router_replay)
    x, mask = tokens()
    other, _ = tokens(seed=5)
    replay.clear_registry()
    replay.instances().append(theirs.router_replay)
    with replay.record():
        theirs(other, mask, None)
    recorded = replay.collect()
    with replay.replay(recorded):
        weights, indices, _ = theirs(x, mask, None)
    replay.clear_registry()
    with RouterReplay(ours).replay(recorded):
        routing = ours(x, TokenInfo())
    assert torch.equal(routing.selected, indices)
    assert_near(dense_weights(routing), dense(indices, weights), 1e-6)
