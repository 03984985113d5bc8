"""The counting sort against the twin's sort: the same numbers everywhere."""

import pytest
import torch
from helpers import quick
from helpers_triton import DEVICES, kernels_run, poisoned
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.ops import permute
from moe_builders.ops.triton.sort import sort_by_expert


def assert_same(expert, num_experts, live):
    got = sort_by_expert(expert, num_experts, live)
    wanted = permute.sort_by_expert(expert, num_experts, live)
    for name, mine, theirs in zip(got._fields, got, wanted, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert mine.shape == theirs.shape, name
        assert torch.equal(mine, theirs), name
    return got


@quick
@given(
    t=st.integers(0, 150),
    k=st.integers(1, 3),
    e=st.integers(1, 9),
    skew=st.sampled_from([1, 4]),
    dead=st.sampled_from([None, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 999),
)
def test_any_shape_on_the_interpreter_or_the_gpu(t, k, e, skew, dead, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = torch.Generator().manual_seed(seed)
    expert = (torch.rand(t, k, generator=stream) ** skew * e).long()  # a skew leaves some empty
    live = None if dead is None else (torch.rand(t, k, generator=stream) >= dead).to(device)
    with kernels_run(), poisoned():
        assert_same(expert.to(device), e, live)


# one tile exactly, one more; experts of more than one tile, more experts than a tile has places
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("t", "k", "e"), [(64, 2, 4), (129, 1, 4), (600, 1, 2), (100, 8, 128), (130, 6, 512)]
)
def test_many_tiles_and_many_experts(device, t, k, e):
    expert = torch.rand(t, e).topk(min(k, e)).indices.to(device)
    assert_same(expert, e, (torch.rand(expert.shape) > 0.2).to(device))
    assert_same(expert, e, None)


@pytest.mark.parametrize("device", DEVICES)
def test_all_at_the_last_expert(device):
    got = assert_same(torch.full((200, 2), 299, device=device), 300, None)
    assert got.order.tolist() == list(range(400))  # stable


@pytest.mark.parametrize("device", DEVICES)
def test_other_layouts_and_integers(device):
    expert = torch.randint(0, 5, (3, 70)).to(device).t()
    live = (torch.rand(70, 1) > 0.3).to(device).expand(70, 3)
    assert_same(expert, 5, live)
    assert_same(expert.int(), 5, live)


@pytest.mark.parametrize("device", DEVICES)
def test_experts_that_do_not_exist_are_dead(device):
    expert = torch.tensor([[0, 7], [-1, 1], [2, 1]], device=device)
    got = sort_by_expert(expert, 3, None)
    assert got.num_tokens_per_expert.tolist() == [1, 2, 1]
    assert got.order.tolist() == [0, 3, 5, 4, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_every_run(device):
    expert = torch.randint(0, 11, (500, 3)).to(device)
    first = sort_by_expert(expert, 11, None)
    for _ in range(3):
        for mine, before in zip(sort_by_expert(expert, 11, None), first, strict=True):
            assert torch.equal(mine, before)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("t", [0, 70])
def test_the_operator_takes_it_where_it_runs(t, masked, monkeypatch):
    """What GPU tensors go through, told that a CPU has kernels."""
    expert = torch.randint(0, 5, (t, 2))
    live = torch.rand(t, 2) > 0.3 if masked else None
    wanted = permute.sort_by_expert(expert, 5, live)
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return sort_by_expert(*arguments)

    operator = torch.ops.moe_builders.sort_by_expert.default
    monkeypatch.setattr("moe_builders.ops.triton.sort.sort_by_expert", spy)
    operator(expert, 5, live)
    assert not calls
    monkeypatch.setattr(permute, "available", lambda device: device == expert.device)
    for mine, theirs in zip(operator(expert, 5, live), wanted, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert len(calls) == 1
    torch.library.opcheck(operator, (expert, 5, live))
