"""Llama 4: facts, builders, config reader, weight rows of its text model.

Source: transformers ``models/llama4`` (5.23); field names of config.json in brackets below.
Each token takes the experts of its best logits; the sigmoid of a logit, not normalised, multiplies
the expert's INPUT. Beside them one shared expert without a gate; some layers may be dense.
Grouped-query attention of two kinds: layers with rotary positions (neighbouring dims are a pair,
turned in fp32, then an RMSNorm without weights on q and k) that see only their own chunk of
positions, and layers without positions that see everything, with a temperature. All norms pre-norm.

A released folder (model_type ``llama4``) holds a vision model, too: only text is trained, the
other tensors pass through. The text model alone has model_type ``llama4_text``. On disk experts
lie transposed.

Chunks and temperature count positions in a document; transformers counts places in a row (for
chunks without the padding before it), which differs for temperature in rows padded on the left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_builders import hf_rows
from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.attention.temperature import PositionTemperature
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.family import Family
from moe_builders.moe import moe_layer, shared_experts
from moe_builders.weights import PassThrough, Row, Transpose

_EXPERTS, _OURS = "model.layers.{l}.feed_forward.experts.", "layers.{l}.mlp.experts."
WEIGHT_MAP: tuple[Row, ...] = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.feed_forward("mlp", "feed_forward"),
    *hf_rows.feed_forward("mlp.shared_experts", "feed_forward.shared_expert"),
    *hf_rows.rename_layer(mlp__router__gate__weight="feed_forward.router.weight"),
    Transpose(_EXPERTS + "gate_up_proj", _OURS + "gate_up_proj"),
    Transpose(_EXPERTS + "down_proj", _OURS + "down_proj"),
)
MULTIMODAL_WEIGHT_MAP: tuple[Row, ...] = (
    *hf_rows.below("language_model.", WEIGHT_MAP),
    PassThrough("vision_model.{*}"),
    PassThrough("multi_modal_projector.{*}"),
)


def llama4(
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
    dense_hidden_dim: int,
    max_seq_len: int,
    moe_layers: Sequence[int] | None = None,
    rope_layers: Sequence[int] | None = None,
    chunk: int = 8192,
    chunk_layers: Sequence[int] | None = None,
    rope_base: float = 500_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    qk_norm: bool = True,
    norm_eps: float = 1e-5,
    temperature: bool = True,
    temperature_floor: int = 8192,
    temperature_strength: float = 0.1,
    attention_bias: bool = False,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A Llama 4 decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        head_dim: [head_dim].
        num_experts: [num_local_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [intermediate_size], of one expert and of the shared one.
        dense_hidden_dim: [intermediate_size_mlp], of layers without experts.
        max_seq_len: [max_position_embeddings].
        moe_layers: numbers of the layers with experts [moe_layers, interleave_moe_layer_step];
            None: all.
        rope_layers: numbers of the layers with rotary positions [no_rope_layers, 1 there;
            no_rope_layer_interval]; None: all but every fourth.
        chunk: [attention_chunk_size], positions.
        chunk_layers: numbers of the layers whose queries see their own chunk alone [layer_types];
            None: those with rotary positions.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        qk_norm: [use_qk_norm], on layers with rotary positions.
        norm_eps: [rms_norm_eps], of all norms.
        temperature: [attn_temperature_tuning], of layers without rotary positions.
        temperature_floor, temperature_strength: [floor_scale, attn_scale], see
            ``PositionTemperature``.
        attention_bias: [attention_bias], of q, k, v and output.
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: a number out of its range.
    """
    sparse = range(num_layers) if moe_layers is None else moe_layers
    turned = _rope_layers(num_layers) if rope_layers is None else rope_layers
    chunked = turned if chunk_layers is None else chunk_layers
    rope = RotaryEmbedding(
        head_dim=head_dim, base=rope_base, scaling=rope_scaling, max_seq_len=max_seq_len,
        interleaved=True, in_fp32=True,
    )  # fmt: skip

    def attention(layer: int) -> nn.Module:
        norm = growing = None
        if qk_norm and layer in turned:
            norm = nn.RMSNorm(head_dim, eps=norm_eps, elementwise_affine=False)
        if temperature and layer not in turned:
            growing = PositionTemperature(floor=temperature_floor, strength=temperature_strength)
        return GroupedQueryAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope if layer in turned else None,
            q_norm=norm,
            k_norm=norm,
            norm_after_rope=True,
            bias=attention_bias,
            chunk=chunk if layer in chunked else None,
            query_scale=growing,
        )

    def mlp(layer: int) -> nn.Module:
        if layer not in sparse:
            return shared_experts(embed_dim=embed_dim, shared_hidden_dim=dense_hidden_dim)
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            shared_hidden_dim=expert_hidden_dim,
            score_function="topk_sigmoid",
            normalize_weights=False,
            score_position="before",
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


def llama4_scout_17b_16e() -> MoEDecoder:
    """Scout, text: 107,769,861,120 parameters, 17.17 B active. Source: its config.json."""
    return _released(
        num_experts=16,
        max_seq_len=10485760,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    )


def llama4_maverick_17b_128e() -> MoEDecoder:
    """Maverick, text: 400,711,848,960 parameters, 17.18 B active. Source: its config.json."""
    return _released(
        num_experts=128, max_seq_len=1048576, moe_layers=range(1, 48, 2), qk_norm=False
    )


def _released(*, num_experts: int, max_seq_len: int, **different: Any) -> MoEDecoder:
    return llama4(
        vocab_size=202048,
        embed_dim=5120,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        num_experts=num_experts,
        experts_per_token=1,
        expert_hidden_dim=8192,
        dense_hidden_dim=16384,
        max_seq_len=max_seq_len,
        **different,
    )


def _rope_layers(num_layers: int, interval: int = 4) -> tuple[int, ...]:
    """All layers but every ``interval``-th."""
    return tuple(n for n in range(num_layers) if (n + 1) % interval)


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a ``llama4_text`` -> arguments of ``llama4``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    config = _as_today(config)
    read = ConfigReader(config, "llama4_text")
    layers = read.whole("num_hidden_layers")
    step = read.whole("interleave_moe_layer_step", default=1)
    turned = _rope_layers(layers, read.whole("no_rope_layer_interval", default=4))
    by_interval = [int(n in turned) for n in range(layers)]
    marks = read.words("no_rope_layers", num_layers=layers, allowed=(0, 1), default=by_interval)
    words = ("full_attention", "chunked_attention")
    by_rope = [words[bool(mark)] for mark in marks]
    kinds = read.words("layer_types", num_layers=layers, allowed=words, default=by_rope)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": read.whole("num_attention_heads"),
        "num_kv_heads": read.whole("num_key_value_heads"),
        "head_dim": read.whole("head_dim", default=128),
        "num_experts": read.whole("num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=False),
        "expert_hidden_dim": read.whole("intermediate_size"),
        "dense_hidden_dim": read.whole("intermediate_size_mlp", default=16384),
        "max_seq_len": read.whole("max_position_embeddings"),
        "moe_layers": read.layers(
            "moe_layers", num_layers=layers, default=range(step - 1, layers, step)
        ),
        "rope_layers": tuple(n for n, mark in enumerate(marks) if mark),
        "chunk": read.whole("attention_chunk_size", default=8192),
        "chunk_layers": tuple(n for n, kind in enumerate(kinds) if kind == words[1]),
        **read.rope(default_base=500_000.0),
        "qk_norm": read.flag("use_qk_norm", default=True),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "temperature": read.flag("attn_temperature_tuning", default=True),
        "temperature_floor": read.whole("floor_scale", default=8192),
        "temperature_strength": read.number("attn_scale", default=0.1),
        "attention_bias": read.flag("attention_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.not_null("attention_chunk_size", "head_dim")
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("router_jitter_noise", 0)
    read.ignore("for_llm_compressor")  # of older files
    read.finish()
    return arguments


def multimodal_builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a ``llama4`` -> arguments of ``llama4``, for its text model.

    Raises:
        InputError: as ``builder_arguments``.
    """
    read = ConfigReader(config, "llama4")
    text = read.part("text_config")
    read.only("tie_word_embeddings", False)  # what transformers heeds is text_config's
    read.ignore("vision_config", "image_token_index", "boi_token_index", "eoi_token_index")
    read.finish()
    return builder_arguments(text)


def _as_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """Older files have no_rope_layers [] for the default, attn_temperature_tuning 4 for true."""
    config = dict(config)
    if config.get("no_rope_layers") == []:
        del config["no_rope_layers"]
    if type(config.get("attn_temperature_tuning")) is int:
        config["attn_temperature_tuning"] = bool(config["attn_temperature_tuning"])
    return config


FAMILY = Family("llama4_text", WEIGHT_MAP, builder_arguments, llama4)
MULTIMODAL = Family("llama4", MULTIMODAL_WEIGHT_MAP, multimodal_builder_arguments, llama4)
