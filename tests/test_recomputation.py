"""Activation checkpointing: a recomputation that rounds differently decides as its forward did."""

import pytest
import torch
from helpers import gradients, randomise
from helpers_decoder import D, decoder_of
from helpers_routers import ROUTERS
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from moe_builders.decisions import Decisions
from moe_builders.experts import GroupedExperts
from moe_builders.moe import MoE, moe_layers
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.capacity import Capacity
from moe_builders.routing import TokenInfo, route_by_choice

B, S, E = 2, 20, 8
LIMITS = {
    "position": Capacity(factor=0.7, eval_factor=0.7, minimum=1),
    "probs": Capacity(factor=0.7, eval_factor=0.7, minimum=1, drop="probs"),
    "padded": Capacity(
        factor=0.7, eval_factor=0.7, minimum=1, scope="micro", drop="probs", pad=True
    ),
}
WHOLE = ("token_index", "num_tokens_per_expert", "slot_of", "selected", "kept")
NEVER_ELSEWHERE = ("hash", "forced balance")  # they do not look at what is rounded


def model_with(make, capacity=None, *, tied=False):
    """One layer whose router ``make`` gives; tied: all of its logits are equal."""

    def mlp(_):
        router = make(D, E)
        experts = GroupedExperts(dim=D, hidden_dim=6, num_experts=E)
        return MoE(router=router, experts=experts, capacity=capacity)

    model = decoder_of(num_layers=1, mlp=mlp)
    if tied:
        nn.init.zeros_(model.layers[0].mlp.router.gate.weight)
    model.activation_checkpointing = True
    return model


def perturb_from(model, first):
    """What routers see and what they multiply it with: as if rounded very badly from then on.

    Returns:
        What each router (with its capacity) gave, call by call; the forwards that are perturbed are
        those after the first ``first``.
    """
    found, stream = [], torch.Generator().manual_seed(0)

    def perturb(router, given):
        if len(found) < first:
            return given
        noise = [torch.randn(v.shape, generator=stream) for v in (given[0], *router.parameters())]
        for parameter, own in zip(router.parameters(), noise[1:], strict=True):
            parameter.data.add_(0.3 * own)  # what it is multiplied with: a tie of zeros is undone
        return given[0] + 0.3 * noise[0], given[1]

    for _, layer in moe_layers(model):
        router, limit = layer.router, layer.capacity
        router.register_forward_pre_hook(perturb)
        if limit is None:
            router.register_forward_hook(lambda _, given, out: found.append(out))
        else:
            layer.capacity = Noting(limit, found)
    return found


class Noting(Capacity):
    """A capacity that notes what it gives."""

    def __init__(self, limit, found):
        object.__setattr__(self, "inner", limit)
        object.__setattr__(self, "found", found)

    def limit(self, routing, *, training):
        self.found.append(self.inner.limit(routing, training=training))
        return self.found[-1]


def tokens_and_info():
    stream = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 17, (B, S), generator=stream)
    mask = torch.arange(B * S) % 7 != 3
    rows = torch.arange(B).repeat_interleave(S)
    return tokens, TokenInfo(mask=mask, sequence_ids=rows)


def same_integers(one, other):
    pairs = [(getattr(one, name), getattr(other, name)) for name in WHOLE]
    assert all((a is None) == (b is None) for a, b in pairs)
    return all(a is None or torch.equal(a, b) for a, b in pairs)


def assert_decides_again(model):
    """Forward and perturbed recomputation agree in every integer; two perturbed forwards do not."""
    found = perturb_from(model, 1)
    tokens, info = tokens_and_info()
    model(tokens, info=info).square().mean().backward()
    forward, recomputed = found
    assert torch.equal(forward.info.mask, info.mask)
    assert same_integers(forward, recomputed)
    assert not torch.equal(forward.logits, recomputed.logits)  # it was perturbed
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model(tokens, info=info)  # a forward of its own decides by itself
    return not same_integers(forward, found[2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_decides_again_what_it_decided(name, training):
    case = ROUTERS[name]
    if not training and case.causal_eval is None:
        pytest.skip("the router refuses to be evaluated")
    moved = assert_decides_again(model_with(case.make).train(training))
    assert moved or name in NEVER_ELSEWHERE


@pytest.mark.parametrize("policy", ["random", "threshold"])
@pytest.mark.parametrize("limit", LIMITS)
def test_drops_are_decided_again(limit, policy):
    from moe_builders.routers import ThresholdRouter

    def make(dim, num_experts):
        return ThresholdRouter(
            dim=dim, num_experts=num_experts, policy=policy, capacity_factor=None, threshold=0.4
        )

    assert assert_decides_again(model_with(make, LIMITS[limit]))


@pytest.mark.parametrize("kind", ["logit_gaussian", "input_uniform", "gumbel"])
def test_noise_of_the_gate_is_drawn_again_as_it_was(kind):
    """What a recomputation does not call draws nothing: what comes after draws the same."""

    def make(dim, num_experts):
        return TokenChoiceTopKRouter(
            dim=dim, num_experts=num_experts, experts_per_token=2, jitter=kind, jitter_scale=0.3
        )

    assert assert_decides_again(model_with(make))


@pytest.mark.parametrize("name", ["token choice", "token choice, groups", "expert choice, bare"])
def test_exact_ties_stay_as_they_fell(name):
    assert assert_decides_again(model_with(ROUTERS[name].make, tied=True))


def test_two_forwards_keep_their_own_decisions():
    model = model_with(ROUTERS["token choice"].make)
    found = perturb_from(model, 2)
    tokens, info = tokens_and_info()
    losses = [model(t, info=info).square().mean() for t in (tokens, tokens.flip(1))]
    for loss in losses:
        loss.backward()
    first, second, first_again, second_again = found
    assert not same_integers(first, second)
    assert same_integers(first, first_again)
    assert same_integers(second, second_again)


def test_backward_twice_recomputes_twice():
    model = model_with(ROUTERS["token choice"].make)
    found = perturb_from(model, 1)
    tokens, info = tokens_and_info()
    loss = model(tokens, info=info).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(found) == 3
    assert same_integers(found[0], found[1])
    assert same_integers(found[0], found[2])


def test_a_router_of_ones_own_needs_one_line():
    class Best(nn.Module):
        def __init__(self, dim, num_experts):
            super().__init__()
            self.gate, self.num_experts = nn.Linear(dim, num_experts), num_experts

        def forward(self, x, info):
            logits = self.gate(x)
            probs = logits.softmax(-1)
            expert = info.decided(lambda: logits.detach().topk(1).indices)
            weights = probs.gather(1, expert)
            return route_by_choice(
                expert=expert, weights=weights, logits=logits, probs=probs, info=info
            )

    assert assert_decides_again(model_with(Best))


def test_what_is_kept_is_what_the_routing_holds():
    """No memory of its own: the selection is the very tensor that ``Routing.selected`` is."""
    model = model_with(ROUTERS["token choice"].make)
    _, info = tokens_and_info()
    kept = []

    class Noting(Decisions):
        def take(self, choose):
            kept.append(super().take(choose))
            return kept[-1]

    router = model.layers[0].mlp.router
    noting = TokenInfo(mask=info.mask, decisions=Noting())
    routing = router(torch.randn(B * S, D), noting)
    assert len(kept) == 1
    assert kept[0] is routing.selected


def test_without_recomputation_nothing_is_kept():
    model = model_with(ROUTERS["token choice"].make)
    tokens, info = tokens_and_info()
    with torch.no_grad():
        model(tokens, info=info)
    assert model.layers[0].mlp.last_routing.info.decisions is None


def test_a_bare_checkpoint_would_decide_anew():
    """The control: the same layer, the same perturbation, torch's checkpoint without decisions."""
    model = model_with(ROUTERS["token choice"].make)
    found = perturb_from(model, 1)
    moe = model.layers[0].mlp
    x = torch.randn(B * S, D, requires_grad=True)
    out = torch_checkpoint.checkpoint(moe, x, TokenInfo(), use_reentrant=False)
    out.sum().backward()
    assert not same_integers(*found)
    assert gradients(randomise(moe))


def test_weights_that_are_drawn_from_the_inputs_bits_are_drawn_again():
    model = model_with(ROUTERS["forced balance, noise"].make)
    found = perturb_from(model, 1)
    tokens, info = tokens_and_info()
    model(tokens, info=info).square().mean().backward()
    assert torch.equal(found[0].weights, found[1].weights)
