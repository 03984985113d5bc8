"""Models made from a config.json: new ones of random numbers, and the released sizes."""

import json
from pathlib import Path

import pytest
import torch
from hf_helpers import assert_equal_tensors, load_hf, read_tensors
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_builders.checkpoint.folder import TensorFolder
from moe_builders.checkpoint.stream import model_shapes
from moe_builders.decoder import MoEDecoder
from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.families import BY_MODEL_TYPE, qwen3_moe
from moe_builders.hub import create_hf_model, load_hf_model
from moe_builders.routers import TokenChoiceTopKRouter

CONFIGS = Path(__file__).parent / "assets" / "configs"  # values: the releases' config.json


def released_config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def small_config() -> dict:
    """A release's config.json, hub spelling, with small numbers."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    return released_config("Qwen3-30B-A3B") | sizes


def test_the_seed_alone_decides_a_new_model(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        create_hf_model(tmp_path / name, small_config(), seed=seed)
    assert_equal_tensors(tmp_path / "a", tmp_path / "b")
    first, other = (read_tensors([tmp_path / n / "model.safetensors"]) for n in "ac")
    assert {tensor.dtype for _, tensor in first.values()} == {torch.float32}
    same = {name for name in first if torch.equal(first[name][1], other[name][1])}
    assert same == {name for name in first if "norm" in name}
    sums = {tensor.sum().item() for name, (_, tensor) in first.items() if name not in same}
    assert len(sums) == len(first) - len(same)  # no two tensors share their numbers


def test_shards_hold_the_same_model(tmp_path):
    create_hf_model(tmp_path / "single", small_config(), seed=5)
    create_hf_model(tmp_path / "shards", small_config(), seed=5, max_shard_bytes=30_000)
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 30_000 + 10_000  # and a header
    single = read_tensors([tmp_path / "single" / "model.safetensors"])
    shards = read_tensors(files)
    assert shards.keys() == single.keys()
    assert all(torch.equal(shards[name][1], single[name][1]) for name in single)


def test_a_new_model_replaces_an_older_one_and_nothing_else(tmp_path):
    (tmp_path / "tokenizer.json").write_text("kept")
    for shard_bytes in (30_000, 10**9, 60_000):
        create_hf_model(tmp_path, small_config(), seed=5, max_shard_bytes=shard_bytes)
        assert TensorFolder(tmp_path).has_index == (shard_bytes < 10**9)
        load_hf(tmp_path)  # checks that no key is missing or surplus
    assert (tmp_path / "tokenizer.json").read_text() == "kept"


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_transformers_loads_a_new_model(tmp_path, shard_bytes):
    create_hf_model(tmp_path, small_config(), seed=1, max_shard_bytes=shard_bytes)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = load_hf(tmp_path)(input_ids=tokens).logits
        found = load_hf_model(tmp_path)[0](tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_new_model_does_not_go_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        create_hf_model(tmp_path / "file" / "model", small_config(), seed=1)


def facts(model: MoEDecoder) -> dict:
    """What the shapes do not say."""
    layer = model.layers[0]
    router = layer.mlp.router
    assert isinstance(router, TokenChoiceTopKRouter)
    return {
        "rope": (layer.attn.rope.base, layer.attn.rope.head_dim),
        "heads": (layer.attn.num_heads, layer.attn.num_kv_heads, layer.attn.head_dim),
        "max_seq_len": model.max_seq_len,
        "router": (router.experts_per_token, router.score_function, router.normalize_weights),
        "eps": {m.eps for m in model.modules() if isinstance(m, torch.nn.RMSNorm)},
    }


@pytest.mark.parametrize(
    ("name", "builder", "total", "active"),
    [
        ("Qwen3-30B-A3B", qwen3_moe.qwen3_moe_30b_a3b, 30_532_122_624, "3.35"),
        ("Qwen3-235B-A22B", qwen3_moe.qwen3_moe_235b_a22b, 235_093_634_560, "22.19"),
    ],
)
def test_released_sizes(name, builder, total, active):
    config = released_config(name)
    with torch.device("meta"):
        sized, read = builder(), BY_MODEL_TYPE[config["model_type"]].build(config)
    assert model_shapes(read) == model_shapes(sized)
    assert facts(read) == facts(sized)
    assert facts(read) == {
        "rope": (1e6, 128),
        "heads": (config["num_attention_heads"], 4, 128),
        "max_seq_len": 40960,
        "router": (8, "softmax", True),
        "eps": {1e-6},
    }
    assert sum(p.numel() for p in sized.parameters()) == total
    routed = sum(
        p.numel()
        for module in sized.modules()
        if isinstance(module, GroupedExperts)
        for p in module.parameters()
    )
    assert f"{(total - routed + routed * 8 // 128) / 1e9:.2f}" == active


def test_both_spellings_of_a_config_are_one_model():
    hub = released_config("Qwen3-30B-A3B")
    saved = {k: v for k, v in hub.items() if k not in ("rope_theta", "rope_scaling", "num_experts")}
    saved["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    saved["num_local_experts"] = 128
    saved["dtype"] = saved.pop("torch_dtype")
    assert qwen3_moe.builder_arguments(saved) == qwen3_moe.builder_arguments(hub)


def test_defaults_of_a_config_are_those_of_transformers():
    """Fields that a config.json may lack: Qwen3MoeConfig's default, not the releases' value."""
    optional = (
        "attention_bias", "decoder_sparse_step", "head_dim", "mlp_only_layers", "norm_topk_prob",
        "rms_norm_eps", "tie_word_embeddings", "intermediate_size",
    )  # fmt: skip
    config = {k: v for k, v in small_config().items() if k not in optional}
    found, default = qwen3_moe.builder_arguments(config), Qwen3MoeConfig(**config)
    assert found["head_dim"] == default.hidden_size // default.num_attention_heads
    assert found["normalize_weights"] is default.norm_topk_prob
    assert found["attention_bias"] is default.attention_bias
    assert found["tie_word_embeddings"] is default.tie_word_embeddings
    assert found["norm_eps"] == default.rms_norm_eps
    assert list(found["dense_layers"]) == default.mlp_only_layers


@pytest.mark.parametrize(
    ("step", "only"), [(1, []), (2, []), (3, []), (1, [0, 1]), (2, [1, 4]), (9, [])]
)
def test_dense_layers_are_those_of_transformers(step, only):
    fields = {"num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": only}
    config = small_config() | fields
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    dense = tuple(n for n, kind in enumerate(kinds) if kind == "Qwen3MoeMLP")
    assert qwen3_moe.builder_arguments(config)["dense_layers"] == dense


def test_extra_keys_of_the_coder_releases_are_known():
    extra = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert qwen3_moe.builder_arguments(small_config() | extra) == qwen3_moe.builder_arguments(
        small_config()
    )
