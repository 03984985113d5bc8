"""Router losses against per-token python loops; what masks, splits and scopes must not change."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_near, randomise

from moe_builders.counts import count_assignments
from moe_builders.errors import InputError
from moe_builders.losses import (
    load_balancing_loss,
    router_z_loss,
)
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo, expert_of_rows

E, K, D = 6, 2, 5
SCOPES = ["sequence", "micro", "global"]


def router_of(kind="token", **changes):
    if kind == "expert":
        return randomise(ExpertChoiceTopKRouter(dim=D, num_experts=E, capacity_factor=2)).double()
    arguments = {"dim": D, "num_experts": E, "experts_per_token": K} | changes
    return randomise(TokenChoiceTopKRouter(**arguments)).double()


def batch(t=24, *, masked=True):
    x = torch.randn(t, D, dtype=torch.float64)
    sequence_ids = torch.tensor([3, 0, 7, 1]).repeat_interleave(t // 4)  # any numbers below t
    mask = torch.arange(t) % 5 != 2 if masked else None
    return x, TokenInfo(mask=mask, sequence_ids=sequence_ids)


def assignments(routing):
    """(token, expert) of each live one."""
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0]).tolist()
    pairs = zip(routing.token_index.tolist(), expert, strict=True)
    return [(i, j) for i, j in pairs if j < routing.probs.shape[1]]


def plain_balance(routing, tokens):
    """e · Σ_j f_j · P_j over these tokens, as the papers write it."""
    e = routing.probs.shape[1]
    chosen = [j for i, j in assignments(routing) if i in tokens]
    loss = 0
    for j in range(e):
        f = chosen.count(j) / len(chosen)
        mean_score = sum(routing.probs[i, j] for i in tokens) / len(tokens)
        loss = loss + e * f * mean_score
    return loss


def real_tokens(info, t):
    return [i for i in range(t) if info.mask is None or info.mask[i]]


def value(routing, scope, **changes):
    counts = count_assignments(routing) if scope == "global" else None
    return load_balancing_loss(routing, **({"scope": scope, "counts": counts} | changes))


@pytest.mark.parametrize("kind", ["token", "expert"])
@pytest.mark.parametrize("masked", [False, True])
def test_sequence_scope_is_a_loop_over_documents(kind, masked):
    x, info = batch(masked=masked)
    routing = router_of(kind)(x, info)
    tokens = real_tokens(info, 24)
    wanted = 0
    for document in set(info.sequence_ids.tolist()):
        own = [i for i in tokens if info.sequence_ids[i] == document]
        wanted = wanted + len(own) * plain_balance(routing, own)
    assert_near(value(routing, "sequence"), wanted / len(tokens), 1e-12)


@pytest.mark.parametrize("kind", ["token", "expert"])
@pytest.mark.parametrize("masked", [False, True])
def test_micro_scope_is_the_formula(kind, masked):
    x, info = batch(masked=masked)
    routing = router_of(kind)(x, info)
    tokens = real_tokens(info, 24)
    assert_near(value(routing, "micro"), plain_balance(routing, tokens), 1e-12)
    assert torch.equal(value(routing, "global"), value(routing, "micro"))


def test_without_sequence_ids_all_is_one_document():
    x, info = batch()
    routing = router_of()(x, TokenInfo(mask=info.mask))
    assert_near(value(routing, "sequence"), value(routing, "micro"), 1e-14)


@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_flows_through_probs_only(scope):
    x, info = batch()
    router = router_of(expert_bias=True)
    routing = router(x, info)
    probs = routing.probs.detach().requires_grad_()
    free = replace(routing, probs=probs, weights=routing.weights.detach().requires_grad_())
    value(free, scope).backward()
    assert free.weights.grad is None

    tokens = real_tokens(info, 24)
    ids = info.sequence_ids if scope == "sequence" else torch.zeros(24)
    wanted = torch.zeros(24, E, dtype=torch.float64)
    for i in tokens:  # d/dP of e · Σ f · P / n with f held constant
        chosen = [j for token, j in assignments(routing) if ids[token] == ids[i]]
        for j in range(E):
            wanted[i, j] = E * chosen.count(j) / len(chosen) / len(tokens)
    assert_near(probs.grad, wanted, 1e-12)

    value(routing, scope).backward()  # and on through the gate
    got = router.gate.weight.grad.clone()
    router.zero_grad()
    ((x @ router.gate.weight.t()).softmax(-1) * wanted).sum().backward()
    assert_near(got, router.gate.weight.grad, 1e-12)


def test_z_loss_is_the_formula():
    x, info = batch()
    router = router_of(gate_bias=True)
    routing = router(x, info)
    tokens = real_tokens(info, 24)
    logits = x @ router.gate.weight.t() + router.gate.bias
    wanted = sum(logits[i].exp().sum().log() ** 2 for i in tokens) / len(tokens)
    got = router_z_loss(routing)
    assert_near(got, wanted, 1e-12)
    got.backward()
    gradient = router.gate.weight.grad.clone()
    router.zero_grad()
    wanted.backward()
    assert_near(gradient, router.gate.weight.grad, 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_two_halves_add_up_to_the_whole(masked):
    x, info = batch(masked=masked)
    router = router_of()
    whole = router(x, info)
    total = len(real_tokens(info, 24))
    cut = 12  # documents are not split
    halves = []
    for part in (slice(0, cut), slice(cut, 24)):
        mask = None if info.mask is None else info.mask[part]
        ids = info.sequence_ids[part]
        halves.append(router(x[part], TokenInfo(mask=mask, sequence_ids=ids)))
    for loss in (
        lambda r, **n: value(r, "sequence", **n),
        lambda r, **n: value(r, "global", counts=count_assignments(whole), **n),
        router_z_loss,
    ):
        parts = sum(loss(half, num_tokens=total) for half in halves)
        assert_near(parts, loss(whole), 1e-13)
        as_tensor = sum(loss(half, num_tokens=torch.tensor(total)) for half in halves)
        assert torch.equal(as_tensor, parts)
    counts = sum(count_assignments(half) for half in halves)
    assert torch.equal(counts, count_assignments(whole))
    micro = sum(value(half, "micro", num_tokens=total) for half in halves)
    assert abs(float((micro - value(whole, "micro")).detach())) > 1e-3  # "micro" does depend


@pytest.mark.parametrize("kind", ["token", "expert"])
def test_padding_changes_no_loss_and_no_gradient(kind):
    x, info = batch()
    x[~info.mask] *= 100
    router = router_of(kind)
    padded = router(x, info)
    unpadded = router(x[info.mask], TokenInfo(sequence_ids=info.sequence_ids[info.mask]))
    losses = [lambda r, s=s: value(r, s) for s in SCOPES] + [router_z_loss]
    for loss in losses:
        found = []
        for routing in (padded, unpadded):
            router.zero_grad()
            result = loss(routing)
            result.backward(retain_graph=True)
            found.append((result.detach(), router.gate.weight.grad))
        assert_near(found[0][0], found[1][0], 1e-12)
        assert_near(found[0][1], found[1][1], 1e-12)


def test_nan_in_masked_rows_reaches_neither_value_nor_gradient():
    x, info = batch()
    routing = router_of()(x, info)
    dirty = []
    for tensor in (routing.logits, routing.probs):
        tensor = tensor.detach().clone()
        tensor[~info.mask] = float("nan")
        dirty.append(tensor.requires_grad_())
    nan = replace(routing, logits=dirty[0], probs=dirty[1])
    for loss in [lambda r, s=s: value(r, s) for s in SCOPES] + [router_z_loss]:
        result = loss(nan)
        assert torch.equal(result, loss(routing))
        result.backward()
    for tensor in dirty:
        assert torch.equal(tensor.grad[~info.mask], torch.zeros_like(tensor.grad[~info.mask]))
        assert tensor.grad[info.mask].abs().sum() > 0


def test_a_mask_narrowed_after_routing_counts_only_its_tokens():
    x, info = batch()
    router = router_of()
    routing = router(x, info)
    labels = info.mask & (torch.arange(24) % 2 == 0)
    narrow = replace(routing, info=replace(info, mask=labels))
    assert torch.equal(narrow.num_tokens_per_expert, routing.num_tokens_per_expert)
    alone = router(x[labels], TokenInfo(sequence_ids=info.sequence_ids[labels]))
    assert torch.equal(count_assignments(narrow), alone.num_tokens_per_expert.long())
    for scope in SCOPES:
        assert_near(value(narrow, scope), value(alone, scope), 1e-12)
    assert_near(router_z_loss(narrow), router_z_loss(alone), 1e-12)


def test_all_masked_is_zero_with_zero_gradients():
    x, _ = batch()
    router = router_of()
    routing = router(x, TokenInfo(mask=torch.zeros(24, dtype=torch.bool)))
    loss = sum(value(routing, scope) for scope in SCOPES) + router_z_loss(routing)
    assert float(loss.detach()) == 0
    loss.backward()
    assert torch.equal(router.gate.weight.grad, torch.zeros(E, D, dtype=torch.float64))


@pytest.mark.parametrize(
    ("scope", "counts", "message"),
    [
        ("batch", None, "'batch' is not one of sequence, micro, global"),
        ("global", None, "'global' takes counts"),
        ("micro", torch.ones(E), "the others take none"),
        ("sequence", torch.ones(E), "the others take none"),
    ],
)
def test_refused(scope, counts, message):
    x, info = batch()
    with pytest.raises(InputError, match=message):
        load_balancing_loss(router_of()(x, info), scope=scope, counts=counts)
