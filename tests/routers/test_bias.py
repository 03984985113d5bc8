"""Loss-free balancing: the bias after one, two, three steps by hand, and who may move it."""

import pytest
import torch
from helpers import assert_near, quick, randomise
from helpers_decoder import batch, decoder_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders.errors import InputError
from moe_builders.moe import moe_layer
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routers.bias import (
    BiasRule,
    check_bias_rule,
    needed_bias_histogram,
    quantile_step,
    selection_counts,
    sign_step,
)
from moe_builders.routing import LearningRouter, TokenInfo


def router_of(rule=None, **changes):
    arguments = {
        "dim": 6, "num_experts": 8, "experts_per_token": 3, "score_function": "sigmoid",
        "expert_bias": True,
    }  # fmt: skip
    router = randomise(TokenChoiceTopKRouter(**(arguments | changes)))
    router.bias_rule = rule
    return router


def skewed(e=16, k=2, function="sigmoid"):
    """A router that likes the later experts."""
    router = TokenChoiceTopKRouter(
        dim=12, num_experts=e, experts_per_token=k, score_function=function, expert_bias=True,
        gate_bias=True,
    )  # fmt: skip
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.gate.weight.normal_(0, 0.3, generator=stream)
        router.gate.bias.copy_(torch.linspace(-2, 2, e))
    return router


def test_the_sign_rule_by_hand():
    rule = BiasRule(0.25)
    bias = torch.tensor([0.0, 1.0, -1.0, 0.5])
    for counts, wanted in (
        ([6, 2, 0, 0], [-0.25, 1.0, -0.75, 0.75]),  # mean 2
        ([1, 1, 1, 1], [-0.25, 1.0, -0.75, 0.75]),  # balanced: nothing moves
        ([0, 0, 0, 10], [0.0, 1.25, -0.5, 0.5]),
        ([0, 0, 0, 0], [0.0, 1.25, -0.5, 0.5]),  # nobody was routed
    ):
        bias = sign_step(bias, torch.tensor(counts).double(), rule)
        assert bias.tolist() == wanted


class MeanByReciprocal(TorchDispatchMode):
    """A mean as a GPU computes it: the sum times 1/n."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mean.default:
            return args[0].sum() * (1 / args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("e", [49, 75, 150])
def test_an_expert_at_the_mean_stays_whatever_way_means_are_computed(e):
    bias = torch.linspace(-1, 1, e)
    with MeanByReciprocal():
        for load in range(1, 200):
            balanced = torch.full((e,), load, dtype=torch.float64)
            assert torch.equal(sign_step(bias, balanced, BiasRule(0.25)), bias), load


def test_recentering_takes_the_mean_away():
    bias = torch.tensor([0.0, 1.0, -1.0, 0.5])
    counts = torch.tensor([7.0, 1.0, 1.0, 1.0]).double()
    plain = sign_step(bias, counts, BiasRule(0.25))
    assert plain.tolist() == [-0.25, 1.25, -0.75, 0.75]
    centred = sign_step(bias, counts, BiasRule(0.25, recenter=True))
    assert centred.tolist() == [-0.5, 1.0, -1.0, 0.5]


def test_three_steps_of_a_router_by_hand():
    """Gate = identity on the first experts: tokens go where their entries say."""
    router = TokenChoiceTopKRouter(
        dim=3, num_experts=3, experts_per_token=1, score_function="sigmoid", expert_bias=True
    )
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))
    router.bias_rule = BiasRule(0.5)
    buffer = router.expert_bias
    x = torch.tensor([[9.0, 0, 0], [9, 0, 0], [9, 0, 0], [0, 0, 9.0]])
    # scores 1 and ½: loads 3, 0, 1 (mean 4/3); then 0 has -½, 1 and 2 have ½: token 0 to 2 sees
    # ½, 1, 1 and takes the first of the two best; the last sees 0, 1, 1.5
    routing = router(x, TokenInfo())
    assert router.tally(routing).tolist() == [3, 0, 1]
    router.learn(router.tally(routing))
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.5]
    x[:3, 1] = 1.0  # no draw any more: ½, 1.23, 1
    routing = router(x, TokenInfo())
    assert router.tally(routing).tolist() == [0, 3, 1]
    router.learn(router.tally(routing))
    assert router.expert_bias.tolist() == [0.0, 0.0, 1.0]
    routing = router(x, TokenInfo())  # 1, 0.73, 1.5
    assert router.tally(routing).tolist() == [0, 0, 4]
    router.learn(router.tally(routing))
    assert router.expert_bias.tolist() == [0.5, 0.5, 0.5]
    assert router.expert_bias is buffer  # in place: whoever holds the buffer sees it
    assert buffer.dtype == torch.float32
    assert not buffer.requires_grad
    assert isinstance(router, LearningRouter)


@pytest.mark.parametrize("name", ["sign", "quantile"])
def test_masked_tokens_count_nowhere(name):
    router, x = router_of(BiasRule(0.5, name)), torch.randn(30, 6)
    mask = torch.arange(30) % 3 > 0
    wanted = router.tally(router(x[mask], TokenInfo()))
    x[~mask] = float("nan")
    got = router.tally(router(x, TokenInfo(mask=mask)))
    assert torch.equal(got, wanted)
    assert float(got.sum()) == 20 * (3 if name == "sign" else 8)
    assert got.dtype == torch.float64
    none = router.tally(router(x, TokenInfo(mask=torch.zeros(30, dtype=torch.bool))))
    before = router.expert_bias.clone()
    router.learn(none)
    assert torch.equal(router.expert_bias, before)


@pytest.mark.parametrize("name", ["sign", "quantile"])
def test_tallies_of_micro_batches_add_up(name):
    router, x = router_of(BiasRule(0.5, name)), torch.randn(30, 6)
    parts = [router.tally(router(part, TokenInfo())) for part in (x[:7], x[7:8], x[8:])]
    assert torch.equal(sum(parts), router.tally(router(x, TokenInfo())))


def test_what_was_dropped_counts():
    """The load is what was asked for: counts after a drop would hide a collapse."""
    router = router_of(BiasRule(0.5))
    routing = router(torch.randn(30, 6), TokenInfo())
    dropped = type(routing)(**(vars(routing) | {"kept": torch.zeros(30, 3, dtype=torch.bool)}))
    assert torch.equal(router.tally(dropped), router.tally(routing))
    assert torch.equal(selection_counts(routing), routing.num_tokens_per_expert.double())


def no_rule(router):
    router.bias_rule = None


def rate_0(router):
    router.bias_rule = BiasRule(0.0)


def no_bias(router):
    router.expert_bias = None


def frozen(router):
    router.requires_grad_(False)


@pytest.mark.parametrize("switch", [no_rule, rate_0, no_bias, frozen])
def test_nothing_is_learned(switch):
    router, x = router_of(BiasRule(0.5)), torch.randn(30, 6)
    assert router.tally(router(x, TokenInfo())).numel() == 8
    before = router.expert_bias.clone()
    switch(router)
    tally = router.tally(router(x, TokenInfo()))
    assert tally.shape == (0,)
    assert tally.dtype == torch.float64
    router.learn(tally)
    if router.expert_bias is not None:
        assert torch.equal(router.expert_bias, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_but_learn_moves_the_bias(checkpointing):
    """Not forward, backward, recomputation, evaluation; and a recomputation counts nothing."""

    def mlp(layer):
        return moe_layer(
            embed_dim=12, expert_hidden_dim=8, num_experts=4, experts_per_token=2, expert_bias=True
        )

    model, (tokens, info) = decoder_of(mlp=mlp), batch()
    model.activation_checkpointing = checkpointing
    routers = [layer.mlp.router for layer in model.layers]
    for router in routers:
        router.bias_rule = BiasRule(0.5)
    before = [router.expert_bias.clone() for router in routers]
    loss = model(tokens, info=info).square().sum()
    tallies = [r.tally(layer.mlp.last_routing) for r, layer in zip(routers, model.layers)]  # noqa: B905
    loss.backward()
    for router, layer, tally in zip(routers, model.layers, tallies, strict=True):
        assert torch.equal(router.tally(layer.mlp.last_routing), tally)
        assert float(tally.sum()) == 2 * int(info.mask.sum())
    with torch.no_grad():
        model.eval()(tokens, info=info)
    for router, was in zip(routers, before, strict=True):
        assert torch.equal(router.expert_bias, was)
        assert router.expert_bias.grad is None
    routers[1].learn(tallies[1])
    assert not torch.equal(routers[1].expert_bias, before[1])
    assert torch.equal(routers[0].expert_bias, before[0])


def test_small_steps_are_not_lost_in_bf16():
    router = router_of(BiasRule(1e-4)).bfloat16()
    with torch.no_grad():
        router.expert_bias.fill_(1.0)  # bf16 tells 1 and 1.0001 not apart
    router.learn(torch.tensor([0, 0, 0, 0, 0, 0, 0, 80.0]).double())
    assert_near(router.expert_bias, torch.tensor([1.0001] * 7 + [0.9999]), 1e-7)


@quick
@given(
    seed=st.integers(0, 999), k=st.integers(1, 7), shift=st.sampled_from([0.0, -3.0, 0.75]),
    masked=st.integers(0, 10),
)  # fmt: skip
def test_the_histogram_against_a_loop(seed, k, shift, masked):
    stream = torch.Generator().manual_seed(seed)
    t, e, n, half = 12, 8, 16, 0.5
    scores = torch.rand(t, e, generator=stream, dtype=torch.float64)
    bias = (torch.rand(e, generator=stream) - 0.5 + shift).double()
    mask = torch.arange(t) >= masked
    got = needed_bias_histogram(scores, bias, experts_per_token=k, mask=mask, half=half, n=n).view(
        e, n
    )
    level = bias - bias.mean()
    wanted = torch.zeros(e, n, dtype=torch.float64)
    for token in range(masked, t):
        cutoff = sorted((scores[token] + level).tolist(), reverse=True)[k]
        for j in range(e):
            needed = cutoff - float(scores[token, j])
            wanted[j, min(max(int((needed + half) // (2 * half / n)), 0), n - 1)] += 1
    assert torch.equal(got, wanted)


def test_the_quantile_by_hand():
    """Four bins of ½ around 0; two experts of which each token takes one: the share is half."""
    rule = BiasRule(1.0, "quantile", bins=4, histogram_range=1.0)
    histogram = torch.tensor([[0.0, 4, 0, 0], [1, 1, 0, 2]]).double().flatten()
    bias = torch.tensor([0.25, -0.25])
    # half of 4 tokens: the middle of [-½, 0); two tokens: the end of that bin
    moved = quantile_step(bias, histogram, rule, experts_per_token=1, half=1.0)
    assert moved.tolist() == [-0.25, 0.0]
    half = BiasRule(0.5, "quantile", bins=4, histogram_range=1.0)
    moved = quantile_step(bias, histogram, half, experts_per_token=1, half=1.0)
    assert moved.tolist() == [0.0, -0.125]
    centred = BiasRule(0.5, "quantile", bins=4, histogram_range=1.0, recenter=True)
    moved = quantile_step(bias, histogram, centred, experts_per_token=1, half=1.0)
    assert moved.tolist() == [0.0625, -0.0625]
    # the bins lie around the mean of the bias
    moved = quantile_step(bias + 5, histogram, rule, experts_per_token=1, half=1.0)
    assert moved.tolist() == [4.75, 5.0]
    nobody = quantile_step(bias, histogram * 0, rule, experts_per_token=1, half=1.0)
    assert torch.equal(nobody, bias)


@pytest.mark.parametrize("function", ["sigmoid", "topk_softmax", "topk_sigmoid"])
def test_the_quantile_rule_balances_a_skewed_router_within_a_few_steps(function):
    """max load / mean load over 4096 tokens of each of 6 steps, fresh tokens each time."""
    router = skewed(function=function)
    router.bias_rule = BiasRule(1.0, "quantile")
    stream = torch.Generator().manual_seed(1)
    loads = []
    for _ in range(7):
        routing = router(torch.randn(4096, 12, generator=stream), TokenInfo())
        counts = selection_counts(routing)
        loads.append(float(counts.max() / counts.mean()))
        router.learn(router.tally(routing))
    assert loads[0] > 4.5
    assert loads[2] < 1.6
    assert loads[-1] < 1.2
    signed = skewed(function=function)
    signed.bias_rule = BiasRule(0.001)
    for _ in range(6):
        routing = signed(torch.randn(4096, 12, generator=stream), TokenInfo())
        signed.learn(signed.tally(routing))
    counts = selection_counts(routing)
    assert float(counts.max() / counts.mean()) > 4  # small steps take hundreds


def test_the_sign_rule_balances_in_the_long_run():
    router = skewed()
    router.bias_rule = BiasRule(0.005)
    x = torch.randn(2048, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(150):
        routing = router(x, TokenInfo())
        router.learn(router.tally(routing))
    counts = selection_counts(routing)
    assert float(counts.max() / counts.mean()) < 1.15


def test_the_quantile_uses_the_routers_own_scores():
    """Logits reach beyond 1, the range of sigmoids: a histogram of ±1 could not balance them."""
    for function, half in (("sigmoid", 1.0), ("topk_softmax", 16.0), ("topk_sigmoid", 16.0)):
        router = router_of(BiasRule(1.0, "quantile"), score_function=function)
        routing = router(torch.randn(30, 6), TokenInfo())
        scores = routing.logits.sigmoid() if function == "sigmoid" else routing.logits
        wanted = needed_bias_histogram(
            scores, router.expert_bias, experts_per_token=3, mask=None, half=half, n=512
        )
        assert torch.equal(router.tally(routing), wanted)
        assert wanted.numel() == 8 * 512
        router.bias_rule = BiasRule(1.0, "quantile", histogram_range=2.0, bins=4)
        assert router.tally(routing).numel() == 32


class Plain(nn.Module):
    num_experts = 4

    def __init__(self):
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(4))


@pytest.mark.parametrize(
    ("router", "rule", "message"),
    [
        (router_of(expert_bias=False), BiasRule(0.1), "Router has no expert_bias: build it with"),
        (ExpertChoiceTopKRouter(dim=6, num_experts=8), BiasRule(0.1), "has no expert_bias"),
        (router_of().requires_grad_(False), BiasRule(0.1), "but the gate is frozen, and"),
        (router_of(score_function="softmax"), BiasRule(1, "quantile"), "Router's is softmax: use"),
        (router_of(score_function="sqrtsoftplus"), BiasRule(1, "quantile"), "is sqrtsoftplus: use"),
        (router_of(num_groups=4, groups_per_token=2), BiasRule(1, "quantile"), "groups is 4: use"),
        (router_of(experts_per_token=8), BiasRule(1, "quantile"), "there is nothing to balance"),
        (Plain(), BiasRule(1, "quantile"), "the Plain's is None"),
    ],
)  # fmt: skip
def test_rules_that_a_router_cannot_follow(router, rule, message):
    with pytest.raises(InputError, match=message):
        check_bias_rule(router, rule)


def test_rules_that_a_router_can_follow():
    check_bias_rule(router_of(num_groups=4, groups_per_token=2), BiasRule(0.1))
    check_bias_rule(router_of(score_function="softmax"), BiasRule(0.1))
    check_bias_rule(router_of().requires_grad_(False), BiasRule(0.0))
    check_bias_rule(Plain(), BiasRule(0.1))
    for function in ("sigmoid", "topk_softmax", "topk_sigmoid"):
        check_bias_rule(router_of(score_function=function), BiasRule(1, "quantile"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update_rate": -1}, "update_rate is -1, but with rule sign must be at least 0"),
        ({"update_rate": float("nan")}, "update_rate is nan"),
        ({"update_rate": float("inf")}, "update_rate is inf"),
        ({"update_rate": 1.5, "rule": "quantile"}, "1.5, but with rule quantile must be between 0"),
        ({"update_rate": 1, "rule": "median"}, "rule 'median' is not one of sign, quantile"),
        ({"update_rate": 1, "bins": 1}, "bins is 1, but a histogram needs at least 2"),
        ({"update_rate": 1, "histogram_range": 0.0}, "histogram_range is 0.0, but must be above 0"),
    ],
)
def test_numbers_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        BiasRule(**arguments)
    assert BiasRule(1.5).update_rate == 1.5
