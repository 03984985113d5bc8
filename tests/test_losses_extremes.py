"""Router losses at the ends of what logits can be, and at the two ends of balance."""

import pytest
import torch
from helpers import randomise
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_builders.counts import count_assignments
from moe_builders.losses import (
    load_balancing_loss,
    mse_balancing_loss,
    pooled_load_balancing_loss,
    router_own_loss,
    router_z_loss,
)
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo, route_by_choice
from moe_builders.training.objective import layer_loads

E, K = 8, 2
FUNCTIONS = ["softmax", "sigmoid", "topk_softmax", "topk_sigmoid"]
FORMS = {
    "sequence": lambda r: load_balancing_loss(r, scope="sequence"),
    "micro": lambda r: load_balancing_loss(r, scope="micro"),
    "global": lambda r: load_balancing_loss(r, scope="global", counts=count_assignments(r)),
    "first": lambda r: load_balancing_loss(r, scope="sequence", choices="first"),
    "hf": lambda r: pooled_load_balancing_loss([r, r]),
    "mse": lambda r: mse_balancing_loss(r, scope="micro"),
    "mse_sequence": lambda r: mse_balancing_loss(r, scope="sequence"),
}


def routing_of(logits, score_function):
    """A routing of these logits [t, e], as leaves of a graph: the gate passes them on."""
    router = TokenChoiceTopKRouter(
        dim=E, num_experts=E, experts_per_token=K, score_function=score_function
    ).to(logits.dtype)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(E))
    x = logits.clone().requires_grad_()
    ids = torch.arange(len(x)) // 4
    return x, router(x, TokenInfo(sequence_ids=ids))


@pytest.mark.parametrize("form", [*FORMS, "z"])
@pytest.mark.parametrize("score_function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_any_logits(form, score_function, dtype):
    wild = torch.randn(12, E, dtype=dtype, generator=torch.Generator().manual_seed(0))
    wild = wild.sign() * 1e4
    for logits in (wild, wild.abs(), -wild.abs(), wild * torch.eye(E, dtype=dtype)[0]):
        x, routing = routing_of(logits, score_function)
        assert (routing.probs.detach().sum(-1) - 1).abs().max() <= 1e-6
        loss = router_z_loss(routing) if form == "z" else FORMS[form](routing)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("score_function", FUNCTIONS)
@pytest.mark.parametrize("level", [-1e4, -100.0, 0.0, 3.0, 100.0, 1e4])
def test_equal_logits_at_any_level_are_balanced(score_function, level):
    """A normaliser with an eps would let a sigmoid router lower its loss by lowering all scores."""
    _, routing = routing_of(torch.full((12, E), level, dtype=torch.float64), score_function)
    assert torch.equal(routing.probs, torch.full((12, E), 1 / E, dtype=torch.float64))
    for name, form in FORMS.items():
        wanted = {"hf": K, "mse": 0, "mse_sequence": 0}.get(name, 1)
        assert float(form(routing).detach()) == pytest.approx(wanted, abs=1e-14), name


@pytest.mark.parametrize("k", [1, 2, 4])
def test_collapse_onto_k_experts_is_e_over_k(k):
    """Each of them takes every token and an equal part of its score."""
    probs = torch.zeros(12, E, dtype=torch.float64)
    probs[:, :k] = 1 / k
    routing = route_by_choice(
        expert=torch.arange(k).expand(12, k), weights=probs[:, :k], logits=probs, probs=probs,
        info=TokenInfo(),
    )  # fmt: skip
    mse = (k * (1 / k - 1 / E) ** 2 + (E - k) / E**2) / E
    for name, form in FORMS.items():
        # the best of a token's experts is always the same one; hf's values are k times as high
        wanted = {"hf": E, "first": E / k, "mse": mse, "mse_sequence": mse}.get(name, E / k)
        assert float(form(routing)) == pytest.approx(wanted, rel=1e-14), name


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_the_scores_with_what_was_selected_held_fixed(form):
    """Through the gate: a step so small that no selection changes."""
    router = randomise(
        TokenChoiceTopKRouter(dim=5, num_experts=E, experts_per_token=K, expert_bias=True)
    ).double()
    x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    info = TokenInfo(sequence_ids=torch.arange(16) // 8)
    weight = router.gate.weight
    FORMS[form](router(x, info)).backward()
    assert router.expert_bias.grad is None
    direction = torch.randn(E, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = []
    with torch.no_grad():
        before = router(x, info).selected
        for step in (1e-6, -1e-6):
            weight += step * direction
            routing = router(x, info)
            assert torch.equal(routing.selected, before)
            values.append(float(FORMS[form](routing)))
            weight -= step * direction
    slope = float((weight.grad * direction).sum())
    assert abs(slope) > 1e-6
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_read_on_the_host(masked):
    """Tensors without values: whatever asks for one raises."""
    with FakeTensorMode():
        logits = torch.randn(12, E, requires_grad=True)
        probs = logits.softmax(-1)
        expert = probs.topk(K).indices
        mask = torch.ones(12, dtype=torch.bool) if masked else None
        routing = route_by_choice(
            expert=expert, weights=probs.gather(1, expert), logits=logits, probs=probs,
            info=TokenInfo(mask=mask, sequence_ids=torch.arange(12) // 4), own_loss=logits.sum(-1),
            kept=torch.ones(12, K, dtype=torch.bool),
        )  # fmt: skip
        total = torch.ones((), dtype=torch.int64)
        values = [form(routing) for form in FORMS.values()]
        values.append(router_z_loss(routing, num_tokens=total))
        values.append(router_own_loss(routing, num_tokens=total))
        sum(values).backward()
        assert logits.grad.shape == (12, E)
        assert layer_loads({"a": routing}).shape == (3, 1, E)
