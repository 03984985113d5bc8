"""HunYuan-MoE v1 (A13B): facts, builders, config reader, weight rows.

Source: transformers ``models/hunyuan_v1_moe`` (5.23) and, for the fields of the release's own
config.json, Tencent-Hunyuan/Hunyuan-A13B ``models/``; field names of config.json in brackets below.
Softmax over all experts, top-k, weights always renormalised; SwiGLU experts without biases in every
layer, and a shared one of the same width; grouped-query attention with an RMSNorm per head on q and
k AFTER the rotary step; rotary layout half-rotated, its base stretched by a fixed alpha; all norms
pre-norm.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_builders import hf_rows
from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.errors import InputError
from moe_builders.family import Family
from moe_builders.moe import moe_layer

MODEL_TYPE = "hunyuan_v1_moe"
HUB_MODEL_TYPE = "hunyuan"  # of the release's own config.json

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.rename_layer(
        attn__q_norm__weight="self_attn.query_layernorm.weight",
        attn__k_norm__weight="self_attn.key_layernorm.weight",
        mlp__router__gate__weight="mlp.gate.wg.weight",
    ),
    *hf_rows.feed_forward("mlp.shared_experts", "mlp.shared_mlp"),
    *hf_rows.EXPERTS,
)


def hunyuan_v1_moe(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    num_experts: int,
    experts_per_token: int | Sequence[int],
    expert_hidden_dim: int,
    max_seq_len: int,
    head_dim: int | None = None,
    rope_base: float = 10_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-5,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A HunYuan-MoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        num_experts: [num_experts].
        experts_per_token: [moe_topk], for all layers or of each.
        expert_hidden_dim: [intermediate_size, moe_intermediate_size], of a routed expert and of
            the shared one.
        max_seq_len: [max_position_embeddings].
        head_dim: [head_dim, attention_head_dim]; None: embed_dim / num_heads.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        attention_bias: [attention_bias], of all four projections.
        attention_dropout: [attention_dropout], in training; the release's file says 0.1.
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: experts_per_token of another number of layers, or a number out of its range.
    """
    if isinstance(experts_per_token, int):
        experts_per_token = (experts_per_token,) * num_layers
    if len(experts_per_token) != num_layers:
        raise InputError(
            f"experts_per_token has {len(experts_per_token)} numbers, but must have one for each "
            f"of {num_layers} layers"
        )
    head_dim = head_dim or embed_dim // num_heads
    rope = RotaryEmbedding(
        head_dim=head_dim,
        base=rope_base,
        scaling=rope_scaling,
        max_seq_len=max_seq_len,
    )

    def attention(layer: int) -> nn.Module:
        return GroupedQueryAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            q_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            k_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            norm_after_rope=True,
            bias=attention_bias,
            dropout=attention_dropout,
        )

    def mlp(layer: int) -> nn.Module:
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token[layer],
            shared_hidden_dim=expert_hidden_dim,
        )

    return moe_decoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        max_seq_len=max_seq_len,
        attention=attention,
        mlp=mlp,
        norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
    )


def hunyuan_a13b() -> MoEDecoder:
    """Hunyuan-A13B: 80,393,183,232 parameters, 12.75 B active. Source: its config.json."""
    return hunyuan_v1_moe(
        vocab_size=128167,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        num_experts=64,
        experts_per_token=8,
        expert_hidden_dim=3072,
        max_seq_len=32768,
        head_dim=128,
        rope_scaling={
            "rope_type": "dynamic",
            "alpha": 1000.0,
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,  # not read
        },
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )


def builder_arguments(config: Mapping[str, Any], *, model_type: str = MODEL_TYPE) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``hunyuan_v1_moe``.

    Args:
        config: config.json.
        model_type: hunyuan_v1_moe, or hunyuan, in whose files q/k norms and shared experts are
            off unless they are mentioned.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, model_type)
    layers, heads = read.whole("num_hidden_layers"), read.whole("num_attention_heads")
    hidden_dim = read.whole("intermediate_size")
    experts_per_token = read.per_layer(  # with one of them each weight would be 1
        "moe_topk", "num_experts_per_tok", num_layers=layers, least=2
    )
    same = len(set(experts_per_token)) == 1
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads", default=heads),
        "num_experts": read.whole("num_experts", "num_local_experts"),
        "experts_per_token": experts_per_token[0] if same else experts_per_token,
        "expert_hidden_dim": hidden_dim,
        "max_seq_len": read.whole("max_position_embeddings"),
        "head_dim": read.whole("head_dim", "attention_head_dim", default=None),
        **read.rope(default_base=10_000.0, fixed_alpha=True),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "attention_bias": read.flag("attention_bias", default=False),
        "attention_dropout": read.share("attention_dropout"),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("moe_intermediate_size", None, hidden_dim, [hidden_dim] * layers)
    read.only("num_shared_expert", 1, [1] * layers)
    for name in ("use_qk_norm", "use_mixed_mlp_moe"):
        if not read.flag(name, default=model_type == MODEL_TYPE):
            read.refuse(name, "only True")
    for name in _OFF:
        read.only(name, False)
    read.only("hidden_act", "silu")
    read.only("moe_layer_num_skipped", 0)
    read.only("norm_topk_prob", True)
    read.only("norm_type", "hf_rms", "rms")
    read.only("routed_scaling_factor", 1)
    read.only("use_rotary_pos_emb", True)
    read.only("vit_path", None)
    read.ignore(*_INERT)
    read.finish()
    return arguments


_OFF = (
    "add_classification_head", "group_limited_greedy", "mlp_bias", "moe_drop_tokens",
    "moe_random_routing_dropped_token", "position_embedding_xdrope", "use_cla", "use_mla",
)  # fmt: skip
_INERT = (
    # of what is off: groups, latent and cross-layer attention, a classifier
    "n_group", "topk_group", "cla_share_factor", "xdrope_section", "kv_lora_rank", "q_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "class_num", "dense_list", "pool_type",
    "skip_cls_token",
    # of a vision tower that this model does not have
    "anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views", "num_media_embeds",
    "vit_add_patchemb_bias", "vit_input_resolution", "vit_mapping_type", "vit_norm_type",
    "vit_patch", "vit_remove_prenorm", "vit_token", "vit_type", "vit_used_rms_norm",
    # of the tokenizer
    "eod_token_id", "sep_token_id", "im_end_id", "im_newline_id", "im_start_id", "image_token_id",
    "mask_init_id", "org_vocab_size", "pad_id", "text_end_id", "text_start_id", "video_end_id",
    "video_start_id",
)  # fmt: skip

FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, hunyuan_v1_moe)
HUB_FAMILY = Family(
    HUB_MODEL_TYPE,
    WEIGHT_MAP,
    functools.partial(builder_arguments, model_type=HUB_MODEL_TYPE),
    hunyuan_v1_moe,
)
