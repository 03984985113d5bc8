"""Noise on a gate: in training only, the same when it is asked for again, never in the tokens."""

import pytest
import torch
from helpers import assert_near, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_builders.errors import InputError
from moe_builders.losses import router_z_loss
from moe_builders.moe import moe_layer
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.gate import Jitter, gate_logits, jittered_logits, make_jitter
from moe_builders.routing import TokenInfo, dense_weights

KINDS = ["logit_gaussian", "input_uniform", "gumbel"]


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 8, "experts_per_token": 3} | changes
    return randomise(TokenChoiceTopKRouter(**arguments))


def routed(router, x, seed=0):
    torch.manual_seed(seed)
    return router(x, TokenInfo())


@pytest.mark.parametrize("kind", KINDS)
def test_noise_in_training_only_and_the_same_for_the_same_seed(kind):
    router, quiet = router_of(jitter=kind, jitter_scale=0.5), router_of()
    x = torch.randn(40, 6)
    wanted = dense_weights(routed(quiet, x))
    first, again, other = (dense_weights(routed(router, x, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, wanted)
    assert ((first > 0) != (wanted > 0)).any()  # the choice, too
    router.eval()
    before = torch.get_rng_state()
    assert torch.equal(dense_weights(router(x, TokenInfo())), wanted)
    assert torch.equal(torch.get_rng_state(), before)
    router.train().jitter = None  # a plain attribute
    assert torch.equal(dense_weights(router(x, TokenInfo())), wanted)
    router.jitter = Jitter(kind, 0.0)
    assert torch.equal(dense_weights(router(x, TokenInfo())), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_what_it_says(kind):
    gate, scale = nn.Linear(400, 50, bias=False).requires_grad_(False), 0.3
    x = torch.randn(2000, 400)
    torch.manual_seed(3)
    clean, noised = jittered_logits(gate, x, Jitter(kind, scale), training=True)
    plain = gate_logits(gate, x)
    noise = (noised - plain).flatten().double()
    if kind == "gumbel":
        assert torch.equal(clean, plain)
        assert noise.mean() == pytest.approx(scale * 0.5772, abs=0.01)
        assert noise.std() == pytest.approx(scale * 1.2825, rel=0.02)
        return
    assert clean is noised
    if kind == "logit_gaussian":
        assert noise.mean() == pytest.approx(0, abs=0.005)
        assert noise.std() == pytest.approx(scale, rel=0.01)
        return
    torch.manual_seed(3)
    factor = torch.empty_like(x).uniform_(1 - scale, 1 + scale)
    assert_near(noised, (x * factor) @ gate.weight.t(), 1e-6)
    assert factor.min() == pytest.approx(0.7, abs=1e-3)
    assert factor.max() == pytest.approx(1.3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_are_left_as_they_are(kind, dtype):
    """The experts see x without noise, in bf16, too, where the gate is computed in fp32."""
    router = router_of(jitter=kind, jitter_scale=0.5).to(dtype)
    x = torch.randn(30, 6).to(dtype).requires_grad_()
    before, version = x.detach().clone(), x._version
    routing = routed(router, x)
    assert torch.equal(x.detach(), before)
    assert x._version == version
    assert routing.logits.dtype == routing.weights.dtype == routing.probs.dtype == torch.float32
    fine = routing.probs != routing.probs.bfloat16().float()
    assert fine.float().mean() > 0.9  # the noise itself is not rounded to bf16
    (routing.weights.square().sum() + routing.probs.square().sum()).backward()
    assert x.grad.isfinite().all()
    assert router.gate.weight.grad.abs().sum() > 0


def test_noise_on_bf16_tokens_is_drawn_and_multiplied_in_fp32():
    gate, x = nn.Linear(6, 8, bias=False).requires_grad_(False).bfloat16(), torch.randn(30, 6)
    x = x.bfloat16()
    torch.manual_seed(3)
    _, noised = jittered_logits(gate, x, Jitter("input_uniform", 0.5), training=True)
    torch.manual_seed(3)
    factor = torch.empty(30, 6).uniform_(0.5, 1.5)
    assert_near(noised, (x.float() * factor) @ gate.weight.float().t(), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_compiles_into_the_same_graph(kind):
    torch._dynamo.reset()
    router, x = router_of(jitter=kind, jitter_scale=0.5), torch.randn(30, 6)
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    assert torch.equal(dense_weights(routed(compiled, x)), dense_weights(routed(router, x)))


@pytest.mark.parametrize("kind", KINDS)
def test_which_logits_are_the_noised_ones(kind):
    """z-loss: on the clean ones with gumbel, else on the noised; probs and choice: noised."""
    router, x = router_of(jitter=kind, jitter_scale=0.5), torch.randn(30, 6)
    routing = routed(router, x)
    torch.manual_seed(0)
    clean, noised = jittered_logits(router.gate, x, router.jitter, training=True)
    assert torch.equal(routing.logits, clean)
    assert torch.equal(routing.probs, noised.softmax(-1))
    assert torch.equal(routing.selected, noised.softmax(-1).topk(3).indices)
    plain = gate_logits(router.gate, x)
    assert torch.equal(routing.logits, plain) == (kind == "gumbel")
    seen = float(router_z_loss(routing).detach())
    quiet = float(plain.logsumexp(-1).square().mean().detach())
    assert (seen == pytest.approx(quiet)) == (kind == "gumbel")


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputation_sees_the_same_noise(kind):
    moe = randomise(
        moe_layer(
            embed_dim=8, expert_hidden_dim=4, num_experts=6, experts_per_token=2, jitter=kind,
            jitter_scale=0.5,
        )
    )  # fmt: skip
    x = torch.randn(20, 8)
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        moe.zero_grad()
        y = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
        torch.randn(7)  # other draws in between
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in moe.parameters())])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_refused():
    assert make_jitter(None, 0.0) is None
    assert make_jitter("gumbel", 0.0) == Jitter("gumbel", 0.0)
    with pytest.raises(InputError, match=r"jitter_scale is 0.1, but jitter is not set: choose"):
        make_jitter(None, 0.1)
    with pytest.raises(InputError, match=r"jitter 'normal' is not one of logit_gaussian"):
        Jitter("normal", 0.1)
    with pytest.raises(InputError, match=r"jitter_scale is nan, but must be at least 0"):
        Jitter("gumbel", float("nan"))
