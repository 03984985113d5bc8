"""Queries that grow with their position, so that attention over long contexts stays sharp."""

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError


class PositionTemperature(nn.Module):
    """Factor 1 + strength · ln(1 + ⌊(position + 1) / floor⌋) of a query.

    It is 1 for the first ``floor`` - 1 positions. Use it as ``query_scale`` of attention without
    rotary positions; what counts is the position in the document, as it is where the document
    stands alone.

    Args:
        floor: positions in a step of the factor. [floor_scale]
        strength: what it grows by. [attn_scale]

    Raises:
        InputError: floor below 1.

    Source: Nakanishi 2025 (2501.19399); transformers ``Llama4TextAttention``.
    """

    def __init__(self, *, floor: int, strength: float) -> None:
        super().__init__()
        if floor < 1:
            raise InputError(f"floor is {floor}, but must be at least 1 (Llama 4: 8192)")
        self.floor, self.strength = floor, strength

    def forward(self, positions: Tensor) -> Tensor:
        """[b, s] int -> [b, s] fp32."""
        steps = torch.floor((positions.float() + 1) / self.floor)
        return steps.log1p() * self.strength + 1
