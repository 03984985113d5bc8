"""Rotary position embedding in both Hugging Face layouts, with every kind of scaling.

Letters: b batch · s sequence · n heads · h dims of a head · r rotary dims of a head (even, ≤ h).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_builders.attention.rope_scaling import (
    SCALING_KEYS,
    attention_factor,
    checked_scaling,
    inverse_frequency,
    is_number,
    yarn_mscale,
)
from moe_builders.errors import InputError

__all__ = ["SCALING_KEYS", "RotaryEmbedding", "yarn_mscale"]


class RotaryEmbedding(nn.Module):
    """Rotate pairs of dims of each head by position · frequency: base^(-2i/r) for pair i of r/2.

    No table of positions is kept: angles are computed for the positions at hand, so that any
    length costs nothing. Only the r/2 frequencies are a (non-persistent) buffer, always
    fp32; after building on the meta device call ``rope_init``, as for torchtune's own.

    Two rope_types depend on the length of the sequences: ``dynamic`` (without alpha) stretches the
    base beyond max_seq_len, ``longrope`` has other factors beyond the original context. The length
    is that of the forward at hand, the largest of all its positions + 1, found on the device and
    kept nowhere: what a fresh model of transformers computes. So the longest row of a batch
    decides for all of its rows. In packed rows positions start anew with each document: the longest
    document of the micro-batch decides, not the length of the row, and a short document packed
    beside a long one is turned otherwise than it would be alone. A batch whose sequences are cut
    between processes would need the length of the whole. In generation, keys that a cache
    holds keep the frequencies of the step that stored them; transformers' dynamic scaling also
    remembers the longest length seen.

    Args:
        head_dim: h.
        base: the wavelength base (HF: ``rope_theta``).
        scaling: HF's ``rope_scaling`` or ``rope_parameters`` without rope_theta and
            partial_rotary_factor; its keys: ``SCALING_KEYS``. None: default.
        fraction: the first r = int(h · fraction) dims are turned, the others pass
            (HF: ``partial_rotary_factor``).
        interleaved: pairs are (2i, 2i + 1), else (i, i + r/2). The output keeps the layout of x.
        max_seq_len: the config's ``max_position_embeddings`` (not a run's sequence length); read by
            dynamic, and by yarn, llama3 and longrope where the scaling lacks the original length
            or the factor.
        in_fp32: turn in fp32 and cast back, also fp64; else in x's dtype, to which cos and sin,
            always made in fp32, are cast.

    Attributes:
        attention_factor: what cos and sin are multiplied by (yarn, longrope; else 1).

    Raises:
        InputError: an odd number of rotary dims, fraction outside (0, 1], base not above 1,
            a wrong scaling.

    Source: Su et al. 2021 (2104.09864) eq. 34, in the layout of transformers ``rotate_half``.
    """

    inverse_frequency: Tensor
    long_inverse_frequency: Tensor

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        scaling: Mapping[str, Any] | None = None,
        fraction: float = 1.0,
        interleaved: bool = False,
        max_seq_len: int | None = None,
        in_fp32: bool = False,
    ) -> None:
        super().__init__()
        if not is_number(fraction) or not 0 < fraction <= 1:
            raise InputError(
                f"the rotary fraction of a head is {fraction!r}, but must be above 0 and at most 1"
            )
        if not is_number(base) or base <= 1:
            raise InputError(f"the rotary base is {base!r}, but must be above 1 (HF: rope_theta)")
        dims = int(head_dim * fraction)
        if dims < 2 or dims % 2:
            turned = "" if fraction == 1 else f" and {dims} of it (fraction {fraction}) are turned"
            raise InputError(
                f"head_dim is {head_dim}{turned}, but rotary embedding needs an even number"
            )
        if max_seq_len is not None and max_seq_len < 1:
            raise InputError(
                f"max_seq_len is {max_seq_len}, but must be at least 1 "
                f"(HF: max_position_embeddings)"
            )
        self.head_dim, self.base, self.dims = head_dim, base, dims
        self.interleaved, self.in_fp32 = interleaved, in_fp32
        self.rule = checked_scaling(scaling, dims=dims, max_seq_len=max_seq_len)
        self.attention_factor = attention_factor(self.rule)
        self.register_buffer("inverse_frequency", torch.empty(dims // 2), persistent=False)
        if self.rule["rope_type"] == "longrope":
            self.register_buffer("long_inverse_frequency", torch.empty(dims // 2), persistent=False)
        self.rope_init()

    def rope_init(self) -> None:
        """Fill the frequencies [r/2], fp32, on whatever device the buffer is."""
        device = self.inverse_frequency.device
        self.inverse_frequency = self._frequencies_on(device)
        if self.rule["rope_type"] == "longrope":
            self.long_inverse_frequency = self._frequencies_on(device, long=True)

    def _frequencies_on(
        self, device: torch.device, *, length: Tensor | None = None, long: bool = False
    ) -> Tensor:
        dims, base = self.dims, self.base
        return inverse_frequency(
            self.rule, dims=dims, base=base, device=device, length=length, long=long
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Follow ``.to(...)``, but keep the frequencies exact: bf16 ones lose far positions."""
        super()._apply(fn, recurse)
        self.rope_init()
        return self

    def _frequencies(self, positions: Tensor) -> Tensor:
        """[r/2] for sequences as long as these positions tell."""
        kind = self.rule["rope_type"]
        if kind not in ("dynamic", "longrope") or "alpha" in self.rule:
            return self.inverse_frequency
        length = positions.max() + 1
        if kind == "longrope":
            limit = self.rule["original_max_position_embeddings"]
            beyond = self.long_inverse_frequency
        else:
            limit = self.rule["max_seq_len"]
            beyond = self._frequencies_on(positions.device, length=length)
        return torch.where(length > limit, beyond, self.inverse_frequency)

    def _spread(self, per_pair: Tensor, dtype: torch.dtype) -> Tensor:
        """Cos or sin [b, s, r/2] of each pair to both of its dims: [b, 1, s, r]."""
        if self.attention_factor != 1:
            per_pair = per_pair * self.attention_factor
        both = per_pair.repeat_interleave(2, -1) if self.interleaved else per_pair.repeat(1, 1, 2)
        return both[:, None].to(dtype)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """Each pair (u, v) -> (-v, u)."""
        if self.interleaved:
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((-second, first), dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate.

        Args:
            x: [b, n, s, h].
            positions: [b, s] or [1, s] int.
        """
        turned = x if self.dims == self.head_dim else x[..., : self.dims]
        if self.in_fp32:
            turned = turned.float()
        angles = positions[:, :, None].float() * self._frequencies(positions)  # [b, s, r/2]
        cos = self._spread(angles.cos(), turned.dtype)  # [b, 1, s, r]
        sin = self._spread(angles.sin(), turned.dtype)
        quarter = self._quarter_turn(turned)  # first: backward then adds gradients as laid out here
        turned = (turned * cos + quarter * sin).to(x.dtype)
        if self.dims == self.head_dim:
            return turned
        return torch.cat((turned, x[..., self.dims :]), dim=-1)
