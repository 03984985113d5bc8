"""A MoE inside somebody's own mlp: told of the mask, sharded by the same rules, or refused."""

import pytest
import torch
from torch import nn

from moe_builders import MoE, TokenInfo, collect_routing, moe_decoder, moe_layer
from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.errors import InputError
from moe_builders.initialization import initialize
from moe_builders.parallel.plan import sharding_plan
from moe_builders.parallel.sharding import shard_model
from moe_builders.parallel.world import open_world


class DensePlusMoE(nn.Module):
    """A dense projection beside the experts, as some families have it."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.moe = moe_layer(
            embed_dim=16, expert_hidden_dim=8, num_experts=4, experts_per_token=2)  # fmt: skip
        self.temperature = nn.Parameter(torch.full((4,), 7.0))

    def forward(self, x, info=None):
        return self.dense(x) + self.moe(x, info)


class Forgetful(DensePlusMoE):
    def forward(self, x):
        return self.moe(x)


def decoder(mlp):
    attention = GroupedQueryAttention(embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8)
    return moe_decoder(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, head_dim=8,
                       max_seq_len=16, attention=attention, mlp=mlp)  # fmt: skip


def test_it_is_told_which_tokens_are_real():
    model = decoder(lambda layer: DensePlusMoE())
    mask = torch.tensor([True] * 6 + [False] * 2)
    model(torch.arange(8)[None], info=TokenInfo(mask=mask))
    for routing in collect_routing(model).values():
        assert routing.num_tokens_per_expert.sum() == 12


def test_one_that_would_not_be_told_is_refused_also_later():
    with pytest.raises(InputError, match="Forgetful holds a MoE, but its forward does not take"):
        decoder(lambda layer: Forgetful())
    model = decoder(lambda layer: DensePlusMoE())
    with pytest.raises(InputError, match="does not take"):
        model.layers[0].mlp = Forgetful()
    model.layers[0].mlp = nn.Identity()
    assert not model.layers[0].mlp_takes_info
    model.layers[0].mlp = moe_layer(embed_dim=16, expert_hidden_dim=8, num_experts=4)
    assert model.layers[0].mlp_takes_info


def test_its_router_and_experts_are_groups_of_their_own():
    model = decoder(lambda layer: DensePlusMoE())
    plan = {group.module: group.kind for group in sharding_plan(dict(model.named_modules()))}
    assert plan["layers.0.mlp.moe.router"] == "router"
    assert plan["layers.1.mlp.moe.experts"] == "experts"
    with open_world(device="cpu") as world:
        shard_model(model, world, compute_dtype=torch.bfloat16, reshard_after_forward=True)
        model(torch.arange(8)[None]).sum().backward()
        for routing in collect_routing(model).values():
            assert routing.logits.dtype == torch.float32


def test_random_matrices_are_redrawn_and_nothing_else():
    model = decoder(lambda layer: DensePlusMoE())
    assert isinstance(model.layers[0].mlp.moe, MoE)
    before = model.layers[0].mlp.dense.bias.clone()
    initialize(model, seed=0, std=0.5)
    assert torch.equal(model.layers[0].mlp.temperature, torch.full((4,), 7.0))
    assert torch.equal(model.layers[0].mlp.dense.bias, before)
    assert model.layers[0].mlp.dense.weight.std() > 0.3
