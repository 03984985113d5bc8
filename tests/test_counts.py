"""Counts against loops over tokens: what was asked for, what was kept, by document or together."""

from dataclasses import replace

import pytest
import torch
from helpers import quick, randomise
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.counts import count_assignments, count_first_choices, count_kept, count_rows
from moe_builders.errors import InputError
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo, route_by_choice


def choice(t=20, e=5, k=3, *, seed=0, drops=True, masked=True):
    """Random distinct choices, some of them dropped, some tokens masked, four documents."""
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, e, generator=stream, dtype=torch.float64)
    expert = logits.topk(k).indices
    kept = torch.rand(t, k, generator=stream) < 0.7 if drops else None
    mask = torch.rand(t, generator=stream) < 0.8 if masked else None
    ids = torch.randint(0, 4, (t,), generator=stream)
    return route_by_choice(
        expert=expert, weights=logits.gather(1, expert).exp(), logits=logits,
        probs=logits.softmax(-1), info=TokenInfo(mask=mask, sequence_ids=ids), kept=kept,
    )  # fmt: skip


def loop(routing, *, on="assigned", first=False):
    """[4, e] by document, from python loops."""
    t, k = routing.selected.shape
    table = torch.zeros(t, routing.probs.shape[1], dtype=torch.int64)
    for token in range(t):
        if routing.info.mask is not None and not routing.info.mask[token]:
            continue
        for rank in range(1 if first else k):
            if on == "kept" and routing.kept is not None and not routing.kept[token, rank]:
                continue
            table[routing.info.sequence_ids[token], routing.selected[token, rank]] += 1
    return table


@quick
@given(seed=st.integers(0, 10_000), drops=st.booleans(), masked=st.booleans())
def test_every_count_is_a_loop(seed, drops, masked):
    routing = choice(seed=seed, drops=drops, masked=masked)
    ids = routing.info.sequence_ids
    for on in ("assigned", "kept"):
        for choices in ("all", "first"):
            wanted = loop(routing, on=on, first=choices == "first")
            assert torch.equal(count_rows(routing, ids, on=on, choices=choices), wanted)
            got = count_rows(routing, None, on=on, choices=choices)
            assert torch.equal(got, wanted.sum(0, keepdim=True))
            assert got.dtype == torch.int64
        assert torch.equal(
            count_first_choices(routing, on=on), loop(routing, on=on, first=True).sum(0)
        )
    assert torch.equal(count_assignments(routing), loop(routing).sum(0))
    kept = count_kept(routing)
    assert torch.equal(kept, loop(routing, on="kept").sum(0))
    assert torch.equal(kept, routing.num_tokens_per_expert.long()), "what the experts were given"


def test_nothing_dropped_is_all_kept():
    routing = choice(drops=False)
    assert torch.equal(count_assignments(routing), count_kept(routing))
    dropped = choice()
    assert count_kept(dropped).sum() < count_assignments(dropped).sum()


def test_where_experts_pick_the_list_says_it():
    router = randomise(ExpertChoiceTopKRouter(dim=6, num_experts=4, capacity_factor=1.5))
    mask = torch.arange(16) % 4 != 1
    routing = router(torch.randn(16, 6), TokenInfo(mask=mask))
    assert routing.selected is None
    assert torch.equal(count_assignments(routing), routing.num_tokens_per_expert.long())
    assert torch.equal(count_kept(routing), count_assignments(routing))
    narrow = replace(routing, info=TokenInfo(mask=mask & (torch.arange(16) < 8)))
    assert count_assignments(narrow).sum() < count_assignments(routing).sum()
    with pytest.raises(InputError, match="no first choices to count, because this router's tokens"):
        count_first_choices(routing)


def test_counts_are_of_the_grouped_selection():
    """Counting a plain top-k would be another map: 2 of 4 groups are out of a token's reach."""
    router = TokenChoiceTopKRouter(
        dim=8, num_experts=8, experts_per_token=2, score_function="sigmoid",
        num_groups=4, groups_per_token=1, group_score_topk=2,
    )  # fmt: skip
    randomise(router)
    routing = router(torch.randn(256, 8, generator=torch.Generator().manual_seed(0)), TokenInfo())
    plain = routing.logits.topk(2).indices
    same = (routing.selected.sort(-1).values == plain.sort(-1).values).all(-1)
    assert same.sum() < 200, "or this proves nothing"
    assert torch.equal(count_assignments(routing), routing.num_tokens_per_expert.long())
    assert not torch.equal(count_assignments(routing), plain.flatten().bincount(minlength=8))
    assert (routing.selected[:, 0] // 2 == routing.selected[:, 1] // 2).all(), "one group each"
