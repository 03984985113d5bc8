"""How many bytes of activations a decoder keeps for backward: arithmetic from its modules.

Letters: t tokens of a micro-batch · d dim · n heads · m key/value heads · r head_dim (latent
attention: p without positions, r rotary, w of a value, z and u widths of the latents) · e experts ·
k experts_per_token · h hidden_dim of an expert · f width of a dense network · v vocabulary.

Counted is what autograd saves in the fused ways that GPUs take; numbers of size t alone are not.
Experts are taken to be equally loaded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.mla import MultiHeadLatentAttention
from moe_builders.errors import InputError
from moe_builders.flops import experts_per_token
from moe_builders.moe import MoE, moe_layers

_INT = 8  # bytes


@dataclass(frozen=True)
class Activations:
    """Bytes of one process.

    Attributes:
        kept: from forward to backward, of all layers together.
        recomputed: of one layer, made again in backward; 0 without activation checkpointing.
        logits: at their worst, in backward: log-probabilities, their gradient and the logits', in
            fp32 or wider.
        moving: of the layer that moves most rows: copies on their way to the experts and back.
    """

    kept: int
    recomputed: int
    logits: int
    moving: int


def count_activations(
    model: Any,
    *,
    num_tokens: int,
    mask_len: int,
    compute_dtype: torch.dtype,
    checkpointing: bool,
    ep: int = 1,
    dispatcher: str = "all_to_all",
) -> Activations:
    """What a decoder's activations take.

    Args:
        model: also on the meta device.
        num_tokens: t.
        mask_len: keys in each row of the mask that attention gets where documents share rows (each
            layer then keeps it as numbers, and keys and values for all heads); 0: no mask.
        compute_dtype: of forward and backward.
        checkpointing: only each layer's input and its routing are kept.
        ep: processes that share the experts.
        dispatcher: "all_to_all" or "all_gather".

    Raises:
        InputError: an attention or mlp of one's own, whose bytes nobody knows.
    """
    size = compute_dtype.itemsize
    wide = torch.promote_types(compute_dtype, torch.float32).itemsize
    dim = model.tok_embeddings.embedding_dim
    layers = [layer_bytes(layer, mask_len=mask_len, compute_dtype=compute_dtype)
              for layer in model.layers]  # fmt: skip
    routing = sum(_routing(moe, wide) for _, moe in moe_layers(model))
    ends = 2 * dim * size  # the last layer's output, normalised
    kept = len(layers) * dim * size + routing if checkpointing else sum(layers)
    gathers = dispatcher == "all_gather"
    moving = [
        _moving(moe, size, ep=ep, gathers=gathers) if ep > 1 else 0 for _, moe in moe_layers(model)
    ]
    return Activations(
        kept=num_tokens * (kept + ends),
        recomputed=num_tokens * max(layers) if checkpointing else 0,
        logits=3 * num_tokens * model.tok_embeddings.num_embeddings * wide,
        moving=num_tokens * max(moving, default=0),
    )


def layer_bytes(layer: Any, *, mask_len: int, compute_dtype: torch.dtype) -> int:
    """Bytes per token that a layer saves for its backward, its input among them."""
    size = compute_dtype.itemsize
    wide = torch.promote_types(compute_dtype, torch.float32).itemsize
    return (
        2 * _dim(layer) * size  # what comes in, and between the branches
        + (_attention(layer.attn, packed=mask_len > 0) + mask_len) * size
        + _mlp(layer.mlp, size, wide)
    )


def _dim(layer: Any) -> int:
    return layer.attn.output_proj.out_features


def _attention(attn: nn.Module, *, packed: bool) -> int:
    """Numbers per token: the normalised input, what turns into q, k and v, those, the answer."""
    if isinstance(attn, GroupedQueryAttention):
        d, r = attn.q_proj.in_features, attn.head_dim
        q, kv = attn.num_heads * r, attn.num_kv_heads * r
        before = (q if attn.q_norm is not None else 0) + (kv if attn.k_norm is not None else 0)
        turns = 4 * r if attn.rope is not None else 0  # cosines and sines, for q and for k
        return d + before + turns + 2 * q + 2 * (q if packed else kv)
    if isinstance(attn, MultiHeadLatentAttention):
        n, r, w = attn.num_heads, attn.qk_rope_head_dim, attn.v_head_dim
        query = 2 * (attn.q_lora_rank or 0) + n * attn.head_dim
        latent = 2 * attn.kv_lora_rank + r
        key_value = n * attn.head_dim + n * (attn.qk_nope_head_dim + w)
        turns = 4 * r if attn.rope is not None else 0
        # the answer twice: its heads are put side by side by a copy
        return attn.kv_a_proj.in_features + query + latent + turns + key_value + 2 * n * w
    raise InputError(
        f"activations of the attention {type(attn).__name__} are not known: the plan counts "
        "GroupedQueryAttention and MultiHeadLatentAttention"
    )


def _mlp(mlp: Any, size: int, wide: int) -> int:
    """Bytes per token: the normalised input, and what the networks keep."""
    if not isinstance(mlp, MoE):
        return _dense(mlp) * size
    experts: Any = mlp.experts
    if not hasattr(experts, "activation") or not hasattr(experts, "hidden_dim"):
        raise InputError(
            f"activations of the experts {type(experts).__name__} are not known: give them "
            "attributes dim, hidden_dim and activation"
        )
    gate: Any = getattr(mlp.router, "gate", None)
    d = experts.dim if gate is None else gate.in_features
    k = experts_per_token(mlp.router)
    inner = (4 if experts.activation.gated else 2) * experts.hidden_dim
    rows = round(k * (2 * experts.dim + inner))
    shared = 0 if mlp.shared_experts is None else _dense(mlp.shared_experts) - d
    latent = 0 if mlp.latent_down is None else 2 * experts.dim
    scores = 2 * mlp.router.num_experts * wide
    # the router sees the input in fp32 or wider
    return (d + rows + shared + latent) * size + d * wide + scores + _routing(mlp, wide)


def _dense(mlp: Any) -> int:
    """Numbers per token of torchtune's FeedForward: input, both projections, silu, product."""
    first = getattr(mlp, "w1", None)
    if first is None:
        raise InputError(
            f"activations of the mlp {type(mlp).__name__} are not known: the plan counts MoE and "
            "torchtune's FeedForward"
        )
    widths = 4 if getattr(mlp, "w3", None) is not None else 2
    return first.in_features + widths * first.out_features


def _routing(moe: MoE, wide: int) -> int:
    """Bytes per token of a Routing: logits, probs, and for each assignment five numbers."""
    k = experts_per_token(moe.router)
    return round(2 * moe.router.num_experts * wide + k * (4 * _INT + wide))


def _moving(moe: Any, size: int, *, ep: int, gathers: bool) -> int:
    """Bytes per token of rows that are not saved: at home, as they arrive; or all tokens."""
    d = moe.experts.dim
    return round((2 * ep if gathers else 2 * experts_per_token(moe.router)) * d * size)
