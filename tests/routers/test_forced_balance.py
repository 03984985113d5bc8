"""Forced balance: loads by construction, known unevenness, the same routing for the same input."""

import math

import pytest
import torch
from helpers import assert_near, quick, randomise
from helpers_decoder import D, batch, decoder_of
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.losses import load_balancing_loss
from moe_builders.moe import MoE, collect_routing
from moe_builders.routers import ForcedBalanceRouter
from moe_builders.routers.forced_balance import _fraction, _mix, _uniform
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routing import TokenInfo, check_routing, dense_weights


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 8, "experts_per_token": 3} | changes
    return randomise(ForcedBalanceRouter(**arguments))


def test_experts_in_turn():
    router = router_of(skip_first_n_experts=3)
    routing = router(torch.randn(4, 6), TokenInfo())
    check_routing(routing)
    assert routing.selected.tolist() == [[3, 4, 5], [6, 7, 3], [4, 5, 6], [7, 3, 4]]
    assert_near(routing.weights, torch.full((12,), 1 / 3), 1e-7)


@quick
@given(
    e=st.integers(1, 9),
    k=st.integers(1, 9),
    skip=st.integers(0, 8),
    t=st.integers(1, 20),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.booleans(),
)
def test_promises(e, k, skip, t, noise, masked):
    k = min(k, e)
    skip = min(skip, e - k)
    router = router_of(num_experts=e, experts_per_token=k, skip_first_n_experts=skip, noise=noise)
    x, mask = torch.randn(t, 6), torch.rand(t) > 0.4 if masked else None
    routing = router(x, TokenInfo(mask=mask))
    check_routing(routing)
    real = t if mask is None else int(mask.sum())
    assert all(len(set(row)) == k for row in routing.selected.tolist())
    counts = routing.num_tokens_per_expert
    assert counts.sum() == real * k
    assert counts[:skip].sum() == 0
    if noise == 0:
        assert counts[skip:].max() - counts[skip:].min() <= 1
    total = dense_weights(routing).sum(-1)
    assert_near(total, torch.ones(t) if mask is None else mask.float(), 1e-6)
    if mask is not None and real:  # padding changes nothing
        alone = router(x[mask], TokenInfo())
        assert torch.equal(routing.selected[mask], alone.selected)
        assert torch.equal(dense_weights(routing)[mask], dense_weights(alone))


@pytest.mark.parametrize(("noise", "load"), [(0.1, 1.2), (0.3, 1.6), (0.5, 2.0), (1.0, 2.8)])
def test_the_load_is_as_uneven_as_documented(noise, load):
    router = router_of(num_experts=64, experts_per_token=8, noise=noise)
    found = []
    for seed in range(12):
        x = torch.randn(2048, 6, generator=torch.Generator().manual_seed(seed))
        counts = router(x, TokenInfo()).num_tokens_per_expert.double()
        found.append(float(counts.max() / counts.mean()))
    assert sum(found) / 12 == pytest.approx(load, rel=0.1)
    assert max(found) > min(found)


@pytest.mark.parametrize("noise", [0.25, 1.0])
def test_drawn_weights(noise):
    """(1 - noise) / k + noise · u / Σ u with u uniform."""
    router = router_of(noise=noise)
    weights = dense_weights(router(torch.randn(4000, 6), TokenInfo()))
    drawn = weights[weights > 0]
    assert len(drawn) == 12000
    assert drawn.min() >= (1 - noise) / 3
    u = torch.rand(200_000, 3)
    wanted = (1 - noise) / 3 + noise * u / u.sum(-1, keepdim=True)
    assert drawn.mean() == pytest.approx(1 / 3, abs=1e-5)
    assert drawn.std() == pytest.approx(float(wanted.std()), rel=0.02)


def test_same_input_same_routing_and_no_random_stream_is_used():
    router = router_of(noise=0.5)
    x = torch.randn(50, 6)
    state = torch.get_rng_state()
    first = router(x, TokenInfo())
    torch.rand(1)
    second = router(x.clone(), TokenInfo())
    torch.set_rng_state(state)
    assert torch.equal(first.selected, second.selected)
    assert torch.equal(first.weights, second.weights)
    router(x, TokenInfo())
    assert torch.equal(torch.get_rng_state(), state)
    for element in range(4):  # each of the first four counts, down to its last bit
        other = x.clone()
        other[0, element] = torch.nextafter(x[0, element], torch.tensor(math.inf))
        assert not torch.equal(router(other, TokenInfo()).selected, first.selected)
    other = x.clone()
    other[0, 4:] = 0
    other[1:] = torch.randn(49, 6)
    assert torch.equal(router(other, TokenInfo()).selected, first.selected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions(dtype):
    router = router_of(noise=0.5).to(dtype)
    routing = router(torch.randn(9, 6).to(dtype), TokenInfo())
    check_routing(routing)
    wide = torch.promote_types(dtype, torch.float32)
    assert routing.weights.dtype == routing.logits.dtype == wide
    narrow = router_of(dim=2, noise=0.5)(torch.randn(3, 2), TokenInfo())  # less than four elements
    check_routing(narrow)


def test_masked_first_tokens_do_not_count():
    router = router_of(noise=0.5)
    x, mask = torch.randn(10, 6), torch.arange(10) > 1
    first = router(x, TokenInfo(mask=mask))
    x[:2] = float("nan")
    second = router(x, TokenInfo(mask=mask))
    check_routing(second)
    assert torch.equal(first.selected[2:], second.selected[2:])
    nothing = router(x, TokenInfo(mask=torch.zeros(10, dtype=torch.bool)))
    check_routing(nothing)
    assert nothing.num_tokens_per_expert.sum() == 0


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_causal(noise):
    router = router_of(noise=noise)
    assert router.causal
    x = torch.randn(12, 6)
    whole, short = router(x, TokenInfo()), router(x[:7], TokenInfo())
    assert torch.equal(dense_weights(whole)[:7], dense_weights(short))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_gate_is_watched_but_gets_no_gradient_from_the_weights(noise):
    router = router_of(noise=noise)
    layer = MoE(router=router, experts=GroupedExperts(dim=6, hidden_dim=5, num_experts=8))
    x = torch.randn(11, 6)
    randomise(layer)(x).square().sum().backward()
    assert router.gate.weight.grad is None
    routing = layer.last_routing
    assert_near(routing.logits, x @ router.gate.weight.t(), 1e-6)
    assert_near(routing.probs, routing.logits.softmax(-1), 1e-6)
    load_balancing_loss(routing, scope="micro").backward()
    assert router.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(noise):
    def mlp(layer):
        router = ForcedBalanceRouter(dim=D, num_experts=4, experts_per_token=2, noise=noise)
        return MoE(router=router, experts=GroupedExperts(dim=D, hidden_dim=8, num_experts=4))

    tokens, info = batch()
    gradients = []
    for checkpointing in (False, True):
        model = decoder_of(mlp=mlp)
        model.activation_checkpointing = checkpointing
        model(tokens, info=info).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(collect_routing(model)) == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_no_value_is_read_on_the_host(noise):
    router = router_of(noise=noise).to("meta")
    x, mask = torch.empty(12, 6, device="meta"), torch.empty(12, dtype=torch.bool, device="meta")
    assert router(x, TokenInfo(mask=mask)).selected.shape == (12, 3)
    torch._dynamo.reset()
    router = router_of(noise=noise)
    graph = torch.compile(router, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, 6)
    assert torch.equal(graph(x, TokenInfo()).selected, router(x, TokenInfo()).selected)


def test_the_hash_is_fair():
    key = torch.tensor(17)
    drawn = _uniform(key, torch.arange(2**16), stream=1)
    assert 0 < drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert torch.erfinv(2 * _fraction(torch.tensor([0, 2**32 - 1])) - 1).isfinite().all()
    bins = torch.bincount((drawn * 64).long(), minlength=64).double()
    assert ((bins - 1024).square() / 1024).sum() < 110  # chi², 63 degrees: 99.98 %
    for other in (
        _uniform(key, torch.arange(1, 2**16 + 1), stream=1),
        _uniform(key, torch.arange(2**16), stream=2),
        _uniform(key + 1, torch.arange(2**16), stream=1),
    ):
        assert torch.corrcoef(torch.stack([drawn, other]))[0, 1].abs() < 0.02
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    wanted = []
    for word in words.tolist():  # Python's own numbers never overflow
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            word = ((word ^ (word >> shift)) * factor) % 2**32
        wanted.append(word ^ (word >> 15))
    assert _mix(words).tolist() == wanted


def test_a_selection_can_be_replayed():
    router = router_of(skip_first_n_experts=2)
    assert isinstance(router.replay, ReplaySlot)
    wanted = torch.tensor([[5, 1, 0]]).repeat(4, 1)
    router.replay = lambda expert: wanted
    assert torch.equal(router(torch.randn(4, 6), TokenInfo()).selected, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token is 0"),
        ({"experts_per_token": 9}, r"experts_per_token is 9.*num_experts \(8\)"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": 1.1}, "noise is 1.1"),
        ({"skip_first_n_experts": -1}, "skip_first_n_experts is -1"),
        ({"skip_first_n_experts": 6}, "is 6, but must lie between 0 and 5, so that 3 of 8"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        router_of(**changes)
