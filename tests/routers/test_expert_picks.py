"""Experts that choose in each document by itself, against loops; and expert choice by bmm."""

import math

import pytest
import torch
from helpers import D, E, assert_near, gradients, moe_of, quick, randomise
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from moe_builders.routers import ExpertChoiceTopKRouter
from moe_builders.routers.expert_picks import pick_in_sequences
from moe_builders.routing import TokenInfo, check_routing, dense_weights


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 4, "scope": "sequence"} | changes
    return randomise(ExpertChoiceTopKRouter(**arguments)).double()


def picked_by_hand(probs, documents, mask, factor):
    """[t, e] bool in plain loops."""
    t, e = probs.shape
    taken = torch.zeros(t, e, dtype=torch.bool)
    for document in set(documents):
        real = [i for i in range(t) if documents[i] == document and mask[i]]
        capacity = math.ceil(factor * len(real) / e)
        for j in range(e):
            for i in sorted(real, key=lambda i: (-float(probs[i, j]), i))[:capacity]:
                taken[i, j] = True
    return taken


@quick
@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),  # shorter than e, longer, none at all
    factor=st.sampled_from([0.1, 0.3, 1.0, 1.1, 2.0, 4.0]),
    shuffled=st.booleans(),
    masked=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_each_document_by_itself(lengths, factor, shuffled, masked, seed):
    stream = torch.Generator().manual_seed(seed)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long())
    t = len(documents)
    if shuffled:
        documents = documents[torch.randperm(t, generator=stream)]
    mask = torch.rand(t, generator=stream) >= masked
    router = router_of(capacity_factor=factor)
    x = torch.randn(t, 6, generator=stream, dtype=torch.float64)
    x = torch.cat([x[: t // 2], x[: t - t // 2]])  # equal tokens: the earlier one is picked
    routing = router(x, TokenInfo(mask=mask, sequence_ids=documents))
    check_routing(routing)
    probs = (x @ router.gate.weight.t()).softmax(-1)
    wanted = picked_by_hand(routing.probs.detach(), documents.tolist(), mask.tolist(), factor)
    assert_near(dense_weights(routing), torch.where(wanted, probs, 0), 1e-12)
    assert torch.equal(routing.num_tokens_per_expert, wanted.sum(0).int())
    assert routing.token_index.shape == (4 * t,)
    assert routing.selected is None
    assert routing.kept is None


def test_documents_of_one_token_fill_the_whole_list():
    """The bound t·e is reached, whatever the capacity factor: none below it would do."""
    routing = router_of(capacity_factor=0.1)(
        torch.randn(9, 6, dtype=torch.float64), TokenInfo(sequence_ids=torch.arange(9))
    )
    check_routing(routing)
    assert routing.num_tokens_per_expert.tolist() == [9] * 4


def test_a_document_does_not_see_its_neighbours():
    router = router_of(capacity_factor=1.5)
    a, b = torch.randn(2, 7, 6, dtype=torch.float64)
    ids = torch.arange(2).repeat_interleave(7)
    together = dense_weights(router(torch.cat([a, b]), TokenInfo(sequence_ids=ids)))
    alone = torch.cat([dense_weights(router(x, TokenInfo())) for x in (a, b)])
    assert_near(together, alone, 1e-12)
    whole = router_of(capacity_factor=1.5, scope="batch")
    assert not torch.allclose(dense_weights(whole(torch.cat([a, b]), TokenInfo())), alone)


def test_one_document_is_the_batch():
    x = torch.randn(21, 6, dtype=torch.float64)
    info = TokenInfo(mask=torch.arange(21) % 5 != 1)
    found = [
        dense_weights(router_of(capacity_factor=1.3, scope=scope)(x, info))
        for scope in ("batch", "sequence")
    ]
    assert torch.equal(*found)


def test_at_most_so_many_experts_keep_a_token():
    router = router_of(capacity_factor=2.0, max_experts_per_token=2)
    x, info = torch.randn(30, 6, dtype=torch.float64), TokenInfo()
    routing = router(x, info)
    check_routing(routing)
    assert routing.token_index.shape == (60,)
    probs = routing.probs.detach()
    taken = pick_in_sequences(probs, info, 2.0)
    assert taken.sum(1).max() > 2, "otherwise the limit is not tried"
    for token, row in enumerate(dense_weights(routing)):
        takers = taken[token].nonzero().flatten().tolist()
        best = sorted(takers, key=lambda j: -float(probs[token, j]))[:2]
        assert row.nonzero().flatten().tolist() == sorted(best)
        assert torch.equal(row[best], probs[token, best])


def test_jitter_and_gate_precision_reach_the_gate():
    x = torch.randn(30, 6, dtype=torch.float64)
    quiet = dense_weights(router_of()(x, TokenInfo()))
    noisy = router_of(jitter="gumbel", jitter_scale=0.5, inference="bce")
    assert not torch.equal(dense_weights(noisy(x, TokenInfo())), quiet)
    assert_near(noisy(x, TokenInfo()).logits, router_of()(x, TokenInfo()).logits, 1e-12)
    assert torch.equal(*(dense_weights(noisy.eval()(x, TokenInfo())) for _ in range(2)))
    coarse = dense_weights(router_of(gate_precision="bf16")(x, TokenInfo()))
    assert not torch.equal(coarse, quiet)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_grouped_path_is_the_bmm_of_the_picks(dtype):
    """Every expert has exactly c tokens: [e, c, d] through one bmm a matrix is the whole layer."""
    moe = moe_of(router="expert", dtype=dtype)
    x = torch.randn(16, D, dtype=dtype)
    probe = torch.randn_like(x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = moe(ours)
    (got * probe).sum().backward()
    grads = gradients(moe)
    limit = 1e-12 if dtype == torch.float64 else 1e-5

    capacity = math.ceil(1.5 * 16 / E)
    probs = (theirs @ moe.router.gate.weight.t()).softmax(-1)  # [t, e]
    weights, token = probs.t().topk(capacity)  # [e, c]
    rows = theirs[token]  # [e, c, d]
    gate, up = torch.bmm(rows, moe.experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    answers = torch.bmm(F.silu(gate) * up, moe.experts.down_proj.transpose(1, 2))
    answers = answers * weights[:, :, None]
    wanted = torch.zeros_like(x).index_add(0, token.flatten(), answers.flatten(0, 1))
    assert moe.last_routing.num_tokens_per_expert.tolist() == [capacity] * E
    assert_near(got, wanted, limit)
    (wanted * probe).sum().backward()
    assert_near(ours.grad, theirs.grad, limit)
    for name, gradient in gradients(moe).items():
        assert_near(grads[name], gradient, limit, name)
