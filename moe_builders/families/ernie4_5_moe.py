"""ERNIE 4.5 MoE (text): facts, builders, config reader, weight rows.

Source: transformers ``models/ernie4_5_moe`` (5.23); field names of config.json in brackets below.
Softmax over all experts; a bias (on disk [1, e]) steers the selection only; weights divided by
their sum or by [moe_norm_min], whichever is larger; SwiGLU experts without biases; shared experts
as one network of their total width; dense layers before, after and between those with experts;
grouped-query attention without q/k norms; rotary layout interleaved, in fp32; all norms pre-norm.
[use_bias] gives biases to attention, dense layers, shared experts and the output, never to routed
experts.
"""

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
from moe_builders.moe import moe_layer, shared_experts
from moe_builders.weights import PassThrough, Rename, Unsqueeze

MODEL_TYPE = "ernie4_5_moe"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    Rename("model.layers.{l}.mlp.gate.weight", "layers.{l}.mlp.router.gate.weight"),
    Unsqueeze(
        "model.layers.{l}.mlp.moe_statics.e_score_correction_bias",
        "layers.{l}.mlp.router.expert_bias",
    ),
    *hf_rows.EXPERTS,
    *hf_rows.SHARED_EXPERTS,
    *hf_rows.DENSE_MLP,
    PassThrough("model.mtp_{*}"),  # layers that predict the token after the next
)


def ernie4_5_moe(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden_dim: int,
    max_seq_len: int,
    head_dim: int | None = None,
    num_shared_experts: int = 2,
    rope_base: float = 500_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-5,
    normalize_min: float = 1e-12,
    use_bias: bool = False,
    tie_word_embeddings: bool = True,
    intermediate_dim: int | None = None,
    dense_layers: Sequence[int] = (),
) -> MoEDecoder:
    """An ERNIE 4.5 MoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        num_experts: [moe_num_experts].
        experts_per_token: [moe_k].
        expert_hidden_dim: [moe_intermediate_size], of one expert, routed or shared.
        max_seq_len: [max_position_embeddings].
        head_dim: [head_dim]; None: embed_dim / num_heads.
        num_shared_experts: [moe_num_shared_experts]; 0: none.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        normalize_min: [moe_norm_min], what the sum of a token's weights counts for at least.
        use_bias: [use_bias], of all projections but the routed experts'; not with tied embeddings.
        tie_word_embeddings: [tie_word_embeddings].
        intermediate_dim: [intermediate_size], width of the dense layers.
        dense_layers: numbers of layers with a dense FFN instead of experts
            [moe_layer_start_index, moe_layer_end_index, moe_layer_interval].

    Raises:
        InputError: dense_layers without intermediate_dim, use_bias with tied embeddings, or a
            number out of its range.
    """
    if dense_layers and intermediate_dim is None:
        raise InputError(f"layers {list(dense_layers)} are dense, but intermediate_dim is not set")
    head_dim = head_dim or embed_dim // num_heads
    rope = RotaryEmbedding(
        head_dim=head_dim,
        base=rope_base,
        scaling=rope_scaling,
        interleaved=True,
        max_seq_len=max_seq_len,
        in_fp32=True,
    )

    def attention(layer: int) -> nn.Module:
        return GroupedQueryAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            bias=use_bias,
        )

    def mlp(layer: int) -> nn.Module:
        if layer in dense_layers:
            assert intermediate_dim is not None
            return shared_experts(
                embed_dim=embed_dim, shared_hidden_dim=intermediate_dim, bias=use_bias
            )
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            shared_hidden_dim=num_shared_experts * expert_hidden_dim or None,
            shared_bias=use_bias,
            normalize_min=normalize_min,
            expert_bias=True,
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
        output_bias=use_bias,
    )


def ernie4_5_moe_21b_a3b() -> MoEDecoder:
    """ERNIE-4.5-21B-A3B: 21,825,436,160 parameters, 3.35 B active.

    transformers counts 21,825,437,888: the selection biases are parameters there, buffers here.
    Source: transformers' default ``Ernie4_5_MoeConfig``, which names ERNIE-4.5-21B-A3B-PT.
    """
    return ernie4_5_moe(
        vocab_size=103424,
        embed_dim=2560,
        num_layers=28,
        num_heads=20,
        num_kv_heads=4,
        num_experts=64,
        experts_per_token=6,
        expert_hidden_dim=1536,
        max_seq_len=131072,
        intermediate_dim=12288,
        dense_layers=(0,),
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``ernie4_5_moe``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    layers = read.whole("num_hidden_layers")
    first = read.whole("moe_layer_start_index", default=1, least=0)
    last = read.whole("moe_layer_end_index", default=-1, least=-1)
    last = layers - 1 if last == -1 else last
    step = read.whole("moe_layer_interval", default=1)
    with_experts = {n for n in range(layers) if first <= n <= last and (n + 1) % step == 0}
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": read.whole("num_attention_heads"),
        "num_kv_heads": read.whole("num_key_value_heads"),
        "num_experts": read.whole("moe_num_experts", "num_experts"),
        "experts_per_token": read.top_k("moe_k", "num_experts_per_tok", normalised=True),
        "expert_hidden_dim": read.whole("moe_intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "head_dim": read.whole("head_dim", default=None),
        "num_shared_experts": read.whole("moe_num_shared_experts", default=2, least=0),
        **read.rope(default_base=500_000.0),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "normalize_min": read.number("moe_norm_min", default=1e-12),
        "use_bias": read.flag("use_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=True),
        "intermediate_dim": read.whole("intermediate_size"),
        "dense_layers": tuple(n for n in range(layers) if n not in with_experts),
    }
    if arguments["use_bias"] and arguments["tie_word_embeddings"]:
        read.refuse("use_bias", "only False where tie_word_embeddings is true")
    read.only("hidden_act", "silu")
    # written by the release's own trainer; transformers reads none of them
    read.only("moe_gate", "topk")
    read.only("moe_gate_act", "softmax", None)
    read.only("use_rmsnorm", True)
    read.only("moe_use_aux_free", True)  # without it there is no bias on disk
    read.only("attention_probs_dropout_prob", 0)
    read.only("hidden_dropout_prob", 0)
    read.ignore("moe_capacity")  # transformers drops no token, nor do we
    read.ignore("num_nextn_predict_layers")  # passed through
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, ernie4_5_moe)
