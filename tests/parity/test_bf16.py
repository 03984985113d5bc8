"""In bf16 routes flip, so means are compared: no farther from fp32 than transformers is."""

import pytest
import torch

from moe_builders.hub import load_hf_model


@pytest.mark.check("bf16")
def test_bf16_is_as_near_to_fp32_as_transformers_is(case, variant, models, record_property):
    tokens = torch.randint(0, 128, (8, 40), generator=torch.Generator().manual_seed(2))
    ours, _ = load_hf_model(models.folder(case, variant), dtype=torch.bfloat16)
    narrow = {p.dtype for n, p in ours.named_parameters() if ".router." not in n}
    assert narrow == {torch.bfloat16}
    with torch.no_grad():
        exact = models.hf(case, variant)(input_ids=tokens).logits
        theirs = models.hf(case, variant, dtype=torch.bfloat16)(input_ids=tokens).logits.float()
        found = ours(tokens)
    assert found.dtype == torch.float32
    own_distance = (theirs - exact).abs().mean()
    assert own_distance > 1e-3
    record_property("error", ((found - theirs).abs().mean() / own_distance).item())
    assert 1e-3 < (found - exact).abs().mean() <= case.bf16_limit * own_distance
    assert (found - theirs).abs().mean() <= 2 * own_distance
