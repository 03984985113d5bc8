"""Qwen3-MoE: facts, builders, config reader, weight rows.

Source: transformers ``models/qwen3_moe`` (5.23); field names of config.json in brackets below.
Softmax over all experts, top-k, weights renormalised [norm_topk_prob]; SwiGLU experts without
biases, no shared experts; grouped-query attention with an RMSNorm per head on q and k BEFORE the
rotary step; rotary layout half-rotated; all norms pre-norm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.errors import InputError
from moe_builders.moe import moe_layer, shared_experts
from moe_builders.weights import Rename, Row, Stack

MODEL_TYPE = "qwen3_moe"

WEIGHT_MAP: tuple[Row, ...] = (
    Rename("model.embed_tokens.weight", "tok_embeddings.weight"),
    Rename("model.layers.{l}.input_layernorm.weight", "layers.{l}.sa_norm.weight"),
    Rename("model.layers.{l}.self_attn.q_proj.weight", "layers.{l}.attn.q_proj.weight"),
    Rename("model.layers.{l}.self_attn.k_proj.weight", "layers.{l}.attn.k_proj.weight"),
    Rename("model.layers.{l}.self_attn.v_proj.weight", "layers.{l}.attn.v_proj.weight"),
    Rename("model.layers.{l}.self_attn.o_proj.weight", "layers.{l}.attn.output_proj.weight"),
    Rename("model.layers.{l}.self_attn.q_proj.bias", "layers.{l}.attn.q_proj.bias"),
    Rename("model.layers.{l}.self_attn.k_proj.bias", "layers.{l}.attn.k_proj.bias"),
    Rename("model.layers.{l}.self_attn.v_proj.bias", "layers.{l}.attn.v_proj.bias"),
    Rename("model.layers.{l}.self_attn.o_proj.bias", "layers.{l}.attn.output_proj.bias"),
    Rename("model.layers.{l}.self_attn.q_norm.weight", "layers.{l}.attn.q_norm.weight"),
    Rename("model.layers.{l}.self_attn.k_norm.weight", "layers.{l}.attn.k_norm.weight"),
    Rename("model.layers.{l}.post_attention_layernorm.weight", "layers.{l}.mlp_norm.weight"),
    Rename("model.layers.{l}.mlp.gate.weight", "layers.{l}.mlp.router.gate.weight"),
    Stack(
        "model.layers.{l}.mlp.experts.{e}.{gate,up}_proj.weight",
        "layers.{l}.mlp.experts.gate_up_proj",
    ),
    Stack("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "layers.{l}.mlp.experts.down_proj"),
    # dense layers
    Rename("model.layers.{l}.mlp.gate_proj.weight", "layers.{l}.mlp.w1.weight"),
    Rename("model.layers.{l}.mlp.up_proj.weight", "layers.{l}.mlp.w3.weight"),
    Rename("model.layers.{l}.mlp.down_proj.weight", "layers.{l}.mlp.w2.weight"),
    Rename("model.norm.weight", "norm.weight"),
    Rename("lm_head.weight", "output.weight"),
)


def qwen3_moe(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden_dim: int,
    max_seq_len: int,
    rope_base: float = 1_000_000.0,
    norm_eps: float = 1e-6,
    normalize_weights: bool = True,
    attention_bias: bool = False,
    tie_word_embeddings: bool = False,
    intermediate_dim: int | None = None,
    dense_layers: Sequence[int] = (),
) -> MoEDecoder:
    """A Qwen3-MoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        head_dim: [head_dim]; not embed_dim / num_heads in the releases.
        num_experts: [num_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [moe_intermediate_size], of one expert.
        max_seq_len: [max_position_embeddings].
        rope_base: [rope_theta].
        norm_eps: [rms_norm_eps].
        normalize_weights: [norm_topk_prob].
        attention_bias: [attention_bias].
        tie_word_embeddings: [tie_word_embeddings].
        intermediate_dim: [intermediate_size], width of the dense layers.
        dense_layers: numbers of layers with a dense FFN instead of experts
            [mlp_only_layers, decoder_sparse_step].

    Raises:
        InputError: dense_layers without intermediate_dim, or a number out of its range.
    """
    if dense_layers and intermediate_dim is None:
        raise InputError(f"layers {list(dense_layers)} are dense, but intermediate_dim is not set")
    rope = RotaryEmbedding(head_dim=head_dim, base=rope_base)

    def attention(layer: int) -> nn.Module:
        return GroupedQueryAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            q_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            k_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            bias=attention_bias,
        )

    def mlp(layer: int) -> nn.Module:
        if layer in dense_layers:
            assert intermediate_dim is not None
            return shared_experts(embed_dim=embed_dim, shared_hidden_dim=intermediate_dim)
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            normalize_weights=normalize_weights,
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


def qwen3_moe_30b_a3b() -> MoEDecoder:
    """Qwen3-30B-A3B: 30,532,122,624 parameters, 3.35 B active. Source: its config.json."""
    return qwen3_moe(
        vocab_size=151936,
        embed_dim=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_hidden_dim=768,
        max_seq_len=40960,
    )


def qwen3_moe_235b_a22b() -> MoEDecoder:
    """Qwen3-235B-A22B: 235,093,634,560 parameters, 22.19 B active. Source: its config.json."""
    return qwen3_moe(
        vocab_size=151936,
        embed_dim=4096,
        num_layers=94,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_hidden_dim=1536,
        max_seq_len=40960,
    )


def qwen3_moe_tiny(*, vocab_size: int = 256) -> MoEDecoder:
    """A few layers of everything, for tests and first steps; no release has this size."""
    return qwen3_moe(
        vocab_size=vocab_size,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        expert_hidden_dim=32,
        max_seq_len=512,
    )


# Fields that change nothing a trainer computes: bookkeeping, generation, other programs' switches.
_INERT_FIELDS = frozenset({
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "max_window_layers", "model_type", "output_router_logits", "pad_token_id",
    "router_aux_loss_coef", "sliding_window", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
# Fields that are honoured only at these values.
_FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "use_qk_norm": (True,),
    "qkv_bias": (False,),
    "shared_expert_intermediate_size": (0,),
    "quantization_config": (None,),
}
_READ_FIELDS = frozenset({
    "attention_bias", "decoder_sparse_step", "head_dim", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
    "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "rms_norm_eps", "rope_parameters", "rope_theta",
    "tie_word_embeddings", "vocab_size",
})  # fmt: skip


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``qwen3_moe``.

    Reads both spellings of the rotary base (hub files: ``rope_theta``; transformers 5:
    ``rope_parameters``).

    Raises:
        InputError: fields this family does not honour, or a needed field that is missing; all of
            them are named.
    """
    unknown = sorted(set(config) - _INERT_FIELDS - _READ_FIELDS - set(_FIXED_FIELDS))
    refused = [f"{name}={config[name]!r}" for name in unknown]
    refused += [
        f"{name}={config[name]!r} (only {allowed[0]!r})"
        for name, allowed in _FIXED_FIELDS.items()
        if config.get(name, allowed[0]) not in allowed
    ]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        refused.append(f"rope_parameters.rope_type={rope['rope_type']!r} (only 'default')")
    refused += [
        f"rope_parameters.{name}={rope[name]!r}"
        for name in sorted(set(rope) - {"rope_type", "rope_theta"})
    ]
    if refused:
        raise InputError(
            f"config.json of a {MODEL_TYPE} holds what is not supported: {', '.join(refused)}"
        )
    fields = {
        "num_experts": config.get("num_local_experts"),
        "rope_theta": rope.get("rope_theta"),
    } | dict(config)
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "max_position_embeddings",
        "rope_theta",
    )
    missing = [name for name in needed if fields.get(name) is None]
    if missing:
        raise InputError(f"config.json of a {MODEL_TYPE} lacks {', '.join(missing)}")
    sizes = (*needed, "head_dim", "rms_norm_eps", "decoder_sparse_step", "intermediate_size")
    given = {name: fields[name] for name in sizes if fields.get(name) is not None}
    wrong = [f"{n}={v!r}" for n, v in given.items() if not _is_size(v, whole=n[0] != "r")]
    if wrong:
        raise InputError(
            f"config.json of a {MODEL_TYPE} holds what must be a number above 0: {', '.join(wrong)}"
        )
    layers, step = fields["num_hidden_layers"], fields.get("decoder_sparse_step", 1)
    only_dense = fields.get("mlp_only_layers") or []
    return {
        "vocab_size": fields["vocab_size"],
        "embed_dim": fields["hidden_size"],
        "num_layers": layers,
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields["num_key_value_heads"],
        "head_dim": fields.get("head_dim")
        or fields["hidden_size"] // fields["num_attention_heads"],
        "num_experts": fields["num_experts"],
        "experts_per_token": fields["num_experts_per_tok"],
        "expert_hidden_dim": fields["moe_intermediate_size"],
        "max_seq_len": fields["max_position_embeddings"],
        "rope_base": fields["rope_theta"],
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "normalize_weights": fields.get("norm_topk_prob", False),
        "attention_bias": fields.get("attention_bias", False),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "intermediate_dim": fields.get("intermediate_size"),
        "dense_layers": tuple(n for n in range(layers) if n in only_dense or (n + 1) % step != 0),
    }


def _is_size(value: Any, *, whole: bool) -> bool:
    """Above 0, a whole number unless it is one of the rotary base and the norms' epsilon."""
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return number and value > 0


def build(config: Mapping[str, Any]) -> MoEDecoder:
    """The model that a config.json describes, with random weights."""
    return qwen3_moe(**builder_arguments(config))
