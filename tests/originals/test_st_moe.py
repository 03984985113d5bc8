"""Threshold gating, its losses, layer and block against st-moe-pytorch 0.1.8, number by number.

Letters: b batch · s sequence · t = b·s tokens · e num_experts · k experts_per_token.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near
from torch import nn

from moe_builders.blocks import SparseMoEBlock
from moe_builders.losses import router_z_loss
from moe_builders.moe import MoE
from moe_builders.routers.coordinate_descent import coordinate_descent
from moe_builders.routers.threshold import ThresholdRouter
from moe_builders.routing import TokenInfo, dense_weights

st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")

D, E, B, S = 16, 8, 3, 24
THRESHOLDS = {2: [0.2, (0.3,)], 3: [0.2, (0.35, 0.1)], 4: [0.3, (0.4, 0.2, 0.05)]}
CASES = [(k, threshold) for k, many in THRESHOLDS.items() for threshold in many]


def gates_of(k, threshold, *, factor=1.25, **ours):
    """The original's gate and ours with the same weight."""
    theirs = st_moe.TopNGating(
        D,
        E,
        top_n=k,
        threshold_train=threshold,
        threshold_eval=threshold,
        capacity_factor_train=factor,
        capacity_factor_eval=2.0,
        differentiable_topk=ours.get("differentiable_topk", False),
        differentiable_topk_fused=False,
    )
    router = ThresholdRouter(
        dim=D,
        num_experts=E,
        experts_per_token=k,
        threshold=threshold,
        eval_threshold=threshold,
        capacity_factor=factor,
        eval_capacity_factor=2.0,
        stochastic_eval=True,
        slot_order="rank_major",
        **ours,
    )
    router.gate.load_state_dict(theirs.to_gates.state_dict())
    return theirs, router


def rows(x):
    """[b, s, d] -> ([t, d], one sequence a row)."""
    b, s, _ = x.shape
    return x.flatten(0, 1), TokenInfo(sequence_ids=torch.arange(b).repeat_interleave(s))


def balance(routing, *, on, b=B):
    """e · Σ_j f_j · P_j of the first choices, a sequence at a time, then their mean."""
    first, live = routing.selected[:, 0].view(b, -1), torch.ones(b, routing.selected.shape[0] // b)
    if on == "kept":
        live = routing.kept[:, 0].view(b, -1).float()
    share = torch.zeros(b, E).scatter_add(1, first, live) / first.shape[1]
    return E * (share * routing.probs.view(b, -1, E).mean(1)).sum(1).mean()


def compare(theirs, router, seed, **noise):
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    dispatch, combine, their_balance, their_z = theirs(x, **noise)
    torch.manual_seed(seed)
    routing = router(*rows(x))
    dense = dense_weights(routing)
    assert (dense - combine.sum(-1).flatten(0, 1)).abs().max() <= 1e-6
    full = torch.zeros(B * S, E).scatter_add(1, routing.selected, routing.kept.float())
    assert torch.equal(full, dispatch.detach().sum(-1).flatten(0, 1).round())
    if theirs.training:
        assert abs(balance(routing, on="kept") - their_balance) <= 1e-6
        assert_near(router_z_loss(routing), their_z, 1e-6)
    return routing


@pytest.mark.parametrize(("k", "threshold"), CASES, ids=str)
def test_gate(k, threshold):
    theirs, router = gates_of(k, threshold)
    dropped = 0
    for seed in range(40):
        with torch.no_grad():
            theirs.to_gates.weight.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
        router.gate.load_state_dict(theirs.to_gates.state_dict())
        routing = compare(theirs, router, seed)
        dropped += int((~routing.kept[:, 0]).sum())
    assert dropped > 0, "some first choices found no place"


@pytest.mark.parametrize(("k", "threshold"), CASES, ids=str)
def test_gate_in_evaluation(k, threshold):
    theirs, router = gates_of(k, threshold)
    theirs.eval()
    router.eval()
    for seed in range(10):
        compare(theirs, router, seed)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_gate_with_coordinate_descent(k):
    theirs, router = gates_of(k, 0.2, differentiable_topk=True)
    for seed in range(10):
        compare(theirs, router, seed)


@pytest.mark.parametrize(
    "options", [{}, {"eps": 0.5, "n_iters": 7}, {"eps_init": 4.0, "eps_decay": 0.7}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_coordinate_descent(options, masked):
    from colt5_attention.coor_descent import coor_descent

    values = torch.randn(5, 12)
    mask = torch.rand(5, 12) > 0.3 if masked else None
    theirs = coor_descent(values, k=3.375, mask=mask, **({"n_iters": 20} | options))
    ours = {"iterations" if name == "n_iters" else name: v for name, v in options.items()}
    assert_near(coordinate_descent(values, k=3.375, mask=mask, **ours), theirs, 1e-6)


def test_noise_on_the_gate(monkeypatch):
    """With one formula for the noise on both sides; the z-loss stays on the clean logits."""
    monkeypatch.setattr(st_moe, "gumbel_noise", lambda t: -torch.empty_like(t).exponential_().log())
    theirs, router = gates_of(2, 0.2, jitter="gumbel", jitter_scale=0.7)
    for seed in range(10):
        compare(theirs, router, seed, noise_gates=True, noise_mult=0.7)


def test_collapse_is_seen_only_before_the_drop():
    """All tokens to one expert: e when counted as asked for, capacity/s · e as the original."""
    theirs, router = gates_of(2, 0.2)
    x = torch.rand(B, 64, D) + 0.5
    with torch.no_grad():
        for weight in (theirs.to_gates.weight, router.gate.weight):
            weight.zero_()[0].fill_(10.0)
    _, _, their_balance, _ = theirs(x)
    routing = router(*rows(x))
    assert_near(balance(routing, on="assigned"), torch.tensor(8.0), 1e-6)
    assert_near(balance(routing, on="kept"), torch.tensor(1.25), 1e-6)
    assert_near(their_balance, torch.tensor(1.25), 1e-6)


class StExperts(nn.Module):
    """The original's experts on sorted rows, from their weights: exact GEGLU, gate second."""

    def __init__(self, experts):
        super().__init__()
        self.num_experts = len(experts)
        self.weights = nn.ParameterList()
        for expert in experts:
            up, geglu, down = expert.net
            for parameter in (up.weight, up.bias, geglu.mult_bias, down.weight, down.bias):
                self.weights.append(nn.Parameter(parameter.detach().clone()))

    def forward(self, x, num_tokens_per_expert, row_weights=None):
        assert row_weights is None
        answers, start = [], 0
        for number, count in enumerate(num_tokens_per_expert.tolist()):
            up, up_bias, scale, down, down_bias = self.weights[5 * number : 5 * number + 5]
            value, gate = (x[start : start + count] @ up.t() + up_bias).chunk(2, dim=-1)
            hidden = F.gelu(gate) * value * scale
            answers.append(hidden @ down.t() + down_bias)
            start += count
        return torch.cat([*answers, torch.zeros_like(x[start:])])


def layers_of(k, factor, **ours):
    theirs = st_moe.MoE(
        D, num_experts=E, gating_top_n=k, threshold_train=0.3, capacity_factor_train=factor
    )
    with torch.no_grad():
        theirs.gate.to_gates.weight.normal_()
    router = ThresholdRouter(
        dim=D,
        num_experts=E,
        experts_per_token=k,
        threshold=0.3,
        capacity_factor=factor,
        slot_order="rank_major",
        **ours,
    )
    router.gate.load_state_dict(theirs.gate.to_gates.state_dict())
    return theirs, MoE(router=router, experts=StExperts(theirs.experts.experts))


def gradients_of(theirs, moe):
    pairs = [("gate", theirs.gate.to_gates.weight.grad, moe.router.gate.weight.grad)]
    for number, expert in enumerate(theirs.experts.experts):
        up, geglu, down = expert.net
        parameters = (up.weight, up.bias, geglu.mult_bias, down.weight, down.bias)
        for place, parameter in enumerate(parameters):
            own = moe.experts.weights[5 * number + place]
            pairs.append((f"expert {number}, {place}", parameter.grad, own.grad))
    return pairs


@pytest.mark.parametrize(("k", "factor"), [(2, 1.25), (2, 8.0), (3, 1.25), (3, 8.0)])
def test_layer_outputs_and_gradients(k, factor):
    """Straight-through dispatch included; 8.0: no drops."""
    torch.manual_seed(k)
    theirs, moe = layers_of(k, factor)
    x = torch.randn(B, S, D)
    theirs_in, ours_in = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(0)
    wanted = theirs(theirs_in)
    torch.manual_seed(0)
    y = moe(ours_in, rows(x)[1])
    assert moe.last_routing.kept[:, 0].all() == (factor == 8.0)
    assert_near(y, wanted.outputs, 1e-5)
    weight = torch.randn(B, S, D)
    loss = (wanted.outputs * weight).sum() + wanted.total_aux_loss
    routing = moe.last_routing
    ours = (y * weight).sum() + 1e-2 * balance(routing, on="kept") + 1e-3 * router_z_loss(routing)
    loss.backward()
    ours.backward()
    assert_near(ours_in.grad, theirs_in.grad, 1e-5)
    for name, theirs_grad, ours_grad in gradients_of(theirs, moe):
        assert_near(ours_grad, theirs_grad, 1e-5, name)


def test_the_straight_through_gradient_is_theirs():
    """Without it the gate's gradient is another."""
    torch.manual_seed(0)
    theirs, moe = layers_of(2, 1.25, straight_through=False)
    x = torch.randn(B, S, D)
    for layer, arguments in ((theirs, ()), (moe, (rows(x)[1],))):
        torch.manual_seed(0)
        y = layer(x, *arguments)
        (y if layer is moe else y.outputs).square().sum().backward()
    _, wanted, got = gradients_of(theirs, moe)[0]
    assert (got - wanted).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, True), (True, False)])
def test_block(before, after):
    torch.manual_seed(0)
    theirs_moe, moe = layers_of(2, 1.25)
    theirs = st_moe.SparseMoEBlock(theirs_moe, add_ff_before=before, add_ff_after=after)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(1, 0.2)

    def dense(expert):
        """Without its norm, which is the block's here."""
        return nn.Sequential(*list(expert.net)[1:])

    block = SparseMoEBlock(
        moe=moe,
        dim=D,
        ff_before=dense(theirs.ff_before) if before else None,
        ff_after=dense(theirs.ff_after) if after else None,
        norm_eps=1e-12,
    )
    block.moe_norm.weight = nn.Parameter(theirs.moe_prenorm.gamma.detach())
    for name, wanted in (("ff_before", before), ("ff_after", after)):
        if wanted:
            gamma = getattr(theirs, name).net[0].gamma.detach()
            getattr(block, f"{name}_norm").weight = nn.Parameter(gamma)
    x = torch.randn(B, S, D)
    torch.manual_seed(0)
    wanted = theirs(x).outputs
    torch.manual_seed(0)
    assert_near(block(x, rows(x)[1]), wanted, 1e-5)
