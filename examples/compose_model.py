"""A model of one's own: expert-choice routing with shared experts, from moe_builders' parts.

    cd examples && tune run moe_full_finetune --config compose_model.yaml

Any class with the Router signature (see moe_builders/routing.py) can stand in the router's place.
"""

from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.moe import MoE, moe_experts, shared_experts
from moe_builders.routers import ExpertChoiceTopKRouter


def expert_choice_decoder(
    *, vocab_size: int, embed_dim: int = 128, num_layers: int = 2, num_experts: int = 8,
    capacity_factor: float = 2.0, max_seq_len: int = 512,
) -> MoEDecoder:  # fmt: skip
    """Each expert picks its best tokens; one shared expert sees them all.

    In evaluation and generation, where later tokens are not to be looked at, an expert takes what
    reaches its cutoff, which it learned while it picked.
    """
    rope = RotaryEmbedding(head_dim=32, base=10_000.0)
    attention = GroupedQueryAttention(
        embed_dim=embed_dim, num_heads=4, num_kv_heads=2, head_dim=32, rope=rope)  # fmt: skip

    def mlp(layer: int) -> nn.Module:
        return MoE(
            router=ExpertChoiceTopKRouter(
                dim=embed_dim, num_experts=num_experts, capacity_factor=capacity_factor,
                inference="threshold_ema"),
            experts=moe_experts(
                embed_dim=embed_dim, expert_hidden_dim=64, num_experts=num_experts),
            shared_experts=shared_experts(embed_dim=embed_dim, shared_hidden_dim=64),
        )  # fmt: skip

    return moe_decoder(
        vocab_size=vocab_size, embed_dim=embed_dim, num_layers=num_layers, num_heads=4,
        head_dim=32, max_seq_len=max_seq_len, attention=attention, mlp=mlp)  # fmt: skip
