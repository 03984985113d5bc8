"""Which layers of ERNIE 4.5 have experts, and what its config.json may say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeDecoderLayer,
    Ernie4_5_MoeRotaryEmbedding,
    Ernie4_5_MoeSparseMoeBlock,
    apply_rotary_pos_emb,
)

from moe_builders.errors import InputError
from moe_builders.families.ernie4_5_moe import builder_arguments, ernie4_5_moe

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"


def released(**changes):
    config = json.loads((CONFIGS / "ERNIE-4.5-21B-A3B-PT.json").read_text())
    return config | changes


@pytest.mark.parametrize(
    ("first", "last", "step"),
    [(1, 27, 1), (1, -1, 1), (0, -1, 1), (0, 5, 2), (3, 6, 3), (2, 99, 1), (5, 2, 1), (0, 0, 1)],
)
def test_layers_with_experts_are_transformers(first, last, step):
    fields = {
        "num_hidden_layers": 8, "hidden_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 8, "moe_intermediate_size": 8,
        "moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": step,
    }  # fmt: skip
    config = Ernie4_5_MoeConfig(**fields)
    layers = [Ernie4_5_MoeDecoderLayer(config, n).mlp for n in range(8)]
    expected = [n for n, m in enumerate(layers) if not isinstance(m, Ernie4_5_MoeSparseMoeBlock)]
    assert list(builder_arguments(released(**fields))["dense_layers"]) == expected


def test_bf16_heads_are_turned_in_fp32():
    config = Ernie4_5_MoeConfig()
    with torch.device("meta"):
        rope = ernie4_5_moe(**builder_arguments(released(num_hidden_layers=1))).layers[0].attn.rope
    rope.to_empty(device="cpu").rope_init()
    x = torch.randn(1, 2, 30, 128, dtype=torch.bfloat16)
    positions = torch.arange(5000, 5030)[None]
    cos, sin = Ernie4_5_MoeRotaryEmbedding(config)(x, positions)
    assert torch.equal(rope(x, positions), apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_fields_of_the_releases_own_trainer():
    extra = {
        "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True,
        "num_nextn_predict_layers": 1, "hidden_dropout_prob": 0.0, "use_rmsnorm": True,
        "moe_gate_act": None,
    }  # fmt: skip
    assert builder_arguments(released(**extra)) == builder_arguments(released())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_layer_end_index": -2}, "moe_layer_end_index=-2 (a whole number of at least -1)"),
        ({"moe_layer_interval": 0}, "moe_layer_interval=0"),
        ({"moe_k": 1}, "moe_k=1 with normalised weights"),
        ({"use_bias": True}, "use_bias=True (only False where tie_word_embeddings is true)"),
        ({"moe_use_aux_free": False}, "moe_use_aux_free=False (only True)"),
        ({"moe_gate": "top2_fused"}, "moe_gate='top2_fused' (only 'topk')"),
        ({"moe_num_experts": [64, 64]}, "moe_num_experts=[64, 64]"),
        ({"use_rmsnorm": False}, "use_rmsnorm=False (only True)"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob=0.1 (only 0)"),
    ],
)
def test_what_is_not_honoured_is_refused(changes, words):
    with pytest.raises(InputError) as raised:
        builder_arguments(released(**changes))
    assert words in str(raised.value)


def test_dense_layers_need_a_width():
    arguments = builder_arguments(released()) | {"intermediate_dim": None}
    with pytest.raises(InputError, match=r"layers \[0\] are dense, but intermediate_dim"):
        ernie4_5_moe(**arguments)
