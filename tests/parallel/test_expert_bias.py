"""A selection-only bias in a sharded model: whole on every process, in fp32, and it learns."""

import pytest
import torch
from helpers_decoder import batch, decoder_of
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_builders.moe import moe_layer
from moe_builders.parallel.sharding import shard_model
from moe_builders.parallel.world import open_world
from moe_builders.routers.bias import BiasRule


@pytest.fixture
def world():
    with open_world(device="cpu") as opened:
        yield opened


def mlp(layer):
    return moe_layer(
        embed_dim=12, expert_hidden_dim=8, num_experts=4, experts_per_token=2, expert_bias=True
    )


def sharded(world, model):
    shard_model(model, world, compute_dtype=torch.bfloat16, reshard_after_forward=True)
    return model


def test_it_is_whole_in_fp32_and_learns(world):
    model, (tokens, info) = sharded(world, decoder_of(mlp=mlp)), batch()
    router = model.layers[1].mlp.router
    router.bias_rule = BiasRule(0.5)
    buffer = router.expert_bias
    assert not isinstance(buffer, DTensor)
    assert buffer.dtype == torch.float32
    before = buffer.clone()
    model(tokens, info=info).sum().backward()
    tally = router.tally(model.layers[1].mlp.last_routing)
    assert float(tally.sum()) == 2 * int(info.mask.sum())
    router.learn(tally)
    assert router.expert_bias is buffer
    assert torch.equal(buffer, before + 0.5 * (tally.mean() - tally).sign().float())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert router.tally(model.layers[1].mlp.last_routing).numel() == 0


def test_from_the_meta_device(world):
    with torch.device("meta"):
        model = decoder_of(mlp=mlp)
    model = sharded(world, model)
    model.to_empty(device="cpu")
    wanted = torch.tensor([0.1, -0.2, 0.3, 0.1001])
    name = "layers.1.mlp.router.expert_bias"
    model.load_state_dict({name: wanted}, strict=False)
    assert torch.equal(model.get_buffer(name), wanted)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for layers\.1\.mlp\.router\.expert_bias"
    ):
        model.load_state_dict({name: torch.zeros(5)}, strict=False)
    split = distribute_tensor(wanted, world.mesh["dp_shard"], [Shard(0)])
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.router\.expert_bias"):
        model.load_state_dict({name: split}, strict=False)
