"""Every family has a case, and the cases say what exists."""

import pytest
import torch
from helpers_parity import CHECKS, INERT, all_cases, gradient_error, loss_of
from support_table import family_file

from moe_builders.families import BY_MODEL_TYPE


def test_every_family_has_a_case():
    """Names of one file share a case."""
    proven = {family_file(name) for name in all_cases()}
    assert not [name for name in BY_MODEL_TYPE if family_file(name) not in proven]


def test_case_says_what_exists(case):
    assert case.written_config(case.first)["model_type"] == case.model_type
    assert len(case.variants) >= 3
    assert len(case.mutations) >= 3
    assert case.skips.keys() <= set(CHECKS)
    for reasons in case.skips.values():
        assert reasons.keys() <= {"*", *case.variants}
    for mutation in case.mutations.values():
        assert not isinstance(mutation, tuple) or mutation[0] in case.variants
    assert not case.inert.keys() & INERT


@pytest.mark.parametrize("damage", ["value", "nothing", "another"])
def test_a_wrong_gradient_would_be_seen(damage, models):
    case = all_cases()["qwen3_moe"]
    pair = models.pair(case, case.first)
    tokens = torch.arange(40).view(2, 20)
    real = torch.ones(2, 20, dtype=torch.bool)
    for logits in (pair.ours(tokens), pair.hf(input_ids=tokens).logits):
        loss_of(logits, tokens, real).backward()
    assert gradient_error(pair) <= 1e-5
    gradient = pair.ours.layers[1].mlp.experts.down_proj.grad
    if damage == "value":
        gradient.view(-1)[gradient.argmax()] *= 1.0001
    elif damage == "nothing":
        gradient[2] = float("nan")
    else:
        gradient.copy_(gradient.flip(0))
    with pytest.raises(AssertionError):
        gradient_error(pair)
