"""The long grid of parity: every variant with eight seeds of weights (`make test-full`)."""

from types import SimpleNamespace

import pytest
import torch
from hf_helpers import load_hf, write_hf_folder
from test_qwen3_moe import VARIANTS, B, S, assert_same

from moe_builders.hub import load_hf_model


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 9))
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_and_seed(variant, seed, tmp_path):
    folder = write_hf_folder(tmp_path, seed=seed, **VARIANTS[variant])
    pair = SimpleNamespace(hf=load_hf(folder), ours=load_hf_model(folder)[0])
    assert_same(pair, torch.ones(B, S, dtype=torch.bool), {}, {})


@pytest.mark.full
def test_a_wider_model(tmp_path):
    """d = 256, 6 layers: fp32 noise grows with size, within 1e-4 on logits of about 5."""
    fields = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 128}  # fmt: skip
    folder = write_hf_folder(tmp_path, seed=1, **fields)
    hf, ours = load_hf(folder), load_hf_model(folder)[0]
    tokens = torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), hf(tokens).logits, rtol=0, atol=1e-4)
