"""GLM-4.7-Flash (glm4_moe_lite): facts, builders, config reader, weight rows.

Source: transformers ``models/glm4_moe_lite`` (5.23); field names of config.json in brackets below.
Sigmoid per expert plus a selection-only bias, top-k of the groups whose two best experts score
highest (the release has one group), weights renormalised [norm_topk_prob] and scaled
[routed_scaling_factor]; SwiGLU experts without biases beside ungated shared experts, any layer may
be dense instead [mlp_layer_types]; multi-head latent attention, rotary layout interleaved
[rope_interleave]; all norms pre-norm. Layers that predict further tokens stand after the last one
on disk [num_nextn_predict_layers] and pass through to an export.
"""

from collections.abc import Mapping
from typing import Any

from moe_builders import hf_rows
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder
from moe_builders.family import Family
from moe_builders.latent_decoder import latent_moe_decoder

MODEL_TYPE = "glm4_moe_lite"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.LATENT_ATTENTION,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
    *hf_rows.SHARED_EXPERTS,
    *hf_rows.DENSE_MLP,
    *hf_rows.FURTHER_LAYERS,
)


def glm4_7_flash() -> MoEDecoder:
    """GLM-4.7-Flash: 29,943,390,976 parameters, 3.90 B active.

    Source: transformers' ``Glm4MoeLiteConfig``; rope_theta: THUDM/slime glm4.7-30B-A3B.
    """
    return latent_moe_decoder(
        vocab_size=154880,
        embed_dim=2048,
        num_layers=47,
        num_heads=20,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        num_experts=64,
        experts_per_token=4,
        expert_hidden_dim=1536,
        shared_hidden_dim=1536,
        intermediate_dim=10240,
        max_seq_len=202752,
        route_scale=1.8,
        rope_base=1_000_000.0,
        norm_eps=1e-5,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``latent_moe_decoder``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    heads, expert_dim = read.whole("num_attention_heads"), read.whole("moe_intermediate_size")
    plain, turned = read.whole("qk_nope_head_dim"), read.whole("qk_rope_head_dim")
    layers, normalised = read.whole("num_hidden_layers"), read.flag("norm_topk_prob", default=True)
    kinds = read.words(
        "mlp_layer_types",
        num_layers=layers,
        allowed=("dense", "sparse"),
        default=("dense", *["sparse"] * (layers - 1)),
    )
    dense_layers = tuple(n for n, kind in enumerate(kinds) if kind == "dense")
    first = read.whole("first_k_dense_replace", default=None, least=0)
    if first is not None and dense_layers != tuple(range(min(first, layers))):
        # the release has both; transformers reads mlp_layer_types alone
        read.refuse("first_k_dense_replace", f"mlp_layer_types has {len(dense_layers)} dense")
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "q_lora_rank": read.whole("q_lora_rank", default=768, null=None),
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
        "dense_layers": dense_layers,
        "num_groups": read.whole("n_group", default=1),
        "groups_per_token": read.whole("topk_group", default=1),
        "normalize_weights": normalised,
        "route_scale": read.number("routed_scaling_factor", default=1.8),
        **read.rope(),
        "rope_interleaved": read.flag("rope_interleave", default=True),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "attention_bias": read.flag("attention_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.not_null("n_group", "topk_group", "norm_topk_prob", "rope_interleave")
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
