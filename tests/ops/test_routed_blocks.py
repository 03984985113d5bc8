"""Experts a block at a time: the same numbers as all at once, and less memory between."""

import pytest
import torch
from helpers import assert_near

from moe_builders.ops import routed_blocks
from moe_builders.ops.activations import ACTIVATIONS
from moe_builders.ops.permute import sort_by_expert
from moe_builders.ops.routed_blocks import (
    Block,
    backward_blocks,
    find_blocks,
    forward_blocks,
)
from moe_builders.ops.routed_passes import (
    LEARNING,
    Given,
    How,
    backward_passes,
    forward_passes,
)

T, K, E, D, H = 29, 3, 7, 6, 10


def given_of(dtype=torch.float64, *, bias=True, tokens=True, slots=True, live=0.8, gated=True):
    """Ragged, experts 0, 3 and 6 (the first, one between, the last) idle, some choices dropped."""
    scores = torch.rand(T, E)
    scores[:, ::3] = -1
    found = sort_by_expert(scores.topk(K).indices, E, torch.rand(T, K) < live)
    width = 2 * H if gated else H

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    per_row = (T * K,)
    return Given(
        drawn(T if tokens else T * K, D), drawn(E, width, D), drawn(E, D, H),
        drawn(E, width) if bias else None, drawn(E, D) if bias else None,
        drawn(E, H) if bias else None, found.num_tokens_per_expert,
        found.token_index if tokens else None, found.slot_of if tokens and slots else None,
        drawn(*per_row) if tokens and bias else None, drawn(*per_row) if bias else None,
        drawn(*per_row) if tokens else None,
    )  # fmt: skip


def wanted_of(given):
    return [name for name in LEARNING if getattr(given, name) is not None]


def both(given, how, wanted=None):
    """(answer, z, gradients) all at once and in blocks; memory that nobody wrote is NaN."""
    wanted = wanted_of(given) if wanted is None else wanted
    blocks = find_blocks(given, how)
    assert len(blocks) > 1
    grad = torch.randn(given.x.shape, dtype=torch.float64).to(given.x.dtype)
    torch.use_deterministic_algorithms(True)
    try:
        y, z = forward_passes(given, how)
        one = y, z, backward_passes(grad, z, given, how, wanted)
        y, z = forward_blocks(given, how, blocks)
        many = y, z, backward_blocks(grad, z, given, how, wanted, blocks)
    finally:
        torch.use_deterministic_algorithms(False)
    return one, many


def assert_same(one, many, wanted):
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])
    assert set(many[2]) == set(wanted)
    for name in wanted:
        got, want = many[2][name], one[2][name]
        if name in ("up_bias", "down_bias", "hidden_scale"):  # of other products' sizes
            assert_near(got, want.to(got.dtype), 8 * torch.finfo(got.dtype).eps)
        else:
            assert torch.equal(got, want.to(got.dtype)), name


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("recompute_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "kind",
    [{}, {"slots": False}, {"tokens": False}, {"bias": False}, {"tokens": False, "bias": False},
     {"live": 0.1}, {"live": 2.0}],
    ids=str,
)  # fmt: skip
def test_the_same_bits(monkeypatch, kind, dtype, recompute_up, rows):
    monkeypatch.setattr(routed_blocks, "ROWS", rows)
    given = given_of(dtype, **kind)
    how = How(ACTIVATIONS["swiglu"], recompute_up, "auto", "auto")
    if len(find_blocks(given, how)) < 2:
        assert kind == {"live": 0.1}, "few rows"
        return
    assert_same(*both(given, how), wanted_of(given))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(monkeypatch, activation):
    monkeypatch.setattr(routed_blocks, "ROWS", 8)
    found = ACTIVATIONS[activation]
    given = given_of(gated=found.gated)
    one, many = both(given, How(found, False, "auto", "auto"))
    assert_near(many[0], one[0], 1e-14)  # where a vector ends, some functions are other ones
    for name in wanted_of(given):
        assert_near(many[2][name], one[2][name], 1e-14)


@pytest.mark.parametrize("name", LEARNING)
def test_one_gradient_alone(monkeypatch, name):
    monkeypatch.setattr(routed_blocks, "ROWS", 8)
    given = given_of()
    assert_same(*both(given, How(ACTIVATIONS["swiglu"], False, "auto", "auto"), [name]), [name])


def test_blocks_are_whole_experts_and_all_live_rows(monkeypatch):
    monkeypatch.setattr(routed_blocks, "ROWS", 10)
    counts = torch.tensor([3, 6, 0, 1, 25, 4, 0])
    given = given_of()._replace(num_tokens_per_expert=counts)
    how = How(ACTIVATIONS["swiglu"], False, "auto", "auto")
    assert find_blocks(given, how) == [
        Block(slice(0, 4), slice(0, 10)), Block(slice(4, 5), slice(10, 35)),
        Block(slice(5, 7), slice(35, 39)),
    ]  # fmt: skip


def test_who_takes_all_at_once(monkeypatch):
    given, swiglu = given_of(), ACTIVATIONS["swiglu"]
    assert find_blocks(given, How(swiglu, False, "auto", "auto")) == [], "few rows"
    monkeypatch.setattr(routed_blocks, "ROWS", 8)
    assert find_blocks(given, How(swiglu, False, "loop", "torch"))
    for how in (("auto", "triton"), ("grouped", "auto"), ("bmm", "auto"), ("gather", "auto")):
        assert find_blocks(given, How(swiglu, False, *how)) == []
    assert find_blocks(given_of(torch.bfloat16), How(swiglu, False, "auto", "auto")) == []
    nothing = given._replace(num_tokens_per_expert=torch.zeros(E, dtype=torch.int32))
    assert find_blocks(nothing, How(swiglu, False, "auto", "auto")) == []
