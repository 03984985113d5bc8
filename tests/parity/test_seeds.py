"""The long grid of parity: every variant with eight seeds of weights (`make test-full`)."""

from types import SimpleNamespace

import pytest
import torch
from helpers_parity import B, S, compare, load_reference, write_folder

from moe_builders.hub import load_hf_model

pytestmark = pytest.mark.full


@pytest.mark.check("logits")
@pytest.mark.parametrize("seed", range(1, 9))
def test_variant_and_seed(case, variant, seed, tmp_path):
    folder = write_folder(case, tmp_path, seed=seed, **case.variants[variant])
    ours, source = load_hf_model(folder)
    pair = SimpleNamespace(hf=load_reference(case, folder), ours=ours, source=source)
    compare(pair, torch.ones(B, S, dtype=torch.bool), {}, {})


@pytest.mark.needs("wide")
def test_a_wider_model(case, tmp_path):
    """d = 256, 6 layers: fp32 noise grows with size, within 1e-4 on logits of about 5."""
    folder = write_folder(case, tmp_path, seed=1, **case.wide)
    hf, ours = load_reference(case, folder), load_hf_model(folder)[0]
    tokens = torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), hf(tokens).logits, rtol=0, atol=1e-4)
