"""A small decoder for the recipe whose layers all have one given kind of router."""

from helpers_decoder import D, decoder_of

from moe_builders.instantiate import find_component
from moe_builders.moe import MoE, moe_experts


def decoder(*, vocab_size, router, **arguments):
    """``router`` is a class's dotted name, ``arguments`` are its own."""
    build = find_component(router, path="router")

    def mlp(layer):
        return MoE(
            router=build(dim=D, num_experts=4, experts_per_token=2, **arguments),
            experts=moe_experts(embed_dim=D, expert_hidden_dim=8, num_experts=4),
        )

    return decoder_of(vocab_size=vocab_size, num_layers=2, mlp=mlp)
