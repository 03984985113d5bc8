"""First choices against st-moe-pytorch's gate: its balancing loss counts what was kept.

Letters: b rows · s positions · e experts.
"""

import pytest
import torch

from moe_builders.losses import load_balancing_loss, router_z_loss
from moe_builders.routing import TokenInfo, route_by_choice

original = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")
B, S, D, E = 3, 32, 12, 8


def theirs(x, *, weight, top_n=2, seed=0):
    gate = original.TopNGating(dim=D, num_gates=E, top_n=top_n, capacity_factor_train=1.25)
    with torch.no_grad():
        gate.to_gates.weight.copy_(weight)
    torch.manual_seed(seed)
    return gate.train()(x)


def ours(x, dispatch, *, weight):
    """A routing with the original's decision about each token's best expert."""
    logits = (x @ weight.t()).flatten(0, 1)
    probs = logits.softmax(-1)
    first = probs.argmax(-1, keepdim=True)  # [t, 1]
    given = dispatch.sum(-1).flatten(0, 1) > 0  # [t, e] whether the expert has a slot for it
    rows = torch.arange(B).repeat_interleave(S)
    return route_by_choice(
        expert=first, weights=probs.gather(1, first), logits=logits, probs=probs,
        info=TokenInfo(sequence_ids=rows), kept=given.gather(1, first),
    )  # fmt: skip


@pytest.mark.parametrize("top_n", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_kept_first_choices_are_its_balancing_loss(top_n, seed):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(B, S, D, generator=stream)
    weight = torch.randn(E, D, generator=stream)
    weight[0] *= 1 + 3 * (seed % 2)  # a favourite, so that its slots run out
    dispatch, _, balance, z = theirs(x, weight=weight, top_n=top_n, seed=seed)
    routing = ours(x, dispatch, weight=weight)
    got = load_balancing_loss(routing, scope="sequence", on="kept", choices="first")
    assert abs(float(got) - float(balance.detach())) <= 1e-6
    assert abs(float(router_z_loss(routing)) - float(z.detach())) <= 1e-5 * float(z.detach())
    if not routing.kept.all():
        assigned = load_balancing_loss(routing, scope="sequence", choices="first")
        assert assigned > got


def test_collapse_costs_8_where_the_original_charges_1_25():
    weight = torch.zeros(E, D)
    weight[0, 0] = 100.0
    x = torch.ones(B, S, D)
    dispatch, _, balance, _ = theirs(x, weight=weight)
    routing = ours(x, dispatch, weight=weight)
    kept, assigned = (
        float(load_balancing_loss(routing, scope="sequence", choices="first", on=on))
        for on in ("kept", "assigned")
    )
    assert assigned == 8.0
    assert kept == pytest.approx(1.25)
    assert float(balance.detach()) == pytest.approx(1.25)
