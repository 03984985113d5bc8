"""Rows that many families' checkpoints have in common; a family's layout is a sum of these.

A row whose parameter a model lacks (an optional bias) is skipped, so these may hold more than one
family has. {l} is a layer number, {e} an expert's.
"""

from collections.abc import Iterable
from dataclasses import replace

from moe_builders.weights import Copy, PassThrough, Rename, Row, Stack

_DISK, _OURS = "model.layers.{l}.", "layers.{l}."


def rename_layer(**names: str) -> tuple[Row, ...]:
    """Rows inside a layer: our name with ``__`` for dots -> name on disk, both without prefix."""
    return tuple(
        Rename(_DISK + disk, _OURS + ours.replace("__", ".")) for ours, disk in names.items()
    )


def feed_forward(ours: str, disk: str) -> tuple[Row, ...]:
    """Rows of a gated network inside a layer, w1 being the gate, w3 up and w2 down."""
    return tuple(
        Rename(f"{_DISK}{disk}.{name}_proj.{kind}", f"{_OURS}{ours}.{w}.{kind}")
        for w, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        for kind in ("weight", "bias")
    )


def below(prefix: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows where all names on disk begin with a prefix: a text model inside a larger one."""
    return tuple(replace(row, disk=prefix + row.disk) for row in rows)


EMBEDDINGS: tuple[Row, ...] = (
    Rename("model.embed_tokens.weight", "tok_embeddings.weight"),
    Rename("model.norm.weight", "norm.weight"),
    Rename("lm_head.weight", "output.weight"),
    Rename("lm_head.bias", "output.bias"),
    Copy("lm_head.weight", "tok_embeddings.weight"),  # some tied models are stored with both
)
PRE_NORMS = rename_layer(
    sa_norm__weight="input_layernorm.weight",
    mlp_norm__weight="post_attention_layernorm.weight",
)
ATTENTION = rename_layer(
    attn__q_proj__weight="self_attn.q_proj.weight",
    attn__k_proj__weight="self_attn.k_proj.weight",
    attn__v_proj__weight="self_attn.v_proj.weight",
    attn__output_proj__weight="self_attn.o_proj.weight",
    attn__q_proj__bias="self_attn.q_proj.bias",
    attn__k_proj__bias="self_attn.k_proj.bias",
    attn__v_proj__bias="self_attn.v_proj.bias",
    attn__output_proj__bias="self_attn.o_proj.bias",
)
QK_NORMS = rename_layer(
    attn__q_norm__weight="self_attn.q_norm.weight",
    attn__k_norm__weight="self_attn.k_norm.weight",
)
LATENT_ATTENTION = rename_layer(
    attn__q_proj__weight="self_attn.q_proj.weight",
    attn__q_a_proj__weight="self_attn.q_a_proj.weight",
    attn__q_a_proj__bias="self_attn.q_a_proj.bias",
    attn__q_a_norm__weight="self_attn.q_a_layernorm.weight",
    attn__q_b_proj__weight="self_attn.q_b_proj.weight",
    attn__kv_a_proj__weight="self_attn.kv_a_proj_with_mqa.weight",
    attn__kv_a_proj__bias="self_attn.kv_a_proj_with_mqa.bias",
    attn__kv_a_norm__weight="self_attn.kv_a_layernorm.weight",
    attn__kv_b_proj__weight="self_attn.kv_b_proj.weight",
    attn__output_proj__weight="self_attn.o_proj.weight",
    attn__output_proj__bias="self_attn.o_proj.bias",
)
ROUTER = rename_layer(
    mlp__router__gate__weight="mlp.gate.weight",
    mlp__router__expert_bias="mlp.gate.e_score_correction_bias",
)
EXPERTS: tuple[Row, ...] = (
    Stack(
        "model.layers.{l}.mlp.experts.{e}.{gate,up}_proj.weight",
        "layers.{l}.mlp.experts.gate_up_proj",
    ),
    Stack("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "layers.{l}.mlp.experts.down_proj"),
)
# n shared experts are stored as one network of n times the width
SHARED_EXPERTS = feed_forward("mlp.shared_experts", "mlp.shared_experts")
GATED_SHARED_EXPERT = (
    *feed_forward("mlp.shared_experts", "mlp.shared_expert"),
    *rename_layer(mlp__shared_gate__weight="mlp.shared_expert_gate.weight"),
)
DENSE_MLP = feed_forward("mlp", "mlp")
# Mixtral's names: w1 is the gate, w3 up, w2 down
MIXTRAL_EXPERTS: tuple[Row, ...] = (
    *rename_layer(
        mlp__router__gate__weight="block_sparse_moe.gate.weight",
        mlp__router__expert_bias="block_sparse_moe.e_score_correction_bias",
    ),
    Stack(
        "model.layers.{l}.block_sparse_moe.experts.{e}.{w1,w3}.weight",
        "layers.{l}.mlp.experts.gate_up_proj",
    ),
    Stack(
        "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
        "layers.{l}.mlp.experts.down_proj",
    ),
)
# layers that predict further tokens are stored after the last layer of the model
FURTHER_LAYERS: tuple[Row, ...] = (PassThrough(_DISK + "{*}", beyond=_OURS),)
