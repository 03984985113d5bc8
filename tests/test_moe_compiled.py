"""torch.compile of the MoE layer: one graph, the same numbers, compiled once."""

import pytest
import torch
from helpers import assert_near, gradients, randomise
from torch import nn

from moe_builders.decoder import MoEDecoderLayer
from moe_builders.experts import GroupedExperts
from moe_builders.losses import load_balancing_loss, router_z_loss
from moe_builders.moe import MoE, moe_layer
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo

D = 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()  # layers of other tests are no reason to recompile


def layer():
    moe = moe_layer(
        embed_dim=D,
        expert_hidden_dim=12,
        num_experts=4,
        experts_per_token=2,
        shared_hidden_dim=8,
        expert_bias=True,
    )
    return randomise(moe)


def token_info(seed, t=20):
    stream = torch.Generator().manual_seed(seed)
    mask = torch.rand(t, generator=stream) > 0.1 * seed
    return TokenInfo(mask=mask, sequence_ids=torch.arange(2).repeat_interleave(t // 2))


def step(module, moe, x, info):
    """Output, gradients and counts of a forward, both router losses, and a backward."""
    x = x.clone().requires_grad_()
    y = module(x, info)
    routing = moe.last_routing
    loss = y.square().sum() + router_z_loss(routing)
    (loss + load_balancing_loss(routing, scope="sequence")).backward()
    found = {"y": y.detach(), "x": x.grad} | gradients(moe)
    return found, routing.num_tokens_per_expert


def test_one_graph_for_any_routing_and_mask_equal_to_eager():
    eager, moe = layer(), layer()
    compiled = torch.compile(moe, fullgraph=True)  # a graph break is an error
    loads = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(5):
            x = torch.randn(2, 10, D)
            got, counts = step(compiled, moe, x, token_info(number))
            wanted, wanted_counts = step(eager, eager, x, token_info(number))
            assert torch.equal(counts, wanted_counts)
            loads.add(tuple(counts.tolist()))
            for name, value in got.items():
                assert_near(value, wanted[name], 1e-5, name)
    assert len(loads) == 5


@pytest.mark.parametrize("kind", ["token", "expert"])
@pytest.mark.parametrize("score_position", ["before", "mid"])
def test_one_graph_for_the_other_ways_too(kind, score_position):
    def build():
        router = (
            TokenChoiceTopKRouter(
                dim=D,
                num_experts=4,
                experts_per_token=2,
                score_function="sigmoid",
                num_groups=2,
                groups_per_token=1,
            )
            if kind == "token"
            else ExpertChoiceTopKRouter(dim=D, num_experts=4, capacity_factor=1.5)
        )
        experts = GroupedExperts(dim=D, hidden_dim=12, num_experts=4, bias=True)
        return randomise(MoE(router=router, experts=experts, score_position=score_position))

    eager, moe = build(), build()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(2):
            x = torch.randn(2, 10, D)
            got, _ = step(compiled, moe, x, token_info(number))
            wanted, _ = step(eager, eager, x, token_info(number))
            for name, value in got.items():
                assert_near(value, wanted[name], 1e-5, name)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_moe_in_a_layer_still_hears_of_masked_tokens(in_place):
    moe = layer()
    if in_place:
        moe.compile(backend="eager")

    class NoAttention(nn.Module):
        def forward(self, x, y, *, mask, input_pos):
            return torch.zeros_like(x)

    decoder_layer = MoEDecoderLayer(
        attn=NoAttention(),
        mlp=moe if in_place else torch.compile(moe, backend="eager"),
        sa_norm=nn.Identity(),
        mlp_norm=nn.Identity(),
    )
    info = token_info(4)
    decoder_layer(torch.randn(2, 10, D), info=info)
    assert moe.last_routing.info.mask is info.mask
    assert int(moe.last_routing.num_tokens_per_expert.sum()) == 2 * int(info.mask.sum())
