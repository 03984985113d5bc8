"""The same numbers as transformers from the same folder, forward and backward."""

import pytest
import torch
from helpers_parity import B, S, compare, draw_tokens


@pytest.mark.check("logits")
def test_logits(case, variant, models, record_property):
    pair = models.pair(case, variant)
    tokens = draw_tokens(pair.ours, torch.ones(B, S, dtype=torch.bool))
    with torch.no_grad():
        ours, theirs = pair.ours(tokens), pair.hf(input_ids=tokens).logits
    record_property("error", (ours - theirs).abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.check("gradients")
def test_gradients(case, variant, models, record_property):
    error = compare(models.pair(case, variant), torch.ones(B, S, dtype=torch.bool), {}, {})
    record_property("error", error)
