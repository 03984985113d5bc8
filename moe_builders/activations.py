"""How many bytes of activations a decoder keeps for backward: arithmetic from its modules.

Letters: t tokens of a micro-batch · d dim · n heads · m key/value heads · r head_dim (latent
attention: p without positions, r rotary, w of a value, z and u widths of the latents) · e experts ·
k experts_per_token · h hidden_dim of an expert · f width of a dense network · v vocabulary.

Counted is what autograd saves in the fused ways that GPUs take; numbers of size t alone are not.
Experts are taken to be equally loaded.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.mla import MultiHeadLatentAttention
from moe_builders.errors import InputError
from moe_builders.flops import experts_per_token
from moe_builders.moe import MoE, moe_layers
from moe_builders.ops import routed_blocks
from moe_builders.ops.linear_cross_entropy import working_bytes

_INT = 8  # bytes


@dataclass(frozen=True)
class Activations:
    """Bytes of one process.

    Attributes:
        kept: from forward to backward, of all layers together.
        layer: of the layer that keeps most.
        recomputed: of one layer (ac_mode "selective": of one half of it), made again in backward;
            0 without activation checkpointing.
        working: temporaries of a layer's backward, beside what it kept, at their worst.
        rows: those of them that are there while the weights' gradients are made (on a CPU that is
            all the while).
        logits: at their worst. Whole ones in backward: log-probabilities, their gradient and the
            logits', in fp32 or wider; else a chunk of them beside the gradients of the output
            (torch's and Liger's ways are taken to need what our own does).
        moving: of the layer that moves most rows: copies on their way to the experts and back.
    """

    kept: int
    layer: int
    recomputed: int
    working: int
    rows: int
    logits: int
    moving: int


def count_activations(
    model: Any,
    *,
    num_tokens: int,
    mask_len: int,
    compute_dtype: torch.dtype,
    checkpointing: bool,
    ac_mode: str = "full",
    ep: int = 1,
    dispatcher: str = "all_to_all",
    fused_norms: bool = True,
) -> Activations:
    """What a decoder's activations take.

    Args:
        model: also on the meta device.
        num_tokens: t.
        mask_len: keys in each row of the mask that attention gets where documents share rows and
            it has no other way (each layer then keeps it as numbers, and keys and values for all
            heads); 0: no mask.
        compute_dtype: of forward and backward.
        checkpointing: only each layer's input and its routing are kept.
        ac_mode: "selective": beside them what experts save, and what comes between the halves.
        ep: processes that share the experts.
        dispatcher: "all_to_all" or "all_gather".
        fused_norms: norms keep their input alone, as a GPU's kernels do; False: as on a CPU, whose
            loss also has smaller blocks.

    Raises:
        InputError: an attention or mlp of one's own, whose bytes nobody knows.
    """
    size = compute_dtype.itemsize
    wide = torch.promote_types(compute_dtype, torch.float32).itemsize
    dim = model.tok_embeddings.embedding_dim
    working = partial(_working, num_tokens=num_tokens, dtype=compute_dtype, on_cpu=not fused_norms)
    layers = [
        layer_bytes(
            layer, mask_len=mask_len, compute_dtype=compute_dtype, ep=ep, fused_norms=fused_norms
        )
        for layer in model.layers
    ]
    routing = sum(_routing(moe, wide) for _, moe in moe_layers(model))
    ends = 2 * dim * size  # the last layer's output, normalised
    if not fused_norms:
        ends += dim * (2 * wide - size)
    kept, recomputed = sum(layers), 0
    if checkpointing and ac_mode == "selective":
        attends = [(_attention(layer.attn, packed=mask_len > 0) + mask_len) * size
                   for layer in model.layers]  # fmt: skip
        networks = [0 if any(moe_layers(layer)) else _mlp(layer.mlp, size, wide, apart=False)
                    for layer in model.layers]  # fmt: skip
        kept, recomputed = kept - sum(attends) - sum(networks), max(*attends, *networks)
    elif checkpointing:
        kept, recomputed = len(layers) * dim * size + routing, max(layers)
    gathers = dispatcher == "all_gather"
    moving = [
        _moving(moe, size, ep=ep, gathers=gathers) if ep > 1 else 0 for _, moe in moe_layers(model)
    ]
    return Activations(
        kept=num_tokens * (kept + ends),
        layer=num_tokens * max(layers),
        recomputed=num_tokens * recomputed,
        working=max(working(layer.mlp, hidden=2) for layer in model.layers),
        rows=max(working(layer.mlp, hidden=0) for layer in model.layers),
        logits=_logits(model, num_tokens, compute_dtype, on_cpu=not fused_norms),
        moving=num_tokens * max(moving, default=0),
    )


def _logits(model: Any, num_tokens: int, compute_dtype: torch.dtype, *, on_cpu: bool) -> int:
    dim, vocab_size = model.tok_embeddings.embedding_dim, model.tok_embeddings.num_embeddings
    if model.linear_cross_entropy == "none":
        wide = torch.promote_types(compute_dtype, torch.float32).itemsize
        return 3 * num_tokens * vocab_size * wide
    return working_bytes(
        num_tokens=num_tokens, dim=dim, vocab_size=vocab_size, dtype=compute_dtype, on_cpu=on_cpu
    )


def layer_bytes(
    layer: Any,
    *,
    mask_len: int,
    compute_dtype: torch.dtype,
    ep: int = 1,
    fused_norms: bool = True,
) -> int:
    """Bytes per token that a layer saves for its backward, its input among them."""
    size = compute_dtype.itemsize
    wide = torch.promote_types(compute_dtype, torch.float32).itemsize
    # a norm without a kernel: its input and that over its size, in fp32 or wider, in place of it
    norms = 0 if fused_norms else _normed(layer.attn, _dim(layer)) * (2 * wide - size)
    return (
        2 * _dim(layer) * size  # what comes in, and between the branches
        + (_attention(layer.attn, packed=mask_len > 0) + mask_len) * size
        + _mlp(layer.mlp, size, wide, apart=ep > 1)
        + norms
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


def _normed(attn: Any, dim: int) -> int:
    """Numbers per token that go through a layer's norms."""
    if isinstance(attn, GroupedQueryAttention):
        q, kv = attn.num_heads * attn.head_dim, attn.num_kv_heads * attn.head_dim
        return 2 * dim + q * (attn.q_norm is not None) + kv * (attn.k_norm is not None)
    return 2 * dim + (attn.q_lora_rank or 0) + attn.kv_lora_rank


def _mlp(mlp: Any, size: int, wide: int, *, apart: bool) -> int:
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
    shared = 0 if mlp.shared_experts is None else _dense(mlp.shared_experts) - d
    # the input of latent_down without what masked tokens hold, its answer, latent_up's input
    latent = 0 if mlp.latent_down is None else d + 2 * experts.dim
    inputs = d if mlp.latent_down is None else 0  # what goes around a latent space is not kept
    if mlp.shared_experts is not None:
        inputs = d
    numbers = inputs + k * _experts(experts, apart=apart) + shared + latent
    # the router sees the input in fp32 or wider, without what masked tokens hold
    return round(numbers * size) + d * wide + _routing(mlp, wide)


def _experts(experts: Any, *, apart: bool) -> int:
    """Numbers per assignment that routed experts keep, and that adding up keeps of their answers.

    Args:
        experts: with dim, hidden_dim and activation.
        apart: they answer rows that other processes have sent.
    """
    width = (2 if experts.activation.gated else 1) * experts.hidden_dim
    if getattr(experts, "recompute_up", False):
        width = 0
    if getattr(experts, "takes_tokens", False) and not apart:
        return width  # rows are copied again in backward
    if getattr(experts.activation, "gradient", None) is not None:
        return 2 * experts.dim + width
    return 2 * experts.dim + 2 * width


def _working(mlp: Any, num_tokens: int, dtype: torch.dtype, *, hidden: int, on_cpu: bool) -> int:
    """Bytes that a network's backward has beside what was kept.

    The answers' gradient (later the rows once more) and the pre-activation's, and as many times
    the hidden rows as ``hidden`` says: these and their gradient, at the worst. On a CPU those of a
    block of experts alone (``ops.routed_blocks``), and all rows' gradient.
    """
    if not isinstance(mlp, MoE):
        return 0
    experts: Any = mlp.experts
    width = (2 if experts.activation.gated else 1) * experts.hidden_dim
    rows = num_tokens * experts_per_token(mlp.router)
    own = experts.dim + width + hidden * experts.hidden_dim
    if (
        on_cpu
        and getattr(experts, "takes_tokens", False)
        and routed_blocks.takes_blocks(experts.backend, dtype)
    ):
        of_expert = rows / experts.num_experts
        block = of_expert * math.ceil(routed_blocks.ROWS / of_expert)
        if block < rows:
            own = experts.dim + block / rows * (experts.dim + width + 2 * experts.hidden_dim)
    return round(rows * own * dtype.itemsize)


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
    """Bytes per token of a Routing: logits, probs, and for each assignment six numbers."""
    k = experts_per_token(moe.router)
    return round(2 * moe.router.num_experts * wide + k * (4 * _INT + 2 * wide))


def _moving(moe: Any, size: int, *, ep: int, gathers: bool) -> int:
    """Bytes per token of rows that are not saved: at home, as they arrive; or all tokens."""
    d = moe.experts.dim
    return round((2 * ep if gathers else 2 * experts_per_token(moe.router)) * d * size)
