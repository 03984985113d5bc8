"""Grouped-query attention with q/k norms before the rotary step.

Letters: b batch · s query positions · c key positions · d dim · n heads · m key/value heads ·
r head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import KVCache

from moe_builders.errors import InputError


class GroupedQueryAttention(nn.Module):
    """Causal self-attention; takes the place of torchtune's ``MultiHeadAttention``.

    It differs from torchtune's in what released MoE models need: norms on q and k before the
    rotary step, head_dim independent of embed_dim, the Hugging Face rotary layout (so no weight
    is ever permuted).

    Args:
        embed_dim: d.
        num_heads: n.
        num_kv_heads: m, divides n.
        head_dim: r.
        rope: positional module (x [b, n, s, r], positions [b, s]) -> same; None: no positions.
        q_norm, k_norm: modules on the last dim r; None: none.
        bias: q, k, v and output projections have biases.

    Raises:
        InputError: num_kv_heads does not divide num_heads.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: nn.Module | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise InputError(
                f"num_kv_heads is {num_kv_heads}, but must divide num_heads ({num_heads})"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.output_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.q_norm, self.k_norm, self.rope = q_norm, k_norm, rope
        self.kv_cache: KVCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Keep keys and values of up to max_seq_len positions between forwards."""
        self.kv_cache = KVCache(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
        )
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Forget what the cache holds."""
        if self.kv_cache is None:
            raise RuntimeError("there is no key/value cache to reset: call setup_caches first")
        self.kv_cache.reset()

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [b, s, d].
            y: torchtune's layer passes x a second time; anything else is refused.
            mask: [b, s, c] or [1, s, c] bool, True = may attend; None: causal.
            input_pos: [b, s] or [s] int positions, also [b] or [] where s is 1 (torchtune's
                ``generate``); None: 0 … s-1.

        Returns:
            [b, s, d].
        """
        if y is not None and y is not x:
            raise InputError("GroupedQueryAttention is self-attention: y must be x or left out")
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(b, s, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(b, s, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [b, n|m, s, r]
        if self.rope is not None:
            positions = torch.arange(s, device=x.device) if input_pos is None else input_pos
            positions = positions.reshape(-1, s)  # [b, s] or [1, s]
            q, k = self.rope(q, positions), self.rope(k, positions)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)  # [b, m, c, r]
        grouped = self.num_kv_heads != self.num_heads
        if mask is not None and grouped:
            # with a mask, GPU kernels other than the one that stores [b, n, s, c] want equal heads
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            enable_gqa=grouped and mask is None,
        )  # [b, n, s, r]
        return self.output_proj(out.transpose(1, 2).flatten(2))
