"""What is gathered together, as data; on one process, and as four would hold it."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_builders.errors import InputError
from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.moe import collect_routing
from moe_builders.parallel import sharding
from moe_builders.parallel.agree import raise_together
from moe_builders.parallel.plan import ShardGroup, sharding_plan
from moe_builders.parallel.sharding import (
    group_modules,
    local_shard,
    needs_sharding,
    shard_model,
    whole_tensor,
    widen_router_inputs,
)
from moe_builders.parallel.world import open_world
from moe_builders.routing import storage_dtype

TOKENS = torch.arange(24).view(2, 12) % 64


@pytest.fixture
def world():
    with open_world(device="cpu") as opened:
        yield opened


def test_plan_by_hand():
    names = ["", "tok_embeddings", "layers", "layers.0", "layers.0.attn", "layers.0.mlp",
             "layers.0.mlp.router", "layers.0.mlp.router.gate", "layers.0.mlp.experts",
             "layers.0.mlp.shared_experts", "layers.11", "layers.11.mlp.experts", "output",
             "players.0", "layers.0.mlp.experts_too", "layers.0.mlp.inner.experts"]  # fmt: skip
    assert sharding_plan(names) == [
        ShardGroup("layers.0.mlp.router", "router"),
        ShardGroup("layers.0.mlp.experts", "experts"),
        ShardGroup("layers.11.mlp.experts", "experts"),
        ShardGroup("layers.0.mlp.inner.experts", "experts"),
        ShardGroup("layers.0", "layer"),
        ShardGroup("layers.11", "layer"),
        ShardGroup("", "root"),
    ]


def test_a_plan_starts_inside(world):
    model = qwen3_moe_tiny(vocab_size=64)
    plan = [g.module for g in sharding_plan(name for name, _ in model.named_modules())]
    for number, name in enumerate(plan):
        outer = [p for p in plan[:number] if p == "" or name.startswith(f"{p}.")]
        assert not outer, f"{name} is applied after {outer}"
    assert len(plan) == 2 * 3 + 1
    names = [name for name, _ in model.named_parameters()]
    shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
    assert [name for name, _ in model.named_parameters()] == names, "names stay"
    assert all(isinstance(p, DTensor) for p in model.parameters())
    sharded = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert sharded == set(plan)


def test_sharded_on_one_process_is_the_same_model(world):
    model = randomise(qwen3_moe_tiny(vocab_size=64)).double()
    plain = model(TOKENS)
    (plain**2).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    shard_model(model, world, compute_dtype=torch.float64, reshard_after_forward=True)
    out = model(TOKENS)
    assert torch.equal(out, plain)
    (out**2).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(whole_tensor(parameter.grad), wanted[name]), name


def test_routers_compute_in_fp32_whatever_the_rest_does(world):
    model = randomise(qwen3_moe_tiny(vocab_size=64))
    gates = {
        n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("gate.weight")
    }
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))  # fmt: skip
    shard_model(model, world, compute_dtype=torch.bfloat16, reshard_after_forward=True)
    multiplied = []  # after FSDP2's own hook, which casts what comes with the tokens
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: multiplied.append(kwargs["assigned"]), with_kwargs=True
            )
    out = model(TOKENS)
    assert out.dtype == torch.float32
    for name, routing in collect_routing(model).items():
        x, gate = seen[f"{name}.router"], gates[f"{name}.router.gate.weight"]
        assert x.dtype == torch.float32, "a user's router may multiply x as it comes"
        assert torch.equal(x, x.bfloat16().float()), "the rest computes in bf16"
        assert not torch.equal(gate, gate.bfloat16().float()), "rounding would show"
        assert routing.logits.dtype == routing.probs.dtype == torch.float32
        torch.testing.assert_close(routing.logits.detach(), x.float() @ gate.T, rtol=0, atol=1e-5)
    assert [a.output_weights.dtype for a in multiplied] == [torch.float32] * len(seen)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def stored_in(model, dtype):
    """As the recipe stores it: routers not below fp32."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, dtype))
    return model


def needed(world, *, stored, computed):
    model = stored_in(qwen3_moe_tiny(vocab_size=64), stored)
    return needs_sharding(model, world, compute_dtype=computed)


def test_one_process_shards_only_what_must_be_cast(world):
    wide, half = torch.float32, torch.bfloat16
    assert not needed(world, stored=wide, computed=wide)
    assert not needed(world, stored=torch.float64, computed=torch.float64)
    assert needed(world, stored=wide, computed=half)
    assert needed(world, stored=half, computed=wide)
    assert not needed(world, stored=half, computed=half), "its routers are stored as they compute"
    narrow = qwen3_moe_tiny(vocab_size=64).to(half)
    assert needs_sharding(narrow, world, compute_dtype=half), "its routers are to be widened"
    assert needed(replace(world, size=2), stored=wide, computed=wide)


def test_one_process_in_bf16_is_the_same_model_unsharded(world):
    model = stored_in(randomise(qwen3_moe_tiny(vocab_size=64)), torch.bfloat16)
    sharded = copy.deepcopy(model)
    shard_model(sharded, world, compute_dtype=torch.bfloat16, reshard_after_forward=True)
    seen = []
    for layer in model.layers:
        layer.mlp.router.register_forward_hook(lambda _, args, __: seen.append(args[0].dtype))
    widen_router_inputs(model)
    one, other = model(TOKENS), sharded(TOKENS)
    assert torch.equal(one, other)
    assert seen == [torch.float32] * len(model.layers)
    one.square().sum().backward()
    other.square().sum().backward()
    for (name, first), second in zip(model.named_parameters(), sharded.parameters(), strict=True):
        assert first.grad.dtype == second.grad.dtype == first.dtype
        assert torch.equal(first.grad, whole_tensor(second.grad)), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_gradients_of_one_process_are_those_of_bf16_whatever_they_are_kept_in(world, stored):
    """Not widened on the way, and not rounded either: as a plain model's, cast afterwards."""
    plain = randomise(qwen3_moe_tiny(vocab_size=64)).to(stored)
    for module in plain.modules():  # the values that bf16 computes with
        if type(module).__name__ == "TokenChoiceTopKRouter":
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16().to(stored)
    sharded = copy.deepcopy(plain)
    shard_model(sharded, world, compute_dtype=torch.bfloat16, reshard_after_forward=True)
    for name, parameter in plain.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.bfloat16()
    (plain(TOKENS) ** 2).sum().backward()
    (sharded(TOKENS) ** 2).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert other.grad.dtype == stored
        assert torch.equal(whole_tensor(other.grad), one.grad.to(stored)), name


@pytest.mark.parametrize(("size", "reduced"), [(1, torch.bfloat16), (2, torch.float32)])
def test_gradients_are_added_over_processes_in_fp32(world, monkeypatch, size, reduced):
    policies = {}

    def watched(module, *, mp_policy, **_):
        policies[type(module).__name__] = mp_policy

    monkeypatch.setattr(sharding, "fully_shard", watched)
    model = qwen3_moe_tiny(vocab_size=64)
    several = replace(world, size=size)
    shard_model(model, several, compute_dtype=torch.bfloat16, reshard_after_forward=True)
    router = policies.pop("TokenChoiceTopKRouter")
    assert router.param_dtype == router.reduce_dtype == torch.float32
    for policy in policies.values():
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, reduced)
    assert len(policies) == 3  # experts, layers, root


class OwnMixture(nn.Module):
    """Somebody's mlp: a router without parameters, experts in a plain list."""

    def __init__(self):
        super().__init__()
        self.router = nn.Identity()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


def test_what_cannot_be_a_group_goes_with_its_layer(world):
    layer, model = nn.Linear(2, 2), nn.Linear(2, 2)
    layer.mlp = OwnMixture()
    model.layers = nn.ModuleList([layer])
    shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
    sharded = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert sharded == {"", "layers.0"}
    assert all(isinstance(p, DTensor) for p in model.parameters())


def test_a_model_on_the_meta_device_is_sharded_there(world):
    with torch.device("meta"):
        model = qwen3_moe_tiny(vocab_size=64)
    shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    shard = local_shard(next(model.parameters()))
    assert shard.tensor.shape == (64, 64)
    assert shard.offset == (0, 0)


def test_one_process_raises_what_it_has(world):
    raise_together(None)
    error = InputError("a damaged file")
    with pytest.raises(InputError, match=r"^a damaged file$") as caught:
        raise_together(error)
    assert caught.value.__cause__ is error


def test_plain_tensors_are_whole():
    tensor = torch.arange(6).view(2, 3)
    shard = local_shard(tensor)
    assert shard.tensor is tensor is whole_tensor(tensor)
    assert shard.offset == (0, 0)
    assert local_shard(torch.tensor(3.0)).offset == ()


@pytest.mark.parametrize(
    ("axes", "places", "wanted"),
    [
        ((4,), [Shard(0)], [(0, 2), (2, 2), (4, 1), (5, 0)]),
        ((2, 2), [Replicate(), Shard(0)], [(0, 3), (3, 2), (0, 3), (3, 2)]),
        ((4,), [Replicate()], [(0, 5)] * 4),
    ],
)
def test_which_rows_four_processes_hold(axes, places, wanted):
    """5 rows over 4 processes: ragged, and one holds none."""
    found = []
    for rank in range(4):
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        try:
            names = ("dp_replicate", "dp_shard")[-len(axes) :]
            mesh = init_device_mesh("cpu", axes, mesh_dim_names=names)
            shard = local_shard(zeros(5, 3, device_mesh=mesh, placements=places))
        finally:
            dist.destroy_process_group()
        assert shard.offset[1] == 0
        assert shard.tensor.shape[1] == 3
        found.append((shard.offset[0], shard.tensor.shape[0]))
    assert found == wanted


def test_a_plain_list_of_experts_is_no_group():
    names = group_modules(nn.ModuleDict({"layers": nn.ModuleList(
        [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})])}))  # fmt: skip
    assert names == ["layers.0.experts.0"]
