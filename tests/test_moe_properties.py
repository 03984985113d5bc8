"""What must hold of the MoE layer for any input: masks, order, causality, idle experts."""

import itertools

import pytest
import torch
from helpers import D, E, assert_near, gradients, moe_of, one_expert, plain_moe, quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.routing import TokenInfo, check_routing

POSITIONS = ["before", "mid", "after"]


@pytest.mark.parametrize("router", ["token", "expert"])
@pytest.mark.parametrize("score_position", POSITIONS)
def test_padding_changes_nothing(router, score_position):
    moe = moe_of(score_position, router=router, bias=router == "token")
    x = torch.randn(12, D, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    padded = moe(x, TokenInfo(mask=mask))
    assert torch.equal(padded[~mask], torch.zeros(4, D, dtype=torch.float64))
    with_padding = moe.last_routing
    check_routing(with_padding)
    padded.square().sum().backward()
    grads = gradients(moe)

    unpadded = moe(x[mask])
    assert_near(padded[mask], unpadded, 1e-12)
    counts = moe.last_routing.num_tokens_per_expert
    assert torch.equal(with_padding.num_tokens_per_expert, counts)
    unpadded.square().sum().backward()
    for name, gradient in gradients(moe).items():
        assert_near(grads[name], gradient, 1e-12, name)

    x[~mask] = 100 * torch.randn(4, D, dtype=torch.float64)  # whatever padding holds
    assert_near(moe(x, TokenInfo(mask=mask))[mask], unpadded, 1e-12)


def test_only_token_info_decides_what_is_masked():
    moe = moe_of()
    x = torch.zeros(5, D, dtype=torch.float64)
    x[2:] = torch.randn(3, D, dtype=torch.float64)
    moe(x, TokenInfo(input_ids=torch.zeros(5, dtype=torch.int64)))  # zeros look like padding
    assert int(moe.last_routing.num_tokens_per_expert.sum()) == 10
    moe(x, TokenInfo(mask=torch.arange(5) < 2))
    assert int(moe.last_routing.num_tokens_per_expert.sum()) == 4


def test_a_masked_token_still_gets_the_shared_experts():
    moe = moe_of(shared="gated")
    x = torch.randn(4, D, dtype=torch.float64)
    y = moe(x, TokenInfo(mask=torch.zeros(4, dtype=torch.bool)))
    assert_near(y, plain_moe(moe, x, [[]] * 4), 1e-12)


@quick
@given(t=st.integers(1, 20), k=st.integers(1, E), seed=st.integers(0, 999))
def test_permuting_tokens_permutes_outputs(t, k, seed):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, D, generator=stream)
    mask = torch.rand(t, generator=stream) > 0.2
    order = torch.randperm(t, generator=stream)
    for router, dtype, limit in itertools.product(
        ("token", "expert"), (torch.float32, torch.float64), (1e-5,)
    ):
        moe = moe_of(k=k, router=router, dtype=dtype)
        y = moe(x.to(dtype), TokenInfo(mask=mask))
        counts = moe.last_routing.num_tokens_per_expert
        y_permuted = moe(x.to(dtype)[order], TokenInfo(mask=mask[order]))
        assert torch.equal(moe.last_routing.num_tokens_per_expert, counts)
        assert_near(y_permuted, y[order], limit if dtype == torch.float32 else 1e-12)


@quick
@given(t=st.integers(1, 20), k=st.integers(2, E), seed=st.integers(0, 999))
def test_identical_experts_are_one_dense_ffn(t, k, seed):
    stream = torch.Generator().manual_seed(seed)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        moe = moe_of(k=k, bias=True, dtype=dtype)  # normalised weights sum to 1
        with torch.no_grad():
            for parameter in moe.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
        x = torch.randn(t, D, generator=stream).to(dtype)
        wanted = torch.stack([one_expert(moe.experts, 0, row) for row in x])
        assert_near(moe(x), wanted, limit)


@quick
@given(t=st.integers(2, 20), cut=st.integers(1, 19), seed=st.integers(0, 999))
def test_token_choice_sees_no_later_token(t, cut, seed):
    cut = min(cut, t - 1)
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(t, D, generator=stream)
    moe = moe_of(shared="gated", bias=True, dtype=torch.float32)
    before = moe(x)[:cut]
    x[cut:] = torch.randn(t - cut, D, generator=stream)
    assert_near(moe(x)[:cut], before, 1e-6)


@pytest.mark.parametrize("score_position", POSITIONS)
def test_experts_without_tokens_get_zero_gradients(score_position):
    moe = moe_of(score_position, bias=True, k=1)
    with torch.no_grad():
        moe.router.expert_bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    moe(torch.randn(8, D, dtype=torch.float64)).square().sum().backward()
    assert moe.last_routing.num_tokens_per_expert.tolist() == [8, 0, 0, 0]
    for name, parameter in moe.experts.named_parameters():
        assert not parameter.grad[1:].any(), name
        assert parameter.grad[0].any(), name


def test_all_tokens_masked_and_no_tokens_at_all():
    for tokens, mask in ((5, torch.zeros(5, dtype=torch.bool)), (0, None)):
        moe = moe_of(bias=True, dtype=torch.float32)
        y = moe(torch.randn(tokens, D), TokenInfo(mask=mask))
        assert torch.equal(y, torch.zeros(tokens, D))
        y.sum().backward()
        for name, parameter in moe.named_parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
