"""Token choice against formulas in loops, against transformers' DeepSeek-V3, and its promises."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import assert_near, quick, randomise, reference_choice
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_builders.errors import InputError
from moe_builders.losses import load_balancing_loss
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.scores import ScoreFunction, scores_and_probs
from moe_builders.routing import TokenInfo, check_routing, expert_of_rows

NO_GROUPS = {}
GROUPS = {"num_groups": 4, "groups_per_token": 2, "group_score_topk": 2}
GROUPS_BY_BEST = {"num_groups": 2, "groups_per_token": 1, "group_score_topk": 1}
GRID = list(
    itertools.product(
        ["softmax", "sigmoid", "topk_softmax", "topk_sigmoid", "sqrtsoftplus"],
        [True, False],  # normalize_weights
        [1.0, 2.5],  # route_scale
        [True, False],  # expert_bias
        [NO_GROUPS, GROUPS, GROUPS_BY_BEST],
    )
)


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 8, "experts_per_token": 3} | changes
    return randomise(TokenChoiceTopKRouter(**arguments))


def chosen(routing):
    """[t, k] expert and weight of each token's choices, from the sorted list."""
    expert = expert_of_rows(routing.num_tokens_per_expert, routing.token_index.shape[0])
    return expert[routing.slot_of], routing.weights[routing.slot_of]


@pytest.mark.parametrize(
    ("score_function", "normalize", "scale", "bias", "groups"), GRID, ids=lambda v: str(v)[:16]
)
def test_formulas(score_function, normalize, scale, bias, groups):
    router = router_of(
        score_function=score_function,
        normalize_weights=normalize,
        route_scale=scale,
        expert_bias=bias,
        gate_bias=normalize,
        **groups,
    ).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    wanted = reference_choice(router, x)
    routing = router(x, TokenInfo())
    check_routing(routing)
    expert, weights = chosen(routing)
    assert expert.tolist() == [[j for j, _ in choices] for choices in wanted]
    wanted_weights = torch.stack([torch.stack([w for _, w in choices]) for choices in wanted])
    assert_near(weights, wanted_weights, 1e-12)

    probe = torch.randn(20, 3, dtype=torch.float64)
    (weights * probe).sum().backward()
    gradient = router.gate.weight.grad.clone()
    router.zero_grad()
    (wanted_weights * probe).sum().backward()
    assert_near(gradient, router.gate.weight.grad, 1e-12)


def test_logits_and_probs():
    x = torch.randn(5, 6, dtype=torch.float64)
    for score_function in get_args(ScoreFunction):
        router = router_of(score_function=score_function, gate_bias=True, expert_bias=True).double()
        routing = router(x, TokenInfo())
        logits = x @ router.gate.weight.t() + router.gate.bias
        if score_function == "sqrtsoftplus":
            scores = (1 + logits.exp()).log().sqrt()
        else:
            scores = 1 / (1 + torch.exp(-logits)) if "sigmoid" in score_function else logits.exp()
        assert_near(routing.logits, logits, 1e-12)
        assert_near(routing.probs, scores / scores.sum(-1, keepdim=True), 1e-12)


@quick
@given(
    level=st.sampled_from([-1e4, -100.0, -60.0, -39.9, -1.0, 0.0, 20.0, 100.0, 1e4]),
    score_function=st.sampled_from(get_args(ScoreFunction)),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_probs_sum_to_1_at_any_level(level, score_function, spread):
    router = router_of(score_function=score_function, gate_bias=True)
    with torch.no_grad():
        router.gate.bias.fill_(level)
        router.gate.weight.mul_(spread)
    routing = router(torch.randn(7, 6), TokenInfo())
    assert_near(routing.probs.sum(-1), torch.ones(7), 1e-6)
    if spread == 0:  # equal logits: the balanced distribution
        assert_near(routing.probs, torch.full((7, 8), 1 / 8), 1e-6)
        assert float(load_balancing_loss(routing, scope="micro").detach()) == pytest.approx(1)
    (routing.probs.square().sum() + routing.weights.square().sum()).backward()
    assert router.gate.weight.grad.isfinite().all()
    assert routing.weights.isfinite().all()


def test_sqrtsoftplus_against_its_formula_at_any_level():
    z = torch.cat([torch.linspace(-700, 700, 1401), torch.linspace(-45, 45, 1801)]).double()[
        :, None
    ]
    wanted = [math.sqrt(math.log1p(math.exp(v))) if v < 600 else math.sqrt(v) for v in z.flatten()]
    scores, _ = scores_and_probs(z, "sqrtsoftplus")
    ratio = scores.flatten() / torch.tensor(wanted, dtype=torch.float64)
    assert (ratio - 1).abs().max() < 1e-12
    single, _ = scores_and_probs(z.float(), "sqrtsoftplus")
    assert_near(single, scores.float(), 1e-6)


def test_sqrtsoftplus_gradient():
    z = torch.tensor([[-60.0, -40.5, -39.5, -3.0, 0.0, 3.0, 25.0, 300.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: scores_and_probs(v, "sqrtsoftplus"), z.requires_grad_(), eps=1e-6, atol=1e-8
    )


def test_large_logits_are_told_apart_where_their_sigmoids_are_not():
    router = router_of(
        score_function="topk_sigmoid", normalize_weights=False, experts_per_token=1, gate_bias=True
    )
    biases = torch.tensor([60.0, 20.0, 90.0, 40.0, 61.0, 20.0, 89.0, 20.0])
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.bias.copy_(biases)
    assert (biases.sigmoid() == 1).all()
    expert, weights = chosen(router(torch.randn(3, 6), TokenInfo()))
    assert expert.tolist() == [[2]] * 3
    assert (weights == 1).all()


@quick
@given(
    shift=st.sampled_from([-1000.0, -3.0, -0.5, 0.25, 64.0]),
    score_function=st.sampled_from(get_args(ScoreFunction)),
    groups=st.sampled_from([NO_GROUPS, GROUPS, GROUPS_BY_BEST]),
    seed=st.integers(0, 99),
)
def test_a_constant_added_to_the_bias_changes_nothing(shift, score_function, groups, seed):
    router = router_of(score_function=score_function, expert_bias=True, **groups).double()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = chosen(router(x, TokenInfo()))
    router.expert_bias += shift
    after = chosen(router(x, TokenInfo()))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_bias_steers_selection_only():
    router = router_of(score_function="sigmoid", normalize_weights=False, expert_bias=True)
    with torch.no_grad():
        router.expert_bias.fill_(0)
        router.expert_bias[5] = 10
    routing = router(torch.randn(9, 6), TokenInfo())
    expert, weights = chosen(routing)
    assert (expert[:, 0] == 5).all()
    assert_near(weights[:, 0], routing.logits.sigmoid()[:, 5], 1e-6)
    assert "expert_bias" in router.state_dict()
    assert "expert_bias" not in dict(router.named_parameters())
    routing.weights.sum().backward()
    assert router.expert_bias.grad is None


@pytest.mark.parametrize("normalize", [True, False])
def test_transformers_deepseek_v3(normalize):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    ours = TokenChoiceTopKRouter(
        dim=16,
        num_experts=16,
        experts_per_token=4,
        score_function="sigmoid",
        normalize_weights=normalize,
        route_scale=2.5,
        expert_bias=True,
        num_groups=4,
        groups_per_token=2,
        group_score_topk=2,
    )
    with torch.no_grad():
        theirs.weight.copy_(randomise(ours).gate.weight)
        ours.expert_bias.sub_(2)  # all negative: a group masked with 0 would win
        theirs.e_score_correction_bias.copy_(ours.expert_bias)
    x = torch.randn(64, 16)
    logits, weights, experts = theirs(x)
    routing = ours(x, TokenInfo())
    expert, weight = chosen(routing)
    place = expert.argsort(-1), experts.argsort(-1)  # theirs come in any order
    assert torch.equal(expert.gather(1, place[0]), experts.gather(1, place[1]))
    assert_near(weight.gather(1, place[0]), weights.gather(1, place[1]), 1e-6)
    assert_near(routing.logits, logits, 1e-6)


def test_one_expert_per_token_keeps_its_weight_and_its_gradient():
    router = router_of(experts_per_token=1, normalize_weights=True)
    routing = router(torch.randn(9, 6), TokenInfo())
    weights = chosen(routing)[1]
    assert_near(weights[:, 0], routing.probs.amax(-1), 1e-6)
    weights.sum().backward()
    assert router.gate.weight.grad.abs().sum() > 0.1


def test_a_smallest_sum():
    """Weights are divided by the larger of their sum and normalize_min."""
    plain, x = router_of(normalize_weights=False).double(), torch.randn(20, 6).double()
    least, usual = router_of(normalize_min=0.7).double(), router_of().double()
    for router in (least, usual):
        router.load_state_dict(plain.state_dict())
    raw = chosen(plain(x, TokenInfo()))[1]  # [t, k]
    total = raw.sum(-1, keepdim=True)
    assert 3 < (total < 0.7).sum() < 17
    assert_near(chosen(least(x, TokenInfo()))[1], raw / total.clamp(min=0.7), 1e-12)
    assert_near(chosen(usual(x, TokenInfo()))[1], raw / total, 1e-12)


def test_bf16_tokens_are_routed_in_fp32():
    router = router_of().bfloat16()
    x = torch.randn(40, 6).bfloat16()
    routing = router(x, TokenInfo())
    assert routing.logits.dtype == routing.weights.dtype == routing.probs.dtype == torch.float32
    assert_near(routing.logits, x.float() @ router.gate.weight.float().t(), 1e-6)


@quick
@given(
    t=st.integers(0, 12), k=st.integers(1, 8), seed=st.integers(0, 999), masked=st.integers(0, 12)
)
def test_each_real_token_gets_k_distinct_experts(t, k, seed, masked):
    router = router_of(experts_per_token=k)
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, 6, generator=stream)
    mask = torch.randperm(t, generator=stream) >= masked
    routing = router(x, TokenInfo(mask=mask))
    check_routing(routing)
    assert int(routing.num_tokens_per_expert.sum()) == k * int(mask.sum())
    expert = chosen(routing)[0]
    for number in range(t):
        got = set(expert[number].tolist())
        assert len(got) == k if mask[number] else got == {8}
    # the real tokens alone, in the same order, are routed as among the masked ones
    alone = router(x[mask], TokenInfo())
    assert torch.equal(alone.num_tokens_per_expert, routing.num_tokens_per_expert)
    assert torch.equal(chosen(alone)[0], expert[mask])
    assert_near(chosen(alone)[1], chosen(routing)[1][mask], 1e-6)


def test_a_tokens_routing_depends_on_it_alone():
    router = router_of(expert_bias=True, **GROUPS)
    x = torch.randn(12, 6)
    before = chosen(router(x, TokenInfo()))
    x[7:] = torch.randn(5, 6)
    after = chosen(router(x, TokenInfo()))
    assert torch.equal(before[0][:7], after[0][:7])
    assert torch.equal(before[1][:7], after[1][:7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token is 0"),
        ({"experts_per_token": 9}, r"experts_per_token is 9.*num_experts \(8\)"),
        ({"score_function": "relu"}, "'relu' is not one of softmax, sigmoid, topk_softmax, topk_"),
        ({"weights_from": "bias"}, "weights_from 'bias' is not one of scores, biased"),
        ({"weights_from": "biased"}, "there is no bias: set expert_bias to true"),
        ({"gate_precision": "fp8"}, "gate_precision 'fp8' is not one of fp32, fp64, bf16"),
        ({"jitter": "uniform"}, "jitter 'uniform' is not one of logit_gaussian, input_uniform, gu"),
        ({"jitter_scale": 0.1}, "jitter_scale is 0.1, but jitter is not set"),
        ({"jitter": "gumbel", "jitter_scale": -1}, "jitter_scale is -1, but must be at least 0"),
        ({"group_score_topk": "best"}, "group_score_topk is 'best', but must be a whole number"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": 3}, "num_groups is 3, but must divide num_experts"),
        ({"groups_per_token": 2}, r"groups_per_token is 2, .*num_groups \(1\)"),
        ({"num_groups": 4, "groups_per_token": 0}, "groups_per_token is 0"),
        ({"num_groups": 4, "groups_per_token": 5}, "groups_per_token is 5"),
        ({"num_groups": 4, "groups_per_token": 2, "group_score_topk": 0}, "score_topk is 0"),
        ({"num_groups": 4, "groups_per_token": 2, "group_score_topk": 3}, "2 experts of a group"),
        ({"num_groups": 4, "groups_per_token": 1}, "hold only 2 experts: raise groups_per_token"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        router_of(**changes)


def test_weights_from_biased_scores():
    """A fixed case by hand: sigmoids of 0 are ½, the bias of the chosen counts on top."""
    router = router_of(
        score_function="sigmoid", expert_bias=True, weights_from="biased", normalize_weights=False
    )
    with torch.no_grad():
        router.gate.weight.zero_()
        router.expert_bias.copy_(torch.tensor([0.0, 10, 0, 3, 0, 2, 0, 0]))
    expert, weights = chosen(router(torch.randn(4, 6), TokenInfo()))
    assert expert.tolist() == [[1, 3, 5]] * 4
    assert weights.tolist() == [[10.5, 3.5, 2.5]] * 4


@pytest.mark.parametrize("score_function", get_args(ScoreFunction))
def test_weights_from_biased_scores_against_loops(score_function):
    router = router_of(score_function=score_function, expert_bias=True, weights_from="biased")
    x = torch.randn(20, 6, dtype=torch.float64)
    wanted = reference_choice(router.double(), x)
    expert, weights = chosen(router(x, TokenInfo()))
    assert expert.tolist() == [[j for j, _ in choices] for choices in wanted]
    wanted_weights = torch.stack([torch.stack([w for _, w in choices]) for choices in wanted])
    assert_near(weights, wanted_weights, 1e-12)


@pytest.mark.parametrize("score_function", get_args(ScoreFunction))
def test_all_groups_are_no_groups(score_function):
    plain = router_of(score_function=score_function, expert_bias=True)
    grouped = router_of(
        score_function=score_function, expert_bias=True, num_groups=4, groups_per_token=4
    )
    x = torch.randn(50, 6)
    got, wanted = chosen(grouped(x, TokenInfo())), chosen(plain(x, TokenInfo()))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_a_rejected_group_never_wins_with_negative_scores():
    router = router_of(score_function="sigmoid", expert_bias=True, **GROUPS)
    x = torch.randn(64, 6)
    before = chosen(router(x, TokenInfo()))[0]
    router.expert_bias -= 1.5
    after = chosen(router(x, TokenInfo()))[0]
    assert torch.equal(before, after)
    assert max(len(set((row // 2).tolist())) for row in after) <= 2


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", 32), ("half", 32), ("double", 64)])
def test_the_bias_stays_in_fp32_or_wider(dtype, stored):
    model = nn.Sequential(router_of(expert_bias=True))
    with torch.no_grad():
        model[0].expert_bias.fill_(0.1001)  # bf16 and fp16 would round it
    before = model[0].expert_bias.clone()
    getattr(model, dtype)()
    assert model[0].gate.weight.dtype != torch.float32
    assert torch.finfo(model[0].expert_bias.dtype).bits == stored
    assert torch.equal(model[0].expert_bias, before.to(model[0].expert_bias.dtype))
    assert model.state_dict()["0.expert_bias"] is not None
    model.to(torch.bfloat16)
    assert torch.equal(model[0].expert_bias, before)
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    assert model[0].expert_bias.dtype == torch.float32


def test_the_bias_stays_in_fp32_on_its_way_from_the_meta_device():
    with torch.device("meta"):
        router = TokenChoiceTopKRouter(
            dim=6, num_experts=8, experts_per_token=3, expert_bias=True, gate_bias=True
        )
    router.bfloat16()
    assert router.expert_bias.is_meta
    router.to_empty(device="cpu")
    assert (router.expert_bias.dtype, router.gate.weight.dtype) == (torch.float32, torch.bfloat16)
    assert router.expert_bias.device.type == "cpu"
    assert router_of().bfloat16().expert_bias is None


def test_a_bias_of_another_shape_is_refused():
    router = router_of(expert_bias=True)
    state = router.state_dict() | {"expert_bias": torch.zeros(7)}
    with pytest.raises(RuntimeError, match="size mismatch for expert_bias"):
        router.load_state_dict(state)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)],
)
def test_the_precision_of_the_gate(precision, dtype):
    router = router_of(gate_precision=precision, gate_bias=True)
    x = torch.randn(30, 6)
    logits = nn.functional.linear(
        x.to(dtype), router.gate.weight.to(dtype), router.gate.bias.to(dtype)
    )
    routing = router(x, TokenInfo())
    assert torch.equal(routing.logits, logits.float())
    assert routing.weights.dtype == torch.float32
    wide = router_of(gate_bias=True)(x, TokenInfo())
    assert torch.equal(wide.logits, routing.logits) == (precision == "fp32")


def test_a_frozen_router_still_routes_and_passes_gradients_on():
    router, free = router_of(), router_of()
    router.requires_grad_(False)
    x = torch.randn(9, 6, requires_grad=True)
    weights = router(x, TokenInfo()).weights
    assert torch.equal(weights, free(x, TokenInfo()).weights)
    weights.square().sum().backward()
    assert router.gate.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_a_fresh_gate_has_no_bias_towards_an_expert():
    router = TokenChoiceTopKRouter(dim=6, num_experts=8, experts_per_token=3, gate_bias=True)
    assert (router.gate.bias == 0).all()
    assert router.gate.bias.requires_grad
    assert router.causal


@pytest.mark.parametrize(
    ("e", "k", "t", "function", "groups"),
    [
        (1024, 32, 40, "sigmoid", (8, 4)), (1024, 4, 200, "softmax", (1, 1)),
        (512, 8, 8992, "topk_softmax", (8, 4)), (128, 8, 300, "sqrtsoftplus", (1, 1)),
    ],
)  # fmt: skip
def test_many_experts(e, k, t, function, groups):
    """Against numpy in fp64, a token at a time, which knows nothing of topk."""
    router = randomise(
        TokenChoiceTopKRouter(
            dim=16,
            num_experts=e,
            experts_per_token=k,
            score_function=function,
            num_groups=groups[0],
            groups_per_token=groups[1],
        )
    ).double()
    x = torch.randn(t, 16, dtype=torch.float64)
    expert, weights = chosen(router(x, TokenInfo()))
    z = (x @ router.gate.weight.t()).detach().numpy()
    for token in range(t):
        scores = {
            "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
            "softmax": lambda v: np.exp(v) / np.exp(v).sum(),
            "topk_softmax": lambda v: v,
            "sqrtsoftplus": lambda v: np.sqrt(np.log1p(np.exp(v))),
        }[function](z[token])
        wish = scores.reshape(groups[0], -1).copy()
        best = np.argsort(-np.sort(wish, axis=1)[:, -2:].sum(1), kind="stable")
        wish[best[groups[1] :]] = -np.inf
        order = np.argsort(-wish.flatten(), kind="stable")[:k]
        wanted = np.exp(scores[order]) if function == "topk_softmax" else scores[order]
        assert expert[token].tolist() == order.tolist()
        assert np.abs(weights[token].detach().numpy() * wanted.sum() - wanted).max() < 1e-12 * e


def numbered_router(e, k, **changes):
    """Its logits are its inputs."""
    router = TokenChoiceTopKRouter(
        dim=e, num_experts=e, experts_per_token=k, score_function="sigmoid", **changes
    )
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(e))
    return router.double()


def numbered_logits(t, e):
    """[t, e] of whole numbers: the same everywhere, without a random stream."""
    number = torch.arange(t * e, dtype=torch.int64)
    return ((number * 7919 + number * number * 104729) % 10007).double().view(t, e) / 2500 - 2


@pytest.mark.parametrize(
    ("k", "kept", "rule", "first", "first_of_two", "others", "balance"),
    [
        (8, 2, 4, [[13, 15, 4, 5, 12, 6, 7, 14], [15, 5, 14, 6, 13, 7, 12, 4],
                   [11, 4, 5, 8, 10, 6, 9, 7], [14, 15, 13, 0, 1, 12, 2, 3]],
         [[13, 9, 15, 12, 10, 14, 8, 11], [15, 5, 14, 6, 13, 7, 12, 4],
          [11, 4, 5, 8, 10, 6, 9, 7], [7, 5, 14, 15, 13, 12, 6, 4]], 41, 1.0010259578778795),
        (4, 1, 4, [[13, 15, 12, 14], [15, 14, 13, 12], [11, 8, 10, 9], [14, 15, 13, 12]],
         [[13, 15, 12, 14], [15, 14, 13, 12], [4, 5, 6, 7], [7, 5, 6, 4]], 42, 1.0001681351358442),
        (4, 2, 2, [[13, 9, 15, 12], [15, 5, 14, 6], [11, 4, 5, 8], [7, 5, 14, 15]],
         [[13, 9, 15, 12], [15, 5, 14, 6], [11, 4, 5, 8], [7, 5, 14, 15]], 0, 1.0044106772604173),
    ],
)  # fmt: skip
def test_the_group_rule_auto(k, kept, rule, first, first_of_two, others, balance):
    """k // groups_per_token best members; committed numbers come from a loop without torch:
    the sum of the best sigmoids of each group of 4, the k best of the best groups, first 4 of 128
    tokens; how many tokens the rule of 2 sends elsewhere; e·Σ f·P over the normalised sigmoids."""
    sizes = {"num_groups": 4, "groups_per_token": kept}
    auto = numbered_router(16, k, **sizes, group_score_topk="auto")
    two, x = numbered_router(16, k, **sizes), numbered_logits(128, 16)
    assert auto.group_score_topk == rule
    assert two.group_score_topk == 2
    routing = auto(x, TokenInfo())
    got, other = routing.selected, two(x, TokenInfo()).selected
    assert got[:4].tolist() == first
    assert other[:4].tolist() == first_of_two
    assert int((got.sort(-1).values != other.sort(-1).values).any(-1).sum()) == others
    loss = float(load_balancing_loss(routing, scope="micro").detach())
    assert loss == pytest.approx(balance, rel=1e-12)


def test_the_group_rule_auto_of_fewer_experts_than_groups():
    router = numbered_router(16, 2, num_groups=4, groups_per_token=3, group_score_topk="auto")
    assert router.group_score_topk == 1
