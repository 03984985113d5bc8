"""DeepSeek-V3's gate three times: transformers', NeMo Automodel's, ours."""

import pytest
import torch

from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo, dense_weights

layers = pytest.importorskip("nemo_automodel.components.moe.layers")
MoEConfig = pytest.importorskip("nemo_automodel.components.moe.config").MoEConfig
hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

T, D, E, K, GROUPS, KEPT, SCALE = 256, 32, 32, 8, 8, 4, 2.5


def gates():
    from transformers import DeepseekV3Config

    theirs = hf.DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=D,
            n_routed_experts=E,
            num_experts_per_tok=K,
            n_group=GROUPS,
            topk_group=KEPT,
            norm_topk_prob=True,
            routed_scaling_factor=SCALE,
        )
    )
    automodel = layers.Gate(
        MoEConfig(
            n_routed_experts=E,
            n_shared_experts=0,
            n_activated_experts=K,
            n_expert_groups=GROUPS,
            n_limited_groups=KEPT,
            train_gate=True,
            gate_bias_update_factor=0.0,
            aux_loss_coeff=0.0,
            score_func="sigmoid_with_bias",
            route_scale=SCALE,
            dim=D,
            inter_dim=D,
            moe_inter_dim=D,
            norm_topk_prob=True,
            force_e_score_correction_bias=True,
            dtype=torch.float32,
        )
    )
    ours = TokenChoiceTopKRouter(
        dim=D,
        num_experts=E,
        experts_per_token=K,
        score_function="sigmoid",
        route_scale=SCALE,
        expert_bias=True,
        num_groups=GROUPS,
        groups_per_token=KEPT,
    )
    return theirs, automodel, ours


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_three_gates(shift, spread):
    theirs, automodel, ours = gates()
    stream = torch.Generator().manual_seed(3)
    weight = torch.randn(E, D, generator=stream) * 0.3
    bias = torch.randn(E, generator=stream) * spread + shift
    x = torch.randn(T, D, generator=stream)
    with torch.no_grad():
        for parameter in (theirs.weight, automodel.weight, ours.gate.weight):
            parameter.copy_(weight)
        for buffer in (
            theirs.e_score_correction_bias, automodel.e_score_correction_bias, ours.expert_bias,
        ):  # fmt: skip
            buffer.copy_(bias)
        _, weights, experts = theirs(x)
        their_dense = torch.zeros(T, E).scatter(1, experts, weights)
        weights, experts, _ = automodel(x, torch.ones(T, dtype=torch.bool), None)
        automodel_dense = torch.zeros(T, E).scatter(1, experts, weights)
        routing = ours(x, TokenInfo())
    got = dense_weights(routing)
    assert torch.equal(automodel_dense, their_dense)
    assert torch.equal(got > 0, their_dense > 0)
    assert torch.equal(routing.selected.sort(-1).values, experts.sort(-1).values)
    # before the scale; theirs adds the weights up in another order
    assert (got - their_dense).abs().max() / SCALE <= 1e-7
