"""Qwen2-MoE's own: which layers have a window, which are dense, biases of q, k and v alone."""

from typing import Any

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_builders.errors import InputError
from moe_builders.families import qwen2_moe

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "intermediate_size": 40,
    "max_position_embeddings": 64, "rope_theta": 1e4,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
        {"use_sliding_window": False, "max_window_layers": 3, "sliding_window": 8},
        {"use_sliding_window": False, "sliding_window": None},
        {"use_sliding_window": False, "sliding_window": 0},
        {"use_sliding_window": True, "layer_types": [SLIDING, FULL, FULL] * 2},
        {"use_sliding_window": True, "layer_types": [FULL] * 6},
    ],
    ids=str,
)
def test_windows_are_those_of_transformers(fields):
    config = SMALL | {"sliding_window": 4096} | fields
    theirs = Qwen2MoeConfig(**config)
    expected = [
        theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types
    ]  # per layer
    with torch.device("meta"):
        ours = qwen2_moe.FAMILY.build(config)
    assert [layer.attn.window for layer in ours.layers] == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_types": [SLIDING] + [FULL] * 5}, "layer_types=.*need use_sliding_window"),
        ({"use_sliding_window": True, "layer_types": [SLIDING]}, "layer_types=.*6 of"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 6}, "layer_types="),
        ({"use_sliding_window": True, "sliding_window": None}, "lacks sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_named(fields, said):
    with pytest.raises(InputError, match=said):
        qwen2_moe.builder_arguments(SMALL | fields)


@pytest.mark.parametrize(
    "fields",
    [{"dense_layers": (1,), "intermediate_dim": None}, {"window_layers": (1,), "window": None}],
    ids=str,
)
def test_layers_that_lack_a_size_are_named(fields):
    arguments: dict[str, Any] = qwen2_moe.builder_arguments(SMALL) | fields
    with pytest.raises(InputError, match=r"layers \[1\]"):
        qwen2_moe.qwen2_moe(**arguments)


@pytest.mark.parametrize(("step", "only"), [(1, []), (2, []), (3, [0, 2]), (1, [5, 7]), (9, [])])
def test_dense_layers_and_biases_are_those_of_transformers(step, only):
    config = SMALL | {"decoder_sparse_step": step, "mlp_only_layers": only}
    with torch.device("meta"):
        theirs, ours = Qwen2MoeForCausalLM(Qwen2MoeConfig(**config)), qwen2_moe.FAMILY.build(config)
    for there, here in zip(theirs.model.layers, ours.layers, strict=True):
        assert hasattr(there.mlp, "experts") == hasattr(here.mlp, "experts")
        for name, ours_name in (("q_proj",) * 2, ("k_proj",) * 2, ("o_proj", "output_proj")):
            has_bias = getattr(there.self_attn, name).bias is not None
            assert has_bias == (getattr(here.attn, ours_name).bias is not None)
