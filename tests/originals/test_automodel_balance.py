"""Balancing loss and load metrics against NeMo Automodel's, where they mean the same."""

import importlib

import pytest
import torch
from helpers import randomise

from moe_builders.losses import load_balancing_loss
from moe_builders.metrics import detailed_metrics, extreme_experts, load_cv, load_metrics
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo

theirs = pytest.importorskip("nemo_automodel.components.moe.load_balance_metrics")


def table(seed, layers=4, e=9):
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (layers, e), generator=stream).double()


@pytest.mark.parametrize("seed", range(4))
def test_metrics(seed):
    counts = table(seed)
    counts[1, 2] = 0
    loads = {f"l{n}": {"expert_load": row, "aux_loss": None} for n, row in enumerate(counts)}
    wanted = theirs.compute_detailed_metrics(loads, top_k=2)
    load = torch.stack([counts, counts, counts])
    found = detailed_metrics(load)
    pairs = {
        "moe/cv_mean": load_metrics(load)["load_cv"],
        "moe/cv_median": found["load_cv_median"],
        "moe/cv_min": found["load_cv_min"],
        "moe/cv_max": found["load_cv_max"],
        "moe/expert_utilization_median": found["utilisation_median"],
        "moe/expert_utilization_min": found["utilisation_min"],
        "moe/expert_utilization_max": found["utilisation_max"],
        "moe/dead_expert_frac_mean": found["dead_expert_frac"],
        "moe/expert_diversity_mean": found["load_diversity"],
        "moe/expert_diversity_min": found["load_diversity_min"],
        "moe/layer_1/cv": float(load_cv(counts[1])),
    }
    for name, value in pairs.items():
        assert value == pytest.approx(wanted[name], rel=1e-5), name
    for (layer, expert), value in extreme_experts(counts, 2).items():
        name = f"moe_expert_utilization/layer_{layer}_expert_{expert}"
        assert value == pytest.approx(wanted[name], rel=1e-6)
    named = [name for name in wanted if name.startswith("moe_expert_utilization/")]
    assert len(named) == len(extreme_experts(counts, 2)) == 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_balancing_loss_of_a_whole_gate(score_function, masked):
    """Groups included: both count what was selected, over one scope."""
    layers = pytest.importorskip("nemo_automodel.components.moe.layers")
    config = importlib.import_module("nemo_automodel.components.moe.config")
    t, d, e, k = 40, 6, 8, 2
    gate = layers.Gate(config.MoEConfig(
        n_routed_experts=e, n_shared_experts=0, n_activated_experts=k, n_expert_groups=4,
        n_limited_groups=2, train_gate=True, gate_bias_update_factor=0.0, aux_loss_coeff=1.0,
        score_func=score_function, route_scale=1.0, dim=d, inter_dim=8, moe_inter_dim=8,
        norm_topk_prob=True, softmax_before_topk=True, dtype=torch.float32,
    )).train()  # fmt: skip
    router = randomise(TokenChoiceTopKRouter(
        dim=d, num_experts=e, experts_per_token=k, score_function=score_function, num_groups=4,
        groups_per_token=2, group_score_topk=1,
    ))  # fmt: skip
    with torch.no_grad():
        gate.weight.copy_(router.gate.weight)
    x = torch.randn(t, d, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(t) % 4 != 1 if masked else torch.ones(t, dtype=torch.bool)
    _, indices, wanted = gate(x, mask, None)
    routing = router(x, TokenInfo(mask=mask))
    assert torch.equal(routing.selected[mask].sort(-1).values, indices[mask].sort(-1).values)
    got = load_balancing_loss(routing, scope="micro").detach()
    assert float(got) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(got) != pytest.approx(1, rel=1e-3)
