"""OLMoE's and FlexOlmo's own: heads that the norms fit, names of fields, rotary steps in fp32."""

from typing import Any

import pytest
import torch
from transformers import FlexOlmoConfig
from transformers.models.flex_olmo.modeling_flex_olmo import (
    FlexOlmoRotaryEmbedding,
    apply_rotary_pos_emb,
)

from moe_builders.errors import InputError
from moe_builders.families import flex_olmo, olmoe

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
    "max_position_embeddings": 4096, "rope_theta": 1e4,
}  # fmt: skip
BOTH = pytest.mark.parametrize("family", [olmoe, flex_olmo])


@BOTH
def test_key_value_heads_default_to_all(family):
    for kv in ({}, {"num_key_value_heads": None}):
        assert family.builder_arguments(SMALL | kv)["num_kv_heads"] == 4


@BOTH
def test_both_names_of_the_number_of_experts(family):
    other = {k: v for k, v in SMALL.items() if k != "num_experts"} | {"num_local_experts": 4}
    assert family.builder_arguments(other) == family.builder_arguments(SMALL)


def test_olmoe_refuses_what_transformers_would_compute_otherwise():
    """Its norms are hidden_size wide whatever head_dim says; flash attention alone has windows."""
    fitting = {"head_dim": 8, "sliding_window": None}
    assert olmoe.builder_arguments(SMALL | fitting) == olmoe.builder_arguments(SMALL)
    for wrong, said in (({"head_dim": 16}, "head_dim=16"), ({"sliding_window": 4}, "_window=4")):
        with pytest.raises(InputError, match=said):
            olmoe.builder_arguments(SMALL | wrong)


def test_rotary_step_of_flex_olmo_is_fp32_in_bf16_models():
    config = SMALL | {"head_dim": 8}
    rope = flex_olmo.FAMILY.build(config).to(torch.bfloat16).layers[0].attn.rope
    reference = FlexOlmoRotaryEmbedding(FlexOlmoConfig(**config))
    x = torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    positions = torch.arange(3000, 3040)[None]
    cos, sin = reference(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(rope(x, positions), expected)
    rounded, _ = apply_rotary_pos_emb(x, x, cos.to(x.dtype), sin.to(x.dtype))
    assert not torch.equal(rounded, expected)
