"""Token choice against formulas in loops, against transformers' DeepSeek-V3, and its promises."""

import itertools
from typing import get_args

import pytest
import torch
from helpers import assert_near, quick, randomise, reference_choice
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.errors import InputError
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.token_choice import ScoreFunction
from moe_builders.routing import TokenInfo, check_routing, expert_of_rows

NO_GROUPS = {}
GROUPS = {"num_groups": 4, "groups_per_token": 2, "group_score_topk": 2}
GROUPS_BY_BEST = {"num_groups": 2, "groups_per_token": 1, "group_score_topk": 1}
GRID = list(
    itertools.product(
        ["softmax", "sigmoid", "topk_softmax", "topk_sigmoid"],
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
        scores = 1 / (1 + torch.exp(-logits)) if "sigmoid" in score_function else logits.exp()
        assert_near(routing.logits, logits, 1e-12)
        assert_near(routing.probs, scores / scores.sum(-1, keepdim=True), 1e-12)


def test_sigmoid_probs_sum_to_1_where_all_scores_vanish():
    router = router_of(score_function="sigmoid", gate_bias=True)
    with torch.no_grad():
        router.gate.bias.fill_(-100)
    routing = router(torch.randn(7, 6), TokenInfo())
    assert_near(routing.probs.sum(-1), torch.ones(7), 1e-6)
    routing.probs.square().sum().backward()
    assert router.gate.weight.grad.isfinite().all()


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
    score_function=st.sampled_from(["softmax", "sigmoid", "topk_softmax", "topk_sigmoid"]),
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
