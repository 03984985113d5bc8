"""The other forms of the balancing loss against loops: mse, first choices, kept ones, pooled."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_near, randomise
from test_counts import choice

from moe_builders.errors import InputError
from moe_builders.losses import (
    load_balancing_loss,
    mse_balancing_loss,
    pooled_load_balancing_loss,
    router_own_loss,
    score_sums,
)
from moe_builders.routers import ExpertChoiceTopKRouter
from moe_builders.routing import TokenInfo, route_by_choice

SCOPES = ["sequence", "micro"]
FORMS = {
    "kept": lambda r, scope, **n: load_balancing_loss(r, scope=scope, on="kept", **n),
    "first": lambda r, scope, **n: load_balancing_loss(r, scope=scope, choices="first", **n),
    "first_kept": lambda r, scope, **n: load_balancing_loss(
        r, scope=scope, choices="first", on="kept", **n
    ),
    "mse": lambda r, scope, **n: mse_balancing_loss(r, scope=scope, **n),
}


def tokens_of(routing, document=None):
    t, info = routing.probs.shape[0], routing.info
    return [
        i
        for i in range(t)
        if (info.mask is None or info.mask[i])
        and (document is None or info.sequence_ids[i] == document)
    ]


def plain(form, routing, tokens):
    """The loss of these tokens as one scope."""
    e = routing.probs.shape[1]
    usage = [sum(routing.probs[i, j] for i in tokens) / len(tokens) for j in range(e)]
    if form == "mse":
        return sum((used - 1 / e) ** 2 for used in usage) / e
    ranks = range(1 if form.startswith("first") else routing.selected.shape[1])
    chosen = [
        int(routing.selected[i, rank])
        for i in tokens
        for rank in ranks
        if "kept" not in form or routing.kept[i, rank]
    ]
    asked = len(tokens) * len(ranks)  # dropped ones stay in what it is a share of
    return e * sum(chosen.count(j) / asked * usage[j] for j in range(e))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_form_is_its_loop(form, scope, masked):
    routing = choice(masked=masked)
    probs = routing.probs.detach().requires_grad_()
    routing = replace(routing, probs=probs)
    tokens = tokens_of(routing)
    if scope == "micro":
        wanted = plain(form, routing, tokens)
    else:
        wanted = 0
        for document in range(4):
            own = tokens_of(routing, document)
            wanted = wanted + len(own) * plain(form, routing, own) / len(tokens)
    got = FORMS[form](routing, scope)
    assert_near(got, wanted, 1e-12)
    (gradient,) = torch.autograd.grad(got, probs)
    (wanted,) = torch.autograd.grad(wanted, probs)
    assert gradient.abs().sum() > 0
    assert_near(gradient, wanted, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_batch_add_up(form):
    routing = choice()
    ids, mask = routing.info.sequence_ids, routing.info.mask
    total = int(mask.sum())
    parts = [
        replace(routing, info=replace(routing.info, mask=mask & (ids % 2 == n))) for n in (0, 1)
    ]
    got = sum(FORMS[form](part, "sequence", num_tokens=total) for part in parts)
    assert_near(got, FORMS[form](routing, "sequence"), 1e-13)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", [*FORMS, "pooled"])
def test_nan_in_masked_rows_reaches_nothing(form, scope):
    routing = choice()
    probs = routing.probs.clone()
    probs[~routing.info.mask] = torch.nan
    probs.requires_grad_()
    dirty = replace(routing, probs=probs)
    if form == "pooled":
        got, clean = (pooled_load_balancing_loss([r, r]) for r in (dirty, routing))
    else:
        got, clean = (FORMS[form](r, scope) for r in (dirty, routing))
    assert torch.equal(got.detach(), clean)
    got.backward()
    assert not probs.grad[~routing.info.mask].any()
    assert probs.grad[routing.info.mask].abs().sum() > 0


def test_all_masked_is_zero_with_zero_gradients():
    info = TokenInfo(mask=torch.zeros(20, dtype=torch.bool), sequence_ids=torch.arange(20) // 5)
    routing = replace(choice(), info=info)
    probs = routing.probs.detach().requires_grad_()
    routing = replace(routing, probs=probs, own_loss=torch.ones(20))
    loss = sum(form(routing, scope) for form in FORMS.values() for scope in SCOPES)
    loss = loss + pooled_load_balancing_loss([routing]) + router_own_loss(routing)
    assert float(loss.detach()) == 0
    loss.backward()
    assert not probs.grad.any()


def collapsed(t=64, e=8, capacity_factor=1.25):
    """All tokens want expert 0 alone; it is full after capacity_factor · t / e of them."""
    probs = torch.zeros(t, e, dtype=torch.float64)
    probs[:, 0] = 1
    expert = torch.zeros(t, 1, dtype=torch.int64)
    kept = torch.arange(t)[:, None] < int(capacity_factor * t / e)
    return route_by_choice(
        expert=expert, weights=torch.ones(t, 1, dtype=torch.float64), logits=probs, probs=probs,
        info=TokenInfo(), kept=kept,
    )  # fmt: skip


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("choices", ["all", "first"])
def test_collapse_costs_e_before_drops_and_looks_cheap_after(scope, choices):
    routing = collapsed()
    assert float(load_balancing_loss(routing, scope=scope, choices=choices)) == 8.0
    assert float(load_balancing_loss(routing, scope=scope, choices=choices, on="kept")) == 1.25


def test_pooled_is_the_sum_of_layers_before_the_product():
    layers = [choice(seed=n, drops=True) for n in range(3)]
    layers = [replace(r, info=layers[0].info) for r in layers]
    tokens = tokens_of(layers[0])
    rows = 3 * len(tokens)
    for on in ("assigned", "kept"):
        wanted = 0
        for j in range(5):
            f = sum(
                int(r.selected[i, rank] == j and (on == "assigned" or bool(r.kept[i, rank])))
                for r in layers
                for i in tokens
                for rank in range(3)
            )
            wanted = (
                wanted + 5 * (f / rows) * sum(r.probs[i, j] for r in layers for i in tokens) / rows
            )
        assert_near(pooled_load_balancing_loss(layers, on=on), wanted, 1e-12)
    whole = pooled_load_balancing_loss(layers)
    assert_near(pooled_load_balancing_loss(layers, num_tokens=4 * len(tokens)), whole / 4, 1e-14)
    with pytest.raises(InputError, match="different numbers of experts"):
        pooled_load_balancing_loss([choice(), choice(e=6)])


def test_two_opposite_collapses_are_hidden_from_the_pooled_form_only():
    def collapse_to(expert):
        probs = torch.zeros(8, 2, dtype=torch.float64)
        probs[:, expert] = 1
        chosen = torch.full((8, 1), expert)
        return route_by_choice(
            expert=chosen, weights=torch.ones(8, 1), logits=probs, probs=probs, info=TokenInfo()
        )

    layers = [collapse_to(0), collapse_to(1)]
    assert float(pooled_load_balancing_loss(layers)) == 1.0, "as if balanced (k = 1)"
    each = [float(load_balancing_loss(r, scope="micro")) for r in layers]
    assert each == [2.0, 2.0]
    assert [float(mse_balancing_loss(r, scope="micro")) for r in layers] == [0.25, 0.25]


def test_own_loss_is_the_mean_over_real_tokens():
    routing = choice()
    own = torch.randn(20, dtype=torch.float64)
    own[~routing.info.mask] = torch.nan
    own.requires_grad_()
    asking = replace(routing, own_loss=own)
    tokens = tokens_of(routing)
    wanted = sum(own[i] for i in tokens) / len(tokens)
    assert_near(router_own_loss(asking), wanted, 1e-14)
    assert_near(router_own_loss(asking, num_tokens=40), wanted * len(tokens) / 40, 1e-14)
    router_own_loss(asking).backward()
    assert torch.equal(own.grad != 0, routing.info.mask)
    nothing = router_own_loss(routing)
    assert (nothing.shape, float(nothing)) == ((), 0.0)


def test_sums_of_scores_are_in_the_precision_asked_for():
    routing = choice()
    routing = replace(routing, probs=routing.probs.float())
    wide = score_sums(routing, torch.float64)
    assert wide.dtype == torch.float64
    wanted = sum(routing.probs[i].double() for i in tokens_of(routing))
    assert_near(wide, wanted, 1e-15)
    assert score_sums(routing).dtype == torch.float32


def test_refused():
    routing = choice()
    for arguments, message in (
        ({"scope": "micro", "on": "all"}, "on 'all' is not one of assigned, kept"),
        ({"scope": "micro", "choices": "second"}, "choices 'second' is not one of all, first"),
        (
            {"scope": "global", "counts": torch.ones(5), "on": "kept"},
            "uses its counts as they are, but on is 'kept'",
        ),
        (
            {"scope": "global", "counts": torch.ones(5), "choices": "first"},
            "and choices is 'first': leave these out",
        ),
    ):
        with pytest.raises(InputError, match=message):
            load_balancing_loss(routing, **arguments)
    with pytest.raises(InputError, match="scope is 'global', but must be sequence or micro"):
        mse_balancing_loss(routing, scope="global")
    router = randomise(ExpertChoiceTopKRouter(dim=4, num_experts=4))
    routing = router(torch.randn(8, 4), TokenInfo())
    with pytest.raises(InputError, match="tokens do not choose: use a loss over all choices"):
        load_balancing_loss(routing, scope="micro", choices="first")
