"""A small decoder with everything in it, and batches that end in padding."""

import torch
from helpers import randomise
from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.moe import moe_layer, shared_experts
from moe_builders.routing import TokenInfo

V, D = 17, 12


def attention(layer):
    return GroupedQueryAttention(
        embed_dim=D,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rope=RotaryEmbedding(head_dim=6, base=1000.0),
        q_norm=nn.RMSNorm(6, eps=1e-6),
        k_norm=nn.RMSNorm(6, eps=1e-6),
    )


def mlp(layer):
    if layer == 1:
        return shared_experts(embed_dim=D, shared_hidden_dim=16)
    return moe_layer(
        embed_dim=D,
        expert_hidden_dim=8,
        num_experts=4,
        experts_per_token=2,
        shared_hidden_dim=8 if layer else None,
    )


def decoder_of(dtype=torch.float32, **changes) -> MoEDecoder:
    """MoE, dense, MoE with shared experts."""
    arguments = {
        "vocab_size": V,
        "embed_dim": D,
        "num_layers": 3,
        "num_heads": 4,
        "head_dim": 6,
        "max_seq_len": 32,
        "attention": attention,
        "mlp": mlp,
    }
    model = moe_decoder(**(arguments | changes))
    return randomise(model).to(dtype)


def batch(b=2, s=10, *, seed=1):
    """Tokens and their TokenInfo; each row ends in padding."""
    stream = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (b, s), generator=stream)
    lengths = torch.randint(s // 2, s, (b, 1), generator=stream)
    mask = torch.arange(s) < lengths
    rows = torch.arange(b).repeat_interleave(s)
    return tokens, TokenInfo(mask=mask.flatten(), sequence_ids=rows, input_ids=tokens.flatten())
