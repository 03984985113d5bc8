"""How tokens decide by themselves after experts have picked: by loops, by hand, and trained."""

import copy
import math

import pytest
import torch
from helpers import assert_near, randomise
from torch import nn

from moe_builders.errors import InputError
from moe_builders.losses import count_assignments, load_balancing_loss
from moe_builders.moe import MoE, collect_routing, moe_experts
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routing import (
    LearningRouter,
    TokenInfo,
    check_routing,
    dense_weights,
    expert_of_rows,
)

LEARNED = ["predictor", "bce"]
WAYS = ["threshold_ema", *LEARNED]


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 4, "capacity_factor": 1.5} | changes
    return randomise(ExpertChoiceTopKRouter(**arguments))


def tokens(t=12, dtype=torch.float64):
    return torch.randn(t, 6, dtype=dtype)


def set_cutoffs(router, values):
    router.cutoff.copy_(torch.tensor(values))
    router.cutoff_updates.fill_(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at_most", [None, 1, 2])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_who_takes_a_token_in_evaluation(way, at_most, scope):
    router = router_of(inference=way, scope=scope, max_experts_per_token=at_most).double()
    if way == "threshold_ema":
        set_cutoffs(router, [0.1, 0.2, 0.3, 0.4])
    x, mask = tokens(40), torch.arange(40) % 5 != 3
    routing = router.eval()(x, TokenInfo(mask=mask))
    check_routing(routing)
    assert routing.token_index.shape == (40 * (at_most or 4),)
    probs = (x @ router.gate.weight.t()).softmax(-1).detach()
    wanted = torch.zeros_like(probs)
    for i in range(40):
        if way == "threshold_ema":
            takers = [j for j in range(4) if probs[i, j] >= [0.1, 0.2, 0.3, 0.4][j]]
        else:
            head = router.gate if way == "bce" else router.predictor
            takers = [j for j in range(4) if head(x[i])[j] > 0]
        takers.sort(key=lambda j: -float(probs[i, j]))
        for j in takers[:at_most] if mask[i] else []:
            wanted[i, j] = probs[i, j]
    per_token = (wanted > 0).sum(1)
    assert per_token.min() == 0
    assert per_token.max() == (at_most or per_token.max())
    assert per_token.max() > 1 or at_most == 1
    assert_near(dense_weights(routing), wanted, 1e-12)
    # counted from the list: nothing was asked for and then dropped
    assert routing.selected is None
    assert routing.kept is None
    assert routing.own_loss is None
    assert count_assignments(routing).tolist() == (wanted > 0).sum(0).tolist()
    assert load_balancing_loss(routing, scope="sequence").isfinite()


def test_a_token_that_nobody_takes_passes_on_the_residual():
    router = router_of(inference="threshold_ema")
    set_cutoffs(router, [1.0] * 4)
    layer = MoE(router=router, experts=moe_experts(embed_dim=6, expert_hidden_dim=5, num_experts=4))
    randomise(layer)
    assert not layer.eval()(torch.randn(3, 6)).any()


def worst_taken(routing):
    """For each expert the smallest weight among its live rows, None where there is none."""
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])
    found = [[] for _ in range(4)]
    for j, token, weight in zip(expert, routing.token_index, routing.weights, strict=True):
        if j < 4:
            found[j].append((int(token), float(weight.detach())))
    return found


def test_cutoffs_of_two_steps_by_hand():
    router = router_of(inference="threshold_ema", ema_decay=0.75).double()
    assert isinstance(router, LearningRouter)
    steps = []
    for step in range(2):
        routings = [router(tokens(t), TokenInfo()) for t in (8, 12, 20)]  # micro-batches
        tally = torch.stack([router.tally(routing) for routing in routings]).sum(0)
        assert tally.dtype == torch.float64
        steps.append(
            [
                sum(min(w for _, w in worst_taken(routing)[j]) for routing in routings) / 3
                for j in range(4)
            ]
        )
        router.learn(tally)
        assert router.cutoff_updates.tolist() == [step + 1] * 4
        if step == 0:  # set, not averaged from 0
            assert_near(router.cutoff, torch.tensor(steps[0], dtype=torch.float64), 1e-12)
    wanted = [0.75 * a + 0.25 * b for a, b in zip(*steps, strict=True)]
    assert_near(router.cutoff, torch.tensor(wanted, dtype=torch.float64), 1e-12)


def test_cutoffs_of_documents_by_hand():
    router = router_of(inference="threshold_ema", scope="sequence", max_experts_per_token=2)
    ids = torch.tensor([0] * 9 + [3] * 2 + [5] * 13)
    mask = torch.arange(24) % 6 != 2
    routing = router.double()(tokens(24), TokenInfo(sequence_ids=ids, mask=mask))
    total, number = router.tally(routing).chunk(2)
    for j, rows in enumerate(worst_taken(routing)):
        by_document = {}
        for token, weight in rows:
            by_document.setdefault(int(ids[token]), []).append(weight)
        assert int(number[j]) == len(by_document)
        assert float(total[j]) == pytest.approx(sum(map(min, by_document.values())), rel=1e-12)


@pytest.mark.parametrize(
    "changes", [{}, {"scope": "sequence"}, {"scope": "sequence", "max_experts_per_token": 2}]
)
def test_on_the_tokens_it_learned_from_evaluation_takes_the_same(changes):
    router = router_of(inference="threshold_ema", capacity_factor=2.0, **changes)
    x = tokens(50, torch.float32)
    picked = router(x, TokenInfo())
    router.learn(router.tally(picked))
    assert torch.equal(dense_weights(router.eval()(x, TokenInfo())), dense_weights(picked))


def test_only_learn_moves_the_cutoffs():
    router = router_of(inference="threshold_ema")
    x = tokens(20, torch.float32)
    router.learn(router.tally(router(x, TokenInfo())))
    before = router.cutoff.clone(), router.cutoff_updates.clone()
    for _ in range(2):
        router.train()(3 * x, TokenInfo())
        router.eval()(3 * x, TokenInfo())
    # a step in which everything is masked has nothing to say
    nothing = router.train()(x, TokenInfo(mask=torch.zeros(20, dtype=torch.bool)))
    router.learn(router.tally(nothing))
    assert torch.equal(router.cutoff, before[0])
    assert torch.equal(router.cutoff_updates, before[1])


def test_cutoffs_begin_at_the_mean_and_an_expert_that_took_nothing_keeps_its_own():
    router = router_of(inference="threshold_ema")
    x = tokens(20, torch.float32)
    taken = dense_weights(router.eval()(x, TokenInfo())) > 0
    assert torch.equal(taken, router(x, TokenInfo()).probs >= 0.25)
    router.learn(torch.tensor([0.2, 0.3, 0.0, 0.4, 1, 1, 0, 1], dtype=torch.float64))
    assert router.cutoff_updates.tolist() == [1, 1, 0, 1]
    torch.testing.assert_close(router.cutoff, torch.tensor([0.2, 0.3, 0.25, 0.4]))


def test_without_cutoffs_there_is_nothing_to_learn():
    router = router_of(inference="predictor")
    tally = router.tally(router(tokens(5, torch.float32), TokenInfo()))
    assert tally.shape == (0,)
    assert tally.dtype == torch.float64
    router.learn(tally)
    assert not dict(router.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cutoffs_move_with_the_model_but_stay_in_fp32_or_wider(dtype):
    model = nn.Sequential(router_of(inference="threshold_ema"))
    set_cutoffs(model[0], [0.1, 0.2, 0.3, 0.123456789])
    before = model[0].cutoff.clone()
    model.to(dtype)
    assert model[0].gate.weight.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(model[0].cutoff, before.to(wide))
    assert model[0].cutoff.dtype == model[0].cutoff_updates.dtype == wide
    assert set(model[0].state_dict()) == {"gate.weight", "cutoff", "cutoff_updates"}
    moved = model.to("meta", torch.bfloat16)[0].cutoff  # both at once
    assert moved.is_meta
    assert moved.dtype == torch.float32


@pytest.mark.parametrize("way", LEARNED)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_own_loss_by_hand(way, scope):
    router = router_of(inference=way, scope=scope).double()
    x, mask = tokens(14).requires_grad_(), torch.arange(14) % 4 != 1
    routing = router(x, TokenInfo(mask=mask, sequence_ids=torch.arange(14) // 9))
    taken = dense_weights(routing) > 0
    head = router.gate if way == "bce" else router.predictor
    for i in range(14):
        says = [1 / (1 + math.exp(-float(logit))) for logit in head(x[i]).detach()]
        each = [-math.log(p if taken[i, j] else 1 - p) for j, p in enumerate(says)]
        wanted = sum(each) / 4 if mask[i] else 0.0
        assert float(routing.own_loss[i].detach()) == pytest.approx(wanted, rel=1e-12)

    routing.own_loss.sum().backward()
    moved = {name for name, p in router.named_parameters() if p.grad is not None and p.grad.any()}
    if way == "bce":
        assert moved == {"gate.weight"}
        assert x.grad.any()
    else:  # trains nothing but itself
        assert moved == {"predictor.weight", "predictor.bias"}
        assert x.grad is None


def test_ways_without_a_loss_have_none():
    x = tokens(6, torch.float32)
    assert router_of()(x, TokenInfo()).own_loss is None
    assert router_of(inference="threshold_ema")(x, TokenInfo()).own_loss is None
    leaking = router_of(inference="bce", allow_noncausal_eval=True)
    assert leaking.eval()(x, TokenInfo()).own_loss is None


@pytest.mark.parametrize("way", [None, *WAYS])
def test_with_the_leak_allowed_experts_pick_in_evaluation(way):
    router = router_of(inference=way, allow_noncausal_eval=True)
    x = tokens(20, torch.float32)
    picked = dense_weights(router(x, TokenInfo()))
    assert torch.equal(dense_weights(router.eval()(x, TokenInfo())), picked)
    assert not router.causal


def test_a_gate_of_token_choice_fits():
    other = TokenChoiceTopKRouter(dim=6, num_experts=4, experts_per_token=2)
    router = router_of(inference="predictor")
    missing = router.load_state_dict(other.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(router.gate.weight, other.gate.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "micro"}, "scope 'micro' is not one of batch, sequence"),
        ({"inference": "ema"}, "inference 'ema' is not one of predictor, bce, threshold_ema"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, but must be at least 0 and below 1"),
        ({"ema_decay": -0.1}, "ema_decay is -0.1"),
        ({"max_experts_per_token": 0}, r"max_experts_per_token is 0.*1 and num_experts \(4\)"),
        ({"max_experts_per_token": 5}, "max_experts_per_token is 5"),
        ({"jitter": "uniform", "jitter_scale": 0.1}, "jitter 'uniform' is not one of"),
        ({"gate_precision": "fp8"}, "gate_precision 'fp8' is not one of"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        router_of(**changes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_in_both_modes(way, training):
    """No graph break, so nothing is read on the host, and no recompilation for another mask."""
    torch._dynamo.reset()
    router = router_of(inference=way, scope="sequence", max_experts_per_token=3)
    if way == "threshold_ema":
        set_cutoffs(router, [0.2] * 4)
    moe = MoE(router=router, experts=moe_experts(embed_dim=6, expert_hidden_dim=5, num_experts=4))
    randomise(moe).train(training)
    eager = copy.deepcopy(moe)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (2, 3):
            info = TokenInfo(
                mask=torch.arange(12) % number != 1, sequence_ids=torch.arange(12) // 5
            )
            x = tokens(12, torch.float32)
            assert_near(compiled(x, info), eager(x, info), 1e-5)


def clusters(t, dim, stream):
    """Tokens around four centres, equally often, in random order."""
    centre = torch.randperm(t, generator=stream) % 4
    return 2 * torch.eye(4, dim)[centre] + 0.3 * torch.randn(t, dim, generator=stream)


def trained(way, steps, *, draw):
    """A layer on a task of its own, trained as a recipe would: own loss, tally, learn."""
    stream = torch.Generator().manual_seed(0)
    router = ExpertChoiceTopKRouter(
        dim=6, num_experts=4, capacity_factor=1.0, inference=way, ema_decay=0.9
    )
    layer = MoE(router=router, experts=moe_experts(embed_dim=6, expert_hidden_dim=8, num_experts=4))
    randomise(layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(steps):
        tally = torch.zeros((), dtype=torch.float64)
        for _ in range(2):  # micro-batches
            x = draw(128, 6, stream)
            loss = (layer(x) - x.roll(1, -1)).square().mean()
            (routing,) = collect_routing(layer).values()
            if routing.own_loss is not None:
                loss = loss + routing.own_loss.mean()
            loss.backward()
            tally = tally + router.tally(routing)
        optimizer.step()
        optimizer.zero_grad()
        router.learn(tally)
    return layer, draw(2048, 6, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", LEARNED)
def test_a_learned_way_agrees_with_what_experts_pick(way):
    layer, x = trained(way, 80, draw=clusters)
    with torch.no_grad():
        picked = dense_weights(layer.router(x, TokenInfo())) > 0
        alone = dense_weights(layer.eval().router(x, TokenInfo())) > 0
    assert picked.double().mean() == 0.25, "always saying no would be right three times in four"
    assert (picked == alone).double().mean() > 0.9


def test_cutoffs_give_experts_the_load_of_training():
    layer, x = trained(
        "threshold_ema", 60, draw=lambda t, d, stream: torch.randn(t, d, generator=stream)
    )
    with torch.no_grad():
        layer.eval()(x)
    counts = layer.last_routing.num_tokens_per_expert.double()
    assert ((counts - 512).abs() <= 0.2 * 512).all(), counts
