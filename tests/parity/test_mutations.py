"""A comparison that sees nothing proves nothing: each of these mistakes moves the logits."""

import torch
from helpers_parity import B, S

from moe_builders.hub import load_hf_model


def test_a_mistake_would_be_seen(case, mutation, models):
    mutate = case.mutations[mutation]
    variant, mutate = mutate if isinstance(mutate, tuple) else (case.first, mutate)
    model, _ = load_hf_model(models.folder(case, variant))
    tokens = torch.arange(B * S).view(B, S)
    with torch.no_grad():
        before = model(tokens)
        mutate(model)
        after = model(tokens)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-2
