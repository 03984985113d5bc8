"""gpt-oss: facts, builders, config reader, weight rows.

Source: transformers ``models/gpt_oss`` (5.23); field names of config.json in brackets below.
Top-k of the router's logits (with a bias), then softmax over the k; experts with biases and a
clamped gated activation in every layer; grouped-query attention with biases, a learned sink per
head and windows on some layers; YaRN without truncation; all norms pre-norm.

On disk experts lie transposed, gate and up columns taking turns; the released files hold them as
MXFP4, which is widened to bf16 while it streams in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_builders import hf_rows
from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.family import Family
from moe_builders.moe import MoE, moe_experts
from moe_builders.ops.activations import gpt_oss_swiglu
from moe_builders.routers.token_choice import TokenChoiceTopKRouter
from moe_builders.weights import Interleave, Rename, Row, Transpose

MODEL_TYPE = "gpt_oss"

_DISK, _OURS = "model.layers.{l}.mlp.experts.", "layers.{l}.mlp.experts."
WEIGHT_MAP: tuple[Row, ...] = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.rename_layer(
        attn__sinks="self_attn.sinks",
        mlp__router__gate__weight="mlp.router.weight",
        mlp__router__gate__bias="mlp.router.bias",
    ),
    Interleave(_DISK + "gate_up_proj", _OURS + "gate_up_proj", transposed=True),
    Interleave(_DISK + "gate_up_proj_bias", _OURS + "gate_up_bias"),
    Transpose(_DISK + "down_proj", _OURS + "down_proj"),
    Rename(_DISK + "down_proj_bias", _OURS + "down_bias"),
)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss(
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
    window: int | None = 128,
    window_layers: Sequence[int] | None = None,
    rope_base: float = 150_000.0,
    rope_scaling: Mapping[str, Any] | None = _YARN,
    norm_eps: float = 1e-5,
    attention_bias: bool = True,
    swiglu_limit: float = 7.0,
    swiglu_alpha: float = 1.702,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A gpt-oss decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        head_dim: [head_dim]; not embed_dim / num_heads in the releases.
        num_experts: [num_local_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [intermediate_size], of one expert.
        max_seq_len: [max_position_embeddings].
        window: [sliding_window], positions that a query of a windowed layer sees.
        window_layers: numbers of the windowed layers [layer_types]; None: every other one,
            beginning with the first.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        attention_bias: [attention_bias], of q, k, v and output.
        swiglu_limit, swiglu_alpha: [swiglu_limit, swiglu_alpha], see ``gpt_oss_swiglu``.
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: a number out of its range.
    """
    windowed = range(0, num_layers, 2) if window_layers is None else window_layers
    rope = RotaryEmbedding(
        head_dim=head_dim, base=rope_base, scaling=rope_scaling, max_seq_len=max_seq_len
    )

    def attention(layer: int) -> nn.Module:
        return GroupedQueryAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            bias=attention_bias,
            window=window if layer in windowed else None,
            sinks=True,
        )

    def mlp(layer: int) -> nn.Module:
        return MoE(
            router=TokenChoiceTopKRouter(
                dim=embed_dim,
                num_experts=num_experts,
                experts_per_token=experts_per_token,
                score_function="topk_softmax",
                gate_bias=True,
            ),
            experts=moe_experts(
                embed_dim=embed_dim,
                expert_hidden_dim=expert_hidden_dim,
                num_experts=num_experts,
                activation=gpt_oss_swiglu(limit=swiglu_limit, alpha=swiglu_alpha),
                bias=True,
            ),
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


def gpt_oss_20b() -> MoEDecoder:
    """gpt-oss-20b: 20,914,757,184 parameters, 4.19 B active. Source: its config.json."""
    return _released(num_layers=24, num_experts=32)


def gpt_oss_120b() -> MoEDecoder:
    """gpt-oss-120b: 116,829,156,672 parameters, 5.71 B active. Source: its config.json."""
    return _released(num_layers=36, num_experts=128)


def _released(*, num_layers: int, num_experts: int) -> MoEDecoder:
    return gpt_oss(
        vocab_size=201088,
        embed_dim=2880,
        num_layers=num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=num_experts,
        experts_per_token=4,
        expert_hidden_dim=2880,
        max_seq_len=131072,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``gpt_oss``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    layers, heads = read.whole("num_hidden_layers"), read.whole("num_attention_heads")
    experts_per_token = read.top_k("num_experts_per_tok", "experts_per_token", normalised=True)
    kinds = read.words(
        "layer_types",
        num_layers=layers,
        allowed=("sliding_attention", "full_attention"),
        default=[("sliding_attention", "full_attention")[n % 2] for n in range(layers)],
    )
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads"),
        "head_dim": read.whole("head_dim", default=64),
        "num_experts": read.whole("num_local_experts", "num_experts"),
        "experts_per_token": experts_per_token,
        "expert_hidden_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "window": read.whole("sliding_window", default=None if "sliding_window" in config else 128),
        "window_layers": tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention"),
        **read.rope(default_base=150_000.0, default_scaling=_YARN),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "attention_bias": read.flag("attention_bias", default=True),
        "swiglu_limit": read.number("swiglu_limit", default=7.0),
        "swiglu_alpha": read.number("swiglu_alpha", default=1.702),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("experts_per_token", experts_per_token)
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.ignore("initial_context_length")  # of OpenAI's own program; rope_scaling has it, too
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, gpt_oss)
