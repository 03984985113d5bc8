"""The router part of a loss: per layer, then the mean over layers, over the tokens that count.

Letters: t tokens · d dim · e experts · l layers.
"""

import pytest
import torch
from helpers import randomise

from moe_builders.errors import InputError
from moe_builders.losses import load_balancing_loss, router_z_loss
from moe_builders.metrics import max_violation
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo
from moe_builders.training.objective import layer_counts, narrow_to, router_losses

T, D, E, K = 12, 6, 4, 2


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
    balance, z = router_losses(found, scope="sequence", num_tokens=T)
    singles = [load_balancing_loss(r, scope="sequence").detach() for r in found.values()]
    torch.testing.assert_close(balance.detach(), torch.stack(singles).mean())
    assert len({round(float(s), 6) for s in singles}) == 3, "layers differ"
    torch.testing.assert_close(z, torch.stack([router_z_loss(r) for r in found.values()]).mean())


def test_micro_batches_add_up_to_one_batch():
    """num_tokens is the whole step's, so that halves sum to the loss of both."""
    found = routings(mask=torch.ones(T, dtype=torch.bool))
    whole = router_losses(found, scope="sequence", num_tokens=T)
    documents = torch.tensor([0] * 7 + [1] * 5)
    halves = [router_losses(narrow_to(found, documents == n), scope="sequence", num_tokens=T)
              for n in (0, 1)]  # fmt: skip
    for one, two, both in zip(*halves, whole, strict=True):
        torch.testing.assert_close(one + two, both)


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
    balance, _ = router_losses(found, scope="global", num_tokens=T, counts=counts)
    singles = [load_balancing_loss(r, scope="global", counts=c)
               for r, c in zip(found.values(), counts, strict=True)]  # fmt: skip
    torch.testing.assert_close(balance, torch.stack(singles).mean())
    swapped, _ = router_losses(found, scope="global", num_tokens=T, counts=counts.flip(0))
    assert (swapped - balance).detach().abs() > 1e-2


def test_no_token_counts_is_zero_and_finite():
    found = routings(mask=torch.zeros(T, dtype=torch.bool))
    for value in router_losses(found, scope="sequence", num_tokens=torch.tensor(1)):
        assert float(value.detach()) == 0
        value.backward(retain_graph=True)


def test_mistakes_are_sentences():
    with pytest.raises(InputError, match="different numbers of experts, so their loads make no t"):
        layer_counts(routings(1) | {"other": routings(1, num_experts=5)["layers.0.mlp"]})
    with pytest.raises(InputError, match="the model has no MoE layer"):
        layer_counts({})
    with pytest.raises(InputError, match="'all' is not one of sequence, micro, global"):
        router_losses(routings(), scope="all", num_tokens=T)
    with pytest.raises(InputError, match="scope 'global' takes counts"):
        router_losses(routings(), scope="global", num_tokens=T)
