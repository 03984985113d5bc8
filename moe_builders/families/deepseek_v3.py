"""DeepSeek-V3, R1 and V3.1, Moonlight, Kimi-K2: facts, builders, config reader, weight rows.

Source: transformers ``models/deepseek_v3`` (5.23); field names of config.json in brackets below.
Sigmoid per expert plus a selection-only bias, top-k of the groups whose two best experts score
highest, weights renormalised [norm_topk_prob] and scaled [routed_scaling_factor]; SwiGLU experts
without biases beside ungated shared experts, the first layers dense [first_k_dense_replace];
multi-head latent attention, queries of a latent of their own or not [q_lora_rank], rotary layout
interleaved [rope_interleave]; YaRN's mscale² is in the scale of the scores; all norms pre-norm.
Layers that predict further tokens stand after the last one on disk [num_nextn_predict_layers] and
pass through to an export.

Kimi-K2's config.json says kimi_k2, which transformers does not know: the same model otherwise.
"""

from collections.abc import Mapping
from typing import Any

from moe_builders import hf_rows
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder
from moe_builders.family import Family
from moe_builders.latent_decoder import latent_moe_decoder
from moe_builders.weights import PassThrough

MODEL_TYPE = "deepseek_v3"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.LATENT_ATTENTION,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
    *hf_rows.SHARED_EXPERTS,
    *hf_rows.DENSE_MLP,
    *hf_rows.FURTHER_LAYERS,
    PassThrough("model.layers.{l}.self_attn.rotary_emb.inv_freq"),  # of older programs
)


def deepseek_v3_671b() -> MoEDecoder:
    """DeepSeek-V3, R1, V3.1: 671,026,404,352 parameters, 37.55 B active. Source: its config.json.

    Without the 14 B of the layer that predicts the token after the next.
    """
    return latent_moe_decoder(
        vocab_size=129280,
        embed_dim=7168,
        num_layers=61,
        num_heads=128,
        q_lora_rank=1536,
        **_LATENT,
        num_experts=256,
        experts_per_token=8,
        expert_hidden_dim=2048,
        shared_hidden_dim=2048,
        intermediate_dim=18432,
        max_seq_len=163840,
        dense_layers=range(3),
        num_groups=8,
        groups_per_token=4,
        route_scale=2.5,
        rope_scaling={**_YARN, "factor": 40, "beta_fast": 32},
    )


def moonlight_16b_a3b() -> MoEDecoder:
    """Moonlight-16B-A3B: 15,960,108,544 parameters, 2.91 B active. Source: its config.json."""
    return latent_moe_decoder(
        vocab_size=163840,
        embed_dim=2048,
        num_layers=27,
        num_heads=16,
        q_lora_rank=None,
        **_LATENT,
        num_experts=64,
        experts_per_token=6,
        expert_hidden_dim=1408,
        shared_hidden_dim=2816,
        intermediate_dim=11264,
        max_seq_len=8192,
        route_scale=2.446,
        rope_base=50_000.0,
        norm_eps=1e-5,
    )


def kimi_k2() -> MoEDecoder:
    """Kimi-K2-Instruct: 1,026,408,209,408 parameters, 32.86 B active. Source: its config.json."""
    return latent_moe_decoder(
        vocab_size=163840,
        embed_dim=7168,
        num_layers=61,
        num_heads=64,
        q_lora_rank=1536,
        **_LATENT,
        num_experts=384,
        experts_per_token=8,
        expert_hidden_dim=2048,
        shared_hidden_dim=2048,
        intermediate_dim=18432,
        max_seq_len=131072,
        route_scale=2.827,
        rope_base=50_000.0,
        rope_scaling={**_YARN, "factor": 32, "beta_fast": 1},
    )


_LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_YARN: Mapping[str, Any] = {
    "rope_type": "yarn", "original_max_position_embeddings": 4096, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``latent_moe_decoder``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, config.get("model_type", MODEL_TYPE))
    heads, expert_dim = read.whole("num_attention_heads"), read.whole("moe_intermediate_size")
    plain, turned = read.whole("qk_nope_head_dim"), read.whole("qk_rope_head_dim")
    normalised = read.flag("norm_topk_prob", default=True)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": read.whole("num_hidden_layers"),
        "num_heads": heads,
        "q_lora_rank": read.whole("q_lora_rank", default=1536, null=None),
        "kv_lora_rank": read.whole("kv_lora_rank"),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": turned,
        "v_head_dim": read.whole("v_head_dim"),
        "num_experts": read.whole("n_routed_experts", "num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=normalised),
        "expert_hidden_dim": expert_dim,
        "shared_hidden_dim": expert_dim * read.whole("n_shared_experts"),
        "intermediate_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "dense_layers": range(read.whole("first_k_dense_replace", default=3, least=0)),
        "num_groups": read.whole("n_group", default=8),
        "groups_per_token": read.whole("topk_group", default=4),
        "normalize_weights": normalised,
        "route_scale": read.number("routed_scaling_factor", default=2.5),
        **read.rope(),
        "rope_interleaved": read.flag("rope_interleave", default=True),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "attention_bias": read.flag("attention_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.not_null(
        "n_group", "topk_group", "norm_topk_prob", "first_k_dense_replace", "rope_interleave"
    )
    read.only("topk_method", "noaux_tc")
    read.only("num_key_value_heads", heads, None)
    read.only("head_dim", turned, None)
    read.only("qk_head_dim", plain + turned)
    read.only("scoring_func", "sigmoid")
    read.only("moe_layer_freq", 1)
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.ignore("aux_loss_alpha", "seq_aux", "ep_size")  # of a loss and of other programs
    read.ignore("num_nextn_predict_layers", "num_mtp_layers")  # their tensors pass through
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, latent_moe_decoder)
KIMI_K2 = Family("kimi_k2", WEIGHT_MAP, builder_arguments, latent_moe_decoder)
