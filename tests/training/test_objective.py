"""The router part of a loss: per layer, then the mean over layers, over the tokens that count.

Letters: t tokens · d dim · e experts · l layers.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_near, assert_same_bits, gradients, randomise
from helpers_decoder import batch, decoder_of
from torch import nn

from moe_builders.errors import InputError
from moe_builders.losses import (
    load_balancing_loss,
    mse_balancing_loss,
    pooled_load_balancing_loss,
    router_z_loss,
)
from moe_builders.metrics import max_violation
from moe_builders.moe import collect_routing
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo, route_by_choice
from moe_builders.training.objective import (
    check_balancing,
    layer_counts,
    layer_loads,
    narrow_to,
    router_losses,
)

T, D, E, K = 12, 6, 4, 2
FORMS = {  # form: (scopes, the same for one layer)
    "switch": (("sequence", "micro"), lambda r, s, on: load_balancing_loss(r, scope=s, on=on)),
    "st_moe": (
        ("sequence", "micro"),
        lambda r, s, on: load_balancing_loss(r, scope=s, on=on, choices="first"),
    ),
    "mse": (("sequence", "micro"), lambda r, s, on: mse_balancing_loss(r, scope=s)),
}


def losses_of(found, *, form="switch", on="assigned", scope="sequence", num_tokens=T, **counts):
    return router_losses(found, form=form, on=on, scope=scope, num_tokens=num_tokens, **counts)


def routings(layers=3, *, mask=None, num_experts=E, seed=0):
    """One decision a layer over two documents of 7 and 5 tokens."""
    stream = torch.Generator().manual_seed(seed)
    info = TokenInfo(mask=mask, sequence_ids=torch.tensor([0] * 7 + [1] * 5), input_ids=None)
    found = {}
    for layer in range(layers):
        router = TokenChoiceTopKRouter(dim=D, num_experts=num_experts, experts_per_token=K)
        randomise(router.double(), seed=seed + layer)
        x = torch.randn(T, D, generator=stream, dtype=torch.float64)
        found[f"layers.{layer}.mlp"] = router(x, info)
    return found


def test_mean_over_layers_of_the_losses_of_each():
    found = routings()
    losses = losses_of(found)
    assert set(losses) == {"balance", "z", "own"}
    balance, z = losses["balance"], losses["z"]
    assert float(losses["own"]) == 0
    singles = [load_balancing_loss(r, scope="sequence").detach() for r in found.values()]
    torch.testing.assert_close(balance.detach(), torch.stack(singles).mean())
    assert len({round(float(s), 6) for s in singles}) == 3, "layers differ"
    torch.testing.assert_close(z, torch.stack([router_z_loss(r) for r in found.values()]).mean())


def test_micro_batches_add_up_to_one_batch():
    """num_tokens is the whole step's, so that halves sum to the loss of both."""
    found = routings(mask=torch.ones(T, dtype=torch.bool))
    found = {n: replace(r, own_loss=torch.randn(T).double()) for n, r in found.items()}
    documents = torch.tensor([0] * 7 + [1] * 5)
    for form in FORMS:
        whole = losses_of(found, form=form)
        one, two = (losses_of(narrow_to(found, documents == n), form=form) for n in (0, 1))
        for name, both in whole.items():
            torch.testing.assert_close(one[name] + two[name], both)
            assert both.abs() > 0


def test_narrowed_decisions_count_only_those_tokens():
    mask = torch.arange(T) % 3 == 0
    found = routings()
    narrowed = narrow_to(found, mask)
    counts = layer_counts(narrowed)
    assert counts.sum(-1).tolist() == [K * int(mask.sum())] * 3
    assert layer_counts(found).sum(-1).tolist() == [K * T] * 3
    assert all(r.info.mask is None for r in found.values()), "the originals stay"
    assert all(torch.equal(n.weights, f.weights)
               for n, f in zip(narrowed.values(), found.values(), strict=True))  # fmt: skip


def test_counts_are_a_table_of_layers_and_experts():
    found = routings()
    counts = layer_counts(found)
    assert counts.shape == (3, E)
    assert counts.dtype == torch.int64
    for row, routing in zip(counts, found.values(), strict=True):
        assert torch.equal(row, routing.num_tokens_per_expert)
    assert max_violation(counts).shape == (3,)


def test_global_scope_takes_each_layers_own_row():
    found = routings()
    counts = layer_counts(found) + 30 * torch.eye(3, E, dtype=torch.int64)
    balance = losses_of(found, scope="global", counts=counts)["balance"]
    singles = [load_balancing_loss(r, scope="global", counts=c)
               for r, c in zip(found.values(), counts, strict=True)]  # fmt: skip
    torch.testing.assert_close(balance, torch.stack(singles).mean())
    swapped = losses_of(found, scope="global", counts=counts.flip(0))["balance"]
    assert (swapped - balance).detach().abs() > 1e-2


def test_no_token_counts_is_zero_and_finite():
    found = routings(mask=torch.zeros(T, dtype=torch.bool))
    for form in (*FORMS, "hf"):
        scope = "micro" if form == "hf" else "sequence"
        losses = losses_of(found, form=form, scope=scope, num_tokens=torch.tensor(1))
        assert all(float(value.detach()) == 0 for value in losses.values())
        (losses["balance"] + losses["z"]).backward(retain_graph=True)


def test_mistakes_are_sentences():
    with pytest.raises(InputError, match="different numbers of experts, so their loads make no t"):
        layer_counts(routings(1) | {"other": routings(1, num_experts=5)["layers.0.mlp"]})
    with pytest.raises(InputError, match="the model has no MoE layer"):
        layer_counts({})
    with pytest.raises(InputError, match="'all' is not one of sequence, micro, global"):
        losses_of(routings(), scope="all")
    with pytest.raises(InputError, match="scope 'global' takes counts"):
        losses_of(routings(), scope="global")
    for arguments, message in (
        ({"form": "gshard"}, "form 'gshard' is not one of switch, mse, st_moe, hf"),
        ({"on": "all"}, "on 'all' is not one of assigned, kept"),
        ({"form": "hf"}, "form is hf, but router_losses.load_balancing_scope is sequence: "),
        ({"form": "mse", "on": "kept"}, "form is mse, but router_losses.load_balancing_on is kept"),
        ({"form": "mse", "scope": "global"}, "form is mse on assigned, but .*_scope is global"),
        (
            {"form": "st_moe", "scope": "global"},
            "form is st_moe on assigned, but .*_scope is global",
        ),
        ({"on": "kept", "scope": "global"}, "switch on kept, but .* is global, which knows"),
    ):
        with pytest.raises(InputError, match=message):
            losses_of(routings(), **arguments)


def dropping(found, seed=5):
    """The same layers, some choices of which were dropped."""
    stream = torch.Generator().manual_seed(seed)
    return {
        name: route_by_choice(
            expert=r.selected, weights=r.probs.gather(1, r.selected), logits=r.logits,
            probs=r.probs, info=r.info, kept=torch.rand(T, K, generator=stream) < 0.6,
        )
        for name, r in found.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("form", "on"),
    [(f, on) for f in FORMS for on in ("assigned", "kept") if (f, on) != ("mse", "kept")],
)
def test_each_form_is_the_mean_of_its_layers(form, on):
    found = dropping(routings())
    scopes, single = FORMS[form]
    for scope in scopes:
        got = losses_of(found, form=form, on=on, scope=scope)["balance"]
        wanted = torch.stack([single(r, scope, on) for r in found.values()]).mean()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("on", ["assigned", "kept"])
def test_the_hf_form_is_over_all_layers_at_once(on):
    found = dropping(routings())
    got = losses_of(found, form="hf", on=on, scope="micro", num_tokens=4 * T)["balance"]
    wanted = pooled_load_balancing_loss(list(found.values()), on=on) / 4
    torch.testing.assert_close(got, wanted)


def test_own_losses_are_the_mean_over_those_that_have_one():
    found = routings()
    first, _, last = found
    found[first] = replace(found[first], own_loss=torch.full((T,), 2.0).double())
    found[last] = replace(found[last], own_loss=torch.full((T,), 4.0).double())
    assert float(losses_of(found)["own"]) == 3.0
    assert float(losses_of(found, num_tokens=2 * T)["own"]) == 1.5


def test_one_collapse_is_not_hidden_by_an_opposite_one():
    def collapsed(expert):
        probs = torch.zeros(T, 2, dtype=torch.float64)
        probs[:, expert] = 1
        chosen, info = torch.full((T, 1), expert), TokenInfo()
        return route_by_choice(
            expert=chosen, weights=torch.ones(T, 1), logits=probs, probs=probs, info=info
        )

    layers = {"layers.0.mlp": collapsed(0), "layers.1.mlp": collapsed(1)}
    values = {form: float(losses_of(layers, form=form)["balance"]) for form in FORMS}
    assert values == {"switch": 2.0, "st_moe": 2.0, "mse": 0.25}
    assert float(losses_of(layers, form="hf", scope="micro")["balance"]) == 1.0, (
        "why not by default"
    )


def test_loads_are_assigned_kept_and_scores():
    mask = torch.arange(T) % 3 != 0
    found = dropping(routings(mask=mask))
    loads = layer_loads(found)
    assert (loads.shape, loads.dtype, loads.requires_grad) == ((3, 3, E), torch.float64, False)
    assert torch.equal(loads[0], layer_counts(found).double())
    for row, routing in zip(loads[1], found.values(), strict=True):
        assert torch.equal(row, routing.num_tokens_per_expert.double())
    assert (loads[1].sum(-1) < loads[0].sum(-1)).all()
    for row, routing in zip(loads[2], found.values(), strict=True):
        torch.testing.assert_close(row, sum(routing.probs[i] for i in range(T) if mask[i]).detach())
    torch.testing.assert_close(loads[2].sum(-1), torch.full((3,), float(mask.sum())).double())
    dirty = {n: replace(r, probs=r.probs.masked_fill(~mask[:, None], torch.nan))
             for n, r in found.items()}  # fmt: skip
    assert torch.equal(layer_loads(dirty), loads), "masked rows are selected away"
    with pytest.raises(InputError, match="no MoE layer"):
        layer_loads({})


@pytest.mark.parametrize(
    ("form", "scope"), [*((f, "sequence") for f in (*FORMS, "z", "own")), ("switch", "global")]
)
def test_the_gates_gradient_does_not_depend_on_accumulation(form, scope):
    """8 rows as 1, 2 or 4 micro-batches of unequal numbers of real tokens."""
    router = randomise(TokenChoiceTopKRouter(dim=D, num_experts=E, experts_per_token=K)).double()
    rows, length = 8, 6
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(rows, length, D, generator=stream, dtype=torch.float64)
    mask = torch.arange(length) < torch.randint(1, length, (rows, 1), generator=stream)
    num_tokens = int(mask.sum())

    def route(part):
        ids = torch.arange(len(x[part])).repeat_interleave(length)
        routing = router(x[part].flatten(0, 1), TokenInfo(mask[part].flatten(), ids))
        return {"layers.0.mlp": replace(routing, own_loss=routing.logits.square().sum(-1))}

    counts = layer_counts(route(slice(0, rows))) if scope == "global" else None
    name = form if form in ("z", "own") else "balance"
    kind = form if form in FORMS else "switch"
    found = {}
    for pieces in (1, 2, 4):
        for part in range(pieces):
            size = rows // pieces
            losses = losses_of(
                route(slice(part * size, (part + 1) * size)), form=kind, scope=scope,
                num_tokens=num_tokens, counts=counts,
            )  # fmt: skip
            losses[name].backward()
        found[pieces] = router.gate.weight.grad
        router.gate.weight.grad = None
    assert found[1].abs().max() > 1e-3
    for pieces in (2, 4):
        assert_near(found[pieces], found[1], 1e-12)


def test_recomputing_counts_nothing_twice_and_reaches_every_gate():
    """Router losses alone, through a decoder: both gates learn, and from the same numbers."""
    tokens, info = batch()
    seen = []
    for checkpointing in (False, True):
        model = decoder_of(torch.float64)
        model.activation_checkpointing = checkpointing
        forwards = []
        model.layers[0].sa_norm.register_forward_hook(lambda *_, n=forwards: n.append(1))
        model(tokens, info=info)
        found = collect_routing(model)
        before = layer_loads(found)
        losses = losses_of(found, num_tokens=int(info.mask.sum()))
        (losses["balance"] + losses["z"]).backward()
        assert len(forwards) == 1 + checkpointing
        assert torch.equal(layer_loads(collect_routing(model)), before)
        gates = {n: g for n, g in gradients(model).items() if "router.gate" in n}
        assert len(gates) == 2
        assert all(gate.abs().max() > 1e-3 for gate in gates.values())
        seen.append(gates | {"loads": before})
    assert_same_bits(*seen)


class BalancingRouter(nn.Module):
    num_experts, balances_itself = 4, True

    def forward(self, x, info):
        raise AssertionError("not called")


def test_a_balancing_loss_on_a_router_that_balances_itself_is_refused():
    model = decoder_of()
    check_balancing(model, load_balancing_coef=0.1)
    model.layers[2].mlp.router = BalancingRouter()
    check_balancing(model, load_balancing_coef=0.0)
    with pytest.raises(InputError) as caught:
        check_balancing(model, load_balancing_coef=0.01)
    assert str(caught.value) == (
        "router_losses.load_balancing_coef is 0.01, but layers.2.mlp.router is a BalancingRouter, "
        "which balances by itself: set router_losses.load_balancing_coef=0, or choose another "
        "router"
    )
