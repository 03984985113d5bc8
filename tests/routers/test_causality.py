"""Every router: does its routing look ahead, and is what it says of that true? And what all keep.

The routers and what is claimed of them are lines of helpers_routers.py.
"""

import copy
import inspect

import pytest
import torch
from helpers import randomise
from helpers_decoder import decoder_of
from helpers_routers import (
    DIM,
    EXPERTS,
    ROUTERS,
    info_of,
    learn_from,
    losses_of,
    router_in_mode,
)
from torch import nn

from moe_builders import routers
from moe_builders.errors import InputError
from moe_builders.losses import load_balancing_loss, router_z_loss
from moe_builders.moe import MoE, collect_routing, moe_experts
from moe_builders.routing import check_routing, dense_weights

PREFIX = 12
MODES = [
    pytest.param(name, training, id=f"{name}-{'training' if training else 'eval'}")
    for name, case in ROUTERS.items()
    for training in (True, False)
    if training or case.causal_eval is not None
]
every_mode = pytest.mark.parametrize(("name", "training"), MODES)
every_router = pytest.mark.parametrize("name", ROUTERS)


def claims_causal(name, training):
    return ROUTERS[name].causal_training if training else ROUTERS[name].causal_eval


def eighths(tensor):
    """Products of multiples of 1/8 add up without rounding, whatever the order and the kernel."""
    return (tensor * 8).round() / 8


def test_every_router_is_in_the_table():
    public = {getattr(routers, name) for name in routers.__all__}
    found = {
        value
        for value in public
        if inspect.isclass(value)
        and list(inspect.signature(getattr(value, "forward", int)).parameters)[1:] == ["x", "info"]
    }
    assert found
    assert {type(case.make(DIM, EXPERTS)) for case in ROUTERS.values()} == found


@every_mode
def test_what_follows_changes_nothing_before_it_or_the_router_says_so(name, training):
    router = router_in_mode(name, training=training)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(eighths(parameter))
    assert router.causal == claims_causal(name, training)
    leaks = 0
    for seed in range(4):
        stream = torch.Generator().manual_seed(seed)
        prefix = eighths(torch.randn(PREFIX, DIM, generator=stream, dtype=torch.float64))
        seen = []
        lengths = (8, 8) if ROUTERS[name].given_length else (8, 8, 0, 1, 29)
        for suffix in lengths:  # other tokens, fewer, none, more
            t = PREFIX + suffix
            x = eighths(3 * torch.randn(t, DIM, generator=stream, dtype=torch.float64))
            x[:PREFIX] = prefix
            torch.manual_seed(seed)
            seen.append(dense_weights(router(x, info_of(t)))[:PREFIX])
        leaks += sum(not torch.equal(seen[0], other) for other in seen[1:])
    assert (leaks == 0) == router.causal


@pytest.mark.parametrize("name", [n for n, case in ROUTERS.items() if case.causal_eval is None])
def test_a_router_without_a_causal_way_refuses_evaluation(name):
    router = ROUTERS[name].make(DIM, EXPERTS)
    with pytest.raises(InputError, match=r"inference=.*allow_noncausal_eval=True"):
        nn.Sequential(router).eval()
    assert router.training
    router.training = False  # behind its back
    with pytest.raises(InputError, match="allow_noncausal_eval=True"):
        router(torch.randn(4, DIM), info_of(4))


@pytest.mark.parametrize("name", [n for n, case in ROUTERS.items() if case.causal_eval is not None])
def test_a_decoder_generates_as_it_was_evaluated(name):
    """Logits of a whole text = those of its prefixes; where the router leaks they are not."""

    def mlp(layer):
        return MoE(
            router=ROUTERS[name].make(12, EXPERTS),
            experts=moe_experts(embed_dim=12, expert_hidden_dim=8, num_experts=EXPERTS),
        )

    model = decoder_of(torch.float64, num_layers=2, mlp=mlp)
    seeded = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 17, (2, 9), generator=seeded)
    with torch.no_grad():
        # cutoffs of two batches: that of a single one is some token's very score, a draw
        for others in torch.randint(0, 17, (2, 2, 9), generator=seeded):
            model(others)
            for layer, routing in zip(model.layers, collect_routing(model).values(), strict=True):
                if hasattr(layer.mlp.router, "learn"):
                    layer.mlp.router.learn(layer.mlp.router.tally(routing))
        model.eval()
        whole = model(tokens)
        assert any(r.weights.any() for r in collect_routing(model).values()), "experts are used"
        worst = max(float((model(tokens[:, :n]) - whole[:, :n]).abs().max()) for n in range(1, 9))
    case = ROUTERS[name]
    assert (worst < 1e-10) == (case.causal_eval if case.generates is None else case.generates)
    assert worst < 1e-10 or worst > 1e-3


@every_mode
@pytest.mark.parametrize("t", [0, 1, 2, 30])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_its_routing_keeps_what_a_routing_promises(name, training, t, masked):
    router = router_in_mode(name, training=training)
    mask = {"none": None, "some": torch.arange(t) % 3 != 1, "all": torch.zeros(t).bool()}[masked]
    routing = router(torch.randn(t, DIM, dtype=torch.float64), info_of(t, mask, documents=3))
    check_routing(routing)
    assert not routing.weights.isnan().any()
    if masked == "all":
        assert not routing.num_tokens_per_expert.any()
    if routing.own_loss is not None:
        assert routing.own_loss.shape == (t,)
        assert mask is None or not routing.own_loss[~mask].any()


@every_mode
def test_whatever_masked_tokens_hold(name, training):
    router = router_in_mode(name, training=training)
    mask = torch.arange(20) % 4 != 2
    results = []
    x = torch.randn(20, DIM, dtype=torch.float64)
    for poison in (0.0, 1e30, float("nan")):
        given = torch.where(mask[:, None], x, poison).requires_grad_()
        torch.manual_seed(0)
        routing = router(given, info_of(20, mask, documents=2))
        loss = losses_of(routing) + router_z_loss(routing)
        loss = loss + load_balancing_loss(routing, scope="sequence")
        router.zero_grad()
        if loss.requires_grad:
            loss.backward()
        grads = [p.grad for p in router.parameters() if p.grad is not None]
        grads += [] if given.grad is None else [given.grad]
        results.append([dense_weights(routing)[mask], routing.num_tokens_per_expert, loss, *grads])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert torch.equal(got, wanted)
            assert got.isfinite().all()


@every_mode
def test_an_expert_without_tokens(name, training):
    """Through a layer: its gradient is zero, everybody else's is finite."""
    router = router_in_mode(name, training=training, dtype=torch.float32)
    experts = randomise(moe_experts(embed_dim=DIM, expert_hidden_dim=5, num_experts=EXPERTS))
    layer = MoE(router=router, experts=experts)
    for t, mask in ((1, None), (6, torch.zeros(6, dtype=torch.bool))):
        layer.zero_grad()
        x = torch.randn(t, DIM, requires_grad=True)
        layer(x, info_of(t, mask)).square().sum().backward()
        idle = layer.last_routing.num_tokens_per_expert == 0
        gradient = experts.gate_up_proj.grad
        assert gradient.isfinite().all()
        assert not gradient[idle].any()
        assert x.grad.isfinite().all()
        assert mask is None or idle.all()


@pytest.mark.parametrize("name", [n for n, case in ROUTERS.items() if case.has_gate])
def test_the_gate_is_trained_through_the_weights(name):
    router = router_in_mode(name, training=True)
    routing = router(torch.randn(20, DIM, dtype=torch.float64), info_of(20, documents=2))
    (routing.weights * torch.randn_like(routing.weights)).sum().backward()
    assert router.gate.weight.shape == (EXPERTS, DIM)
    assert router.gate.weight.grad.abs().sum() > 0


@every_mode
def test_precision(name, training):
    info = info_of(20, documents=2)
    wanted = {torch.float64: torch.float64, torch.float32: torch.float32}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        router = router_in_mode(name, training=training, dtype=dtype)
        routing = router(torch.randn(20, DIM, dtype=dtype), info)
        for tensor in (routing.weights, routing.logits, routing.probs, routing.own_loss):
            assert tensor is None or tensor.dtype == wanted.get(dtype, torch.float32)


@every_mode
def test_the_same_seed_and_a_copy_route_the_same(name, training):
    router = router_in_mode(name, training=training)
    x, info = torch.randn(20, DIM, dtype=torch.float64), info_of(20, documents=2)
    seen = []
    for module in (router, router, copy.deepcopy(router)):
        torch.manual_seed(7)
        seen.append(dense_weights(module(x, info)))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@every_router
def test_on_the_meta_device_and_filled_from_a_state_dict(name):
    trained = router_in_mode(name, training=True, dtype=torch.float32)
    with torch.device("meta"):
        empty = ROUTERS[name].make(DIM, EXPERTS)
    state = trained.state_dict()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert set(dict(empty.named_buffers())) <= set(state), "buffers are saved"
    if ROUTERS[name].causal_eval is not None:
        empty.eval()  # nothing to look at yet
        trained.eval()
    empty.to_empty(device="cpu").load_state_dict(state)
    x, info = torch.randn(20, DIM), info_of(20, documents=2)
    for module in (trained, empty):
        torch.manual_seed(0)
        module.seen = dense_weights(module(x, info))
    assert torch.equal(trained.seen, empty.seen)


@every_router
def test_the_table_is_used_as_it_says(name):
    """Ids only where they are needed; a router that learns from steps can be told of one."""
    router = randomise(ROUTERS[name].make(DIM, EXPERTS))
    x, info = torch.randn(10, DIM), info_of(10)
    without = type(info)(sequence_ids=info.sequence_ids)
    if ROUTERS[name].needs_input_ids:
        with pytest.raises(InputError, match="input_ids"):
            router(x, without)
    else:
        torch.manual_seed(0)
        wanted = dense_weights(router(x, info))
        torch.manual_seed(0)
        assert torch.equal(dense_weights(router(x, without)), wanted)
    before = copy.deepcopy(list(router.parameters()))
    learn_from(router, x, info)  # outside of gradients: no parameter moves
    assert all(torch.equal(old, new) for old, new in zip(before, router.parameters(), strict=True))
