"""Experts that work in fewer dims, between two projections."""

import pytest
import torch
from helpers import assert_near, one_expert, randomise, reference_choice

from moe_builders.errors import InputError
from moe_builders.initialization import initialize
from moe_builders.moe import moe_layer
from moe_builders.routing import TokenInfo

D, N = 8, 3


def layer_of(**changes):
    arguments = {
        "embed_dim": D, "expert_hidden_dim": 5, "num_experts": 4, "experts_per_token": 2,
        "shared_hidden_dim": 7, "latent_dim": N, "latent_bias": True,
    }  # fmt: skip
    return randomise(moe_layer(**(arguments | changes))).double()


@pytest.mark.parametrize("position", ["after", "mid", "before"])
@pytest.mark.parametrize("bias", [False, True])
def test_by_hand(bias, position):
    """Router and shared experts see d, routed experts the latent space."""
    moe = layer_of(latent_bias=bias, score_position=position)
    x = torch.randn(9, D, dtype=torch.float64)
    down, up = moe.latent_down, moe.latent_up
    for token, got, chosen in zip(x, moe(x), reference_choice(moe.router, x), strict=True):
        small = down.weight @ token + (down.bias if bias else 0)
        before = position == "before"
        y = sum(
            one_expert(moe.experts, j, small * w)
            if before
            else w * one_expert(moe.experts, j, small)
            for j, w in chosen
        )
        wanted = up.weight @ y + (up.bias if bias else 0) + moe.shared_experts(token)
        assert_near(got, wanted, 1e-12)


def test_modules_and_shapes():
    moe = layer_of()
    assert (moe.latent_down.weight.shape, moe.latent_up.weight.shape) == ((N, D), (D, N))
    assert (moe.experts.dim, moe.router.gate.weight.shape) == (N, (4, D))
    assert moe.shared_experts.w1.weight.shape == (7, D)
    plain = layer_of(latent_dim=None, latent_bias=False)
    assert plain.latent_down is None
    assert plain.latent_up is None
    bare = layer_of(latent_bias=False)
    assert bare.latent_down.bias is None
    assert bare.latent_up.bias is None


def test_a_masked_token_stays_out_even_with_biases_and_nan():
    moe = layer_of(shared_hidden_dim=None)
    x = torch.randn(6, D, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, False])
    clean = moe(x, TokenInfo(mask=mask))
    clean.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in moe.named_parameters()}
    assert torch.equal(clean[~mask], torch.zeros(2, D, dtype=torch.float64))
    assert clean[mask].all()
    moe.zero_grad()
    dirty = x.clone()
    for fill in (1e4, float("nan")):
        moe.zero_grad()
        dirty[~mask] = fill
        got = moe._routed(dirty, moe.router(x, TokenInfo(mask=mask)))  # the gate's part aside
        assert torch.equal(got, clean)
        got.square().sum().backward()
        for name in ("latent_down.weight", "latent_down.bias", "latent_up.bias"):
            assert_near(moe.get_parameter(name).grad, wanted[name], 1e-12, name)


def test_fresh_weights():
    """Matrices N(0, std), biases 0; the caller need not switch gradients off."""
    moe = moe_layer(
        embed_dim=200, expert_hidden_dim=5, num_experts=4, latent_dim=100, latent_bias=True
    )
    assert torch.is_grad_enabled()
    initialize(moe, seed=1, std=0.02)
    for projection in (moe.latent_down, moe.latent_up):
        assert float(projection.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not projection.bias.any()


def test_refused():
    with pytest.raises(InputError, match="latent_dim is 0, but must be at least 1"):
        layer_of(latent_dim=0)
    with pytest.raises(InputError, match="latent_bias is true, but there is no latent_dim"):
        layer_of(latent_dim=None)
