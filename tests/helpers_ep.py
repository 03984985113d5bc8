"""A layer whose experts are dealt out over gloo ranks, beside the same layer whole."""

import torch
import torch.distributed as dist
from helpers import randomise
from helpers_routers import DIM, EXPERTS, ROUTERS, info_of, router_in_mode
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.moe import MoE, moe_layer
from moe_builders.parallel.expert_parallel import deal_out_experts
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.capacity import Capacity
from moe_builders.routing import TokenInfo

TOKENS = (5, 3, 9, 0)  # of each rank
NAME = "layers.0.mlp.experts"


def _token_choice(**changes):
    arguments = {"experts_per_token": 2} | changes
    return TokenChoiceTopKRouter(dim=DIM, num_experts=EXPERTS, **arguments)


def _layer(*, router=None, experts=None, **changes):
    plain = {"hidden_dim": 4, "dim": DIM, "num_experts": EXPERTS}
    return MoE(
        router=router or _token_choice(), experts=GroupedExperts(**plain | (experts or {})),
        **changes,
    )  # fmt: skip


LAYERS = {
    "plain": lambda: _layer(),
    "before": lambda: _layer(score_position="before"),
    "mid, biases": lambda: _layer(
        score_position="mid", experts={"bias": True, "activation": "gpt_oss"}
    ),
    "biases, scale, ungated": lambda: _layer(
        experts={"bias": True, "hidden_scale": True, "activation": "relu2"}
    ),
    "capacity": lambda: _layer(capacity=Capacity(factor=1.0)),
    "capacity, padded": lambda: _layer(
        capacity=Capacity(factor=1.0, scope="micro", pad=True), score_position="before",
        experts={"bias": True},
    ),
    "one expert a token": lambda: _layer(router=_token_choice(experts_per_token=1)),
    "all experts a token": lambda: _layer(router=_token_choice(experts_per_token=EXPERTS)),
    "shared, latent": lambda: moe_layer(
        embed_dim=DIM, expert_hidden_dim=4, num_experts=EXPERTS, experts_per_token=3,
        shared_hidden_dim=4, shared_gate=True, latent_dim=3, latent_bias=True,
    ),
    **{f"router: {name}": (lambda name=name: _layer(router=ROUTERS[name].make(DIM, EXPERTS)))
       for name in ROUTERS},
}  # fmt: skip


def inputs_of(rank, dtype=torch.float64):
    """x [t, d] and its info, ragged; rank 3 has nothing, rank 1 is all padding, rank 0 in part
    (NaN stands there)."""
    t = TOKENS[rank]
    stream = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(t, DIM, generator=stream, dtype=torch.float64).to(dtype)
    mask = {0: torch.arange(t) != 2, 1: torch.zeros(t, dtype=torch.bool)}.get(rank)
    info = info_of(t, mask, documents=min(2, t))
    if mask is not None:
        x = x.masked_fill(~mask[:, None], float("nan"))
    return x, info


def built(name, dtype):
    layer = randomise(LAYERS[name]()).to(dtype)
    if name.startswith("router: "):
        layer.router = router_in_mode(name.removeprefix("router: "), training=True, dtype=dtype)
    return layer


def backward_of(layer, rank, dtype):
    x, info = inputs_of(rank, dtype)
    x = x.requires_grad_()
    torch.manual_seed(7)  # of routers that draw
    out = layer(x, info)
    stream = torch.Generator().manual_seed(rank)
    weight = torch.randn(out.shape, generator=stream, dtype=torch.float64).to(dtype)
    real = torch.ones(len(x), dtype=torch.bool) if info.mask is None else info.mask
    # shared experts answer masked tokens too, from NaN here
    (torch.where(real[:, None], out, 0) * weight).sum().backward()
    return out.detach(), x.grad


def parted(layer, mesh, dispatcher):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].mlp = layer
    deal_out_experts(model, NAME, mesh, dispatcher=dispatcher)
    return layer


def compare_layers(names, dispatcher, ep, dtype=torch.float64):
    """{layer: worst relative difference of outputs and gradients, over all ranks}."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size // ep, ep), mesh_dim_names=("rest", "ep"))["ep"]
    group = dist.get_process_group_ranks(mesh.get_group())
    worst = {}
    for name in names:
        layer = parted(built(name, dtype), mesh, dispatcher)
        out, x_grad = backward_of(layer, rank, dtype)
        wanted, experts = None, {}
        for other in group:
            whole = built(name, dtype)
            answer = backward_of(whole, other, dtype)
            for key, parameter in whole.experts.named_parameters():
                experts[key] = experts.get(key, 0) + parameter.grad
            if other == rank:
                wanted, own = answer, whole
        found = [difference(out, wanted[0]), difference(x_grad, wanted[1])]
        each = EXPERTS // ep
        part = slice(mesh.get_local_rank() * each, (mesh.get_local_rank() + 1) * each)
        for key, parameter in layer.named_parameters():
            if key.startswith("experts."):
                assert parameter.shape[0] == EXPERTS
                assert isinstance(parameter.grad, DTensor), key
                got, right = parameter.grad.to_local(), experts[key.removeprefix("experts.")][part]
            else:
                got, right = parameter.grad, own.get_parameter(key).grad
            if got is None or right is None:
                assert got is right is None, (name, key)
                continue
            found.append(difference(got, right))
        worst[name] = max(found)
    everybody = [None] * size
    dist.all_gather_object(everybody, worst)
    return {name: max(each[name] for each in everybody) for name in names}


def difference(got, wanted):
    """max|Δ| / max|wanted|, NaN in the same places."""
    assert torch.equal(got.isnan(), wanted.isnan())
    if not wanted.numel():
        return 0.0
    got, wanted = got.nan_to_num().double(), wanted.nan_to_num().double()
    scale = float(wanted.abs().max()) or 1.0
    return float((got - wanted).abs().max()) / scale


def refusals(cases):
    """What deal_out_experts says to experts that cannot be dealt out; the same on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    said = {}
    for name, experts in cases.items():
        layer = _layer()
        layer.experts = experts
        try:
            parted(layer, mesh, "all_to_all")
        except InputError as error:
            said[name] = str(error)
    return said


def idle_experts(dispatcher):
    """Gradients [e, …] of experts that no token of any rank chose."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    layer = parted(built("plain", torch.float64), mesh, dispatcher)
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[:2] += 1.0  # experts 0 and 1 for positive sums, others are not
    x = torch.ones(3, DIM, dtype=torch.float64, requires_grad=True)
    layer(x, TokenInfo()).sum().backward()
    gradient = layer.experts.down_proj.grad
    assert gradient is not None, "zero, not None: decay and momentum treat all alike"
    here = gradient.to_local().abs().sum((1, 2))  # [j]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, here)
    return torch.cat(found)
