"""Experts on the host: the resident ones' answers, and never more of them than agreed."""

import copy

import pytest
import torch
from helpers import assert_near, randomise
from helpers_decoder import D, batch, decoder_of
from torch import nn

from moe_builders.errors import InputError
from moe_builders.expert_offload import OffloadedExperts, offload_experts
from moe_builders.experts import GroupedExperts
from moe_builders.experts.expert_list import ExpertList
from moe_builders.moe import MoE, moe_layer

CPU = torch.device("cpu")


def experts_of(dtype=torch.float32, **options):
    sizes = {"dim": 8, "hidden_dim": 12, "num_experts": 6} | options
    return randomise(GroupedExperts(**sizes)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gpt_oss", "bias": True, "hidden_scale": True},
        {"activation": "relu2", "backend": "loop", "hidden_dim": 7},
    ],
    ids=["swiglu", "gpt_oss with everything", "relu2 in a loop"],
)
@pytest.mark.parametrize("cache_size", [1, 3, 6])
def test_the_same_bits_and_never_more_than_agreed(cache_size, options, dtype):
    experts = experts_of(dtype, **options)
    offloaded = OffloadedExperts(experts, cache_size=cache_size, device=CPU)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weighted in (False, True, False, True, False):
            counts = torch.randint(0, 4, (6,), generator=stream)
            rows = int(counts.sum()) + 3  # and dead ones
            x = torch.randn(rows, 8, generator=stream).to(dtype)
            weights = torch.rand(rows, generator=stream) if weighted else None
            x[rows - 3 :] = float("nan")
            got = offloaded(x, counts, weights)
            assert torch.equal(got, experts(x, counts, weights))
            assert 0 < len(offloaded.resident) <= cache_size
            assert all(len(slots) == cache_size for slots in offloaded._slots.values())


def test_the_longest_unused_makes_room():
    offloaded = OffloadedExperts(experts_of(), cache_size=2, device=CPU)

    def use(*experts):
        counts = torch.zeros(6, dtype=torch.int64)
        counts[list(experts)] = 1
        with torch.no_grad():
            offloaded(torch.randn(len(experts), 8), counts)
        return offloaded.resident, offloaded.hits, offloaded.misses

    assert use(4) == ((4,), 0, 1)
    assert use(2) == ((4, 2), 0, 2)
    assert use(4) == ((2, 4), 1, 2)  # used again: 2 is next to go
    assert use(5) == ((4, 5), 1, 3)
    # what is there comes first, whatever its number: 5 is not thrown out for 1
    assert use(1, 5) == ((5, 1), 2, 4)
    assert use(0, 1, 2) == ((0, 2), 3, 6)
    assert use() == ((0, 2), 3, 6)


def test_a_model_with_offloaded_experts():
    model = decoder_of().eval()
    tokens, info = batch()
    with torch.no_grad():
        wanted = model(tokens, info=info)
    offloaded = copy.deepcopy(model)
    before = set(offloaded.state_dict())
    offload_experts(offloaded, cache_size=2, device=CPU)
    layers = [m for m in offloaded.modules() if isinstance(m, MoE)]
    assert len(layers) == 2
    with torch.no_grad():
        for _ in range(2):
            got = offloaded(tokens, info=info)
            assert torch.equal(got, wanted)
    for layer in layers:
        assert len(layer.experts.resident) == 2
        assert layer.experts.misses >= 4
    # the weights are no longer the module's, and it says so
    gone = before - set(offloaded.state_dict())
    assert gone == {n for n in before if ".mlp.experts." in n}
    assert not list(layers[0].experts.parameters())


def test_offloaded_experts_do_not_train():
    offloaded = OffloadedExperts(experts_of(), cache_size=2, device=CPU)
    with pytest.raises(InputError, match="offloaded experts have no gradients: call the model "):
        offloaded(torch.randn(6, 8), torch.ones(6, dtype=torch.int64))


def listed_layer():
    moe = moe_layer(embed_dim=D, expert_hidden_dim=8, num_experts=4)
    return MoE(router=moe.router, experts=ExpertList([nn.Identity() for _ in range(4)]))


def test_refused():
    for size in (0, 7):
        with pytest.raises(InputError, match=f"cache_size is {size}, but must be from 1 to .*6"):
            OffloadedExperts(experts_of(), cache_size=size, device=CPU)
    with torch.device("meta"):
        empty = GroupedExperts(dim=8, hidden_dim=12, num_experts=6)
    with pytest.raises(InputError, match="gate_up_proj is a Tensor on meta, but only plain"):
        OffloadedExperts(empty, cache_size=2, device=CPU)
    with pytest.raises(InputError, match="Linear without a MoE layer has no experts"):
        offload_experts(nn.Linear(2, 2), cache_size=2, device=CPU)
    layers = nn.ModuleList(
        [moe_layer(embed_dim=D, expert_hidden_dim=8, num_experts=4), listed_layer()]
    )
    with pytest.raises(InputError, match="experts of 1 are ExpertList, but only GroupedExperts"):
        offload_experts(layers, cache_size=2, device=CPU)
    assert isinstance(layers[0].experts, GroupedExperts)  # all or nothing


def test_the_experts_given_are_not_changed():
    experts = experts_of()
    kept = {name: value.clone() for name, value in experts.state_dict().items()}
    offloaded = OffloadedExperts(experts, cache_size=1, device=CPU)
    counts = torch.ones(6, dtype=torch.int64)
    with torch.no_grad():
        offloaded(torch.randn(6, 8), counts)
    for name, value in experts.state_dict().items():
        assert_near(value, kept[name], 0, name)
