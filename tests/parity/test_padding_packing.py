"""Padding on either side, packed documents, positions with gaps: still transformers' numbers."""

import pytest
import torch
from helpers_parity import B, S, compare, draw_tokens, gradient_error

from moe_builders.moe import collect_routing
from moe_builders.ops.masks import block_causal_mask
from moe_builders.routing import TokenInfo

LENGTHS = torch.tensor([20, 13, 7])


@pytest.mark.check("padding")
def test_right_padding(case, variant, models):
    pair = models.pair(case, variant)
    real = torch.arange(S) < LENGTHS[:, None]  # [b, s]
    info = TokenInfo(mask=real.flatten())
    compare(pair, real, {"attention_mask": real.long()}, {"info": info})
    layers = collect_routing(pair.ours)
    assert layers
    for name, routing in layers.items():  # padding goes nowhere
        k = pair.ours.get_submodule(name).router.experts_per_token
        assert routing.num_tokens_per_expert.sum() == k * real.sum()


@pytest.mark.check("padding")
@pytest.mark.check("left_padding")
def test_left_padding(case, variant, models):
    real = torch.arange(S) >= S - LENGTHS[:, None]  # [b, s]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    compare(
        models.pair(case, variant),
        real,
        {"attention_mask": real.long(), "position_ids": positions},
        {
            "mask": block_causal_mask(real.long()),  # [b, s, s], padding is a document of its own
            "input_pos": positions,
            "info": TokenInfo(mask=real.flatten()),
        },
    )


@pytest.mark.check("gaps")
def test_positions_with_gaps(case, variant, models):
    """Rotation is relative: only uneven steps show whether positions are used at all."""
    steps = torch.randint(1, 4, (B, S), generator=torch.Generator().manual_seed(3))
    positions = steps.cumsum(1)  # [b, s]
    real = torch.ones(B, S, dtype=torch.bool)
    inputs = {"position_ids": positions}
    compare(models.pair(case, variant), real, inputs, {"input_pos": positions})


@pytest.mark.check("packing")
def test_packed_documents_are_documents_one_by_one(case, variant, models):
    pair = models.pair(case, variant)
    lengths = (9, 4, 1, 14)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))  # [s]
    positions = torch.cat([torch.arange(n) for n in lengths])
    inputs = {
        "mask": block_causal_mask(ids[None]),
        "input_pos": positions[None],
        "info": TokenInfo(sequence_ids=ids),
    }
    row = draw_tokens(pair.ours, torch.ones(1, sum(lengths), dtype=torch.bool), **inputs)
    inputs["info"] = TokenInfo(sequence_ids=ids, input_ids=row[0])
    packed = pair.ours(row, **inputs)
    packed.square().mean().backward()
    for document in torch.arange(sum(lengths)).split(lengths):
        alone = pair.hf(input_ids=row[:, document]).logits
        torch.testing.assert_close(packed[:, document], alone, rtol=0, atol=1e-5)
        (alone.square().sum() / packed.numel()).backward()
    gradient_error(pair)
