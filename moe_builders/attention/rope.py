"""Rotary position embedding in the half-rotated (Hugging Face) layout.

Letters: b batch · s sequence · n heads · r rotary dims of a head (even).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError


class RotaryEmbedding(nn.Module):
    """Rotate pairs (i, i + r/2) of each head by position · base^(-2i/r).

    No table of positions is kept: angles are computed for the positions at hand, so that any
    ``max_seq_len`` costs nothing. Only the r/2 frequencies are a (non-persistent) buffer, always
    fp32; after building on the meta device call ``rope_init``, as for torchtune's own.

    Args:
        head_dim: r.
        base: the wavelength base (HF: ``rope_theta``).

    Source: Su et al. 2021 (2104.09864) eq. 34, in the layout of transformers ``rotate_half``.
    """

    def __init__(self, *, head_dim: int, base: float) -> None:
        super().__init__()
        if head_dim % 2:
            raise InputError(f"head_dim is {head_dim}, but rotary embedding needs an even number")
        self.head_dim, self.base = head_dim, base
        self.register_buffer("inverse_frequency", torch.empty(head_dim // 2), persistent=False)
        self.rope_init()

    def rope_init(self) -> None:
        """Fill the frequencies [r/2], fp32, on whatever device the buffer is."""
        device = self.inverse_frequency.device
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float()
        self.inverse_frequency = 1.0 / (self.base ** (exponent / self.head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Follow ``.to(...)``, but keep the frequencies exact: bf16 ones lose far positions."""
        super()._apply(fn, recurse)
        self.rope_init()
        return self

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate.

        Args:
            x: [b, n, s, r].
            positions: [b, s] or [1, s] int.
        """
        angles = positions[:, :, None].float() * self.inverse_frequency  # [b, s, r/2]
        cos = angles.cos().repeat(1, 1, 2)[:, None].to(x.dtype)  # [b, 1, s, r]
        sin = angles.sin().repeat(1, 1, 2)[:, None].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin
