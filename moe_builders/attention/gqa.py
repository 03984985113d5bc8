"""Grouped-query attention in the forms that released MoE models have.

Letters: b batch · s query positions · c key positions · d dim · n heads · m key/value heads ·
r head_dim.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import KVCache

from moe_builders.errors import InputError
from moe_builders.ops.attend_documents import attend_documents, can_attend_documents
from moe_builders.ops.documents import Documents, whole_rows
from moe_builders.ops.masks import causal_mask, chunk_mask, window_mask

NormWidth = Literal["head", "full"]
NO_CACHE = "documents do not go with a key/value cache: give attention a mask [b, s, c]"


class GroupedQueryAttention(nn.Module):
    """Causal self-attention; takes the place of torchtune's ``MultiHeadAttention``.

    It differs from torchtune's in what released MoE models need: norms on q and k before the
    rotary step, head_dim independent of embed_dim, the Hugging Face rotary layout (so no weight
    is ever permuted), windows, sinks, a softmax scale.

    Args:
        embed_dim: d.
        num_heads: n.
        num_kv_heads: m, divides n.
        head_dim: r.
        rope: positional module (x [b, n, s, r], positions [b, s]) -> same; None: no positions.
        q_norm, k_norm: modules on the last dim; None: none.
        norm_width: what they see: "head", each head's r numbers, or "full", all n·r (m·r).
        norm_after_rope: they follow the rotary step instead of preceding it ("head" only).
        bias: q, k and v projections have biases.
        output_bias: the output projection has one; None: as ``bias``.
        scale: multiplies q·k; None: r^-½.
        window: a query sees this many positions at most, itself included; None: all before it.
        chunk: a query sees only its own run of this many positions; None: all.
        sinks: a learned number per head joins the softmax and takes its share of it.
        clip_qkv: q, k and v (after the norms) are clamped to ± this; None: not.
        query_scale: positions [b|1, s] -> factors [b|1, s] of the queries, which are multiplied
            in the wider of both dtypes; None: none.
        dropout: share of attention weights dropped in training.

    Attributes:
        takes_documents: ``mask`` may be ``Documents``.

    Raises:
        InputError: num_kv_heads does not divide num_heads, a number out of its range, or
            norm_after_rope with norm_width "full".
    """

    takes_documents = True

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
        norm_width: NormWidth = "head",
        norm_after_rope: bool = False,
        bias: bool = False,
        output_bias: bool | None = None,
        scale: float | None = None,
        window: int | None = None,
        chunk: int | None = None,
        sinks: bool = False,
        clip_qkv: float | None = None,
        query_scale: Callable[[Tensor], Tensor] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise InputError(
                f"num_kv_heads is {num_kv_heads}, but must divide num_heads ({num_heads})"
            )
        if head_dim < 1:
            raise InputError(f"head_dim is {head_dim}, but must be at least 1")
        for name, limit in (("window", window), ("chunk", chunk)):
            if limit is not None and limit < 1:
                raise InputError(f"{name} is {limit}, but must be at least 1; leave it out for all")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout is {dropout}, but must be at least 0 and below 1")
        if norm_width not in get_args(NormWidth):
            raise InputError(f"norm_width {norm_width!r} is not one of head, full")
        if norm_after_rope and norm_width == "full":
            raise InputError("norm_after_rope needs norm_width 'head': heads are apart by then")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.output_proj = nn.Linear(
            num_heads * head_dim, embed_dim, bias=bias if output_bias is None else output_bias
        )
        self.q_norm, self.k_norm, self.rope = q_norm, k_norm, rope
        self.norm_width, self.norm_after_rope = norm_width, norm_after_rope
        self.scale, self.window, self.chunk = scale, window, chunk
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.clip_qkv, self.query_scale, self.dropout = clip_qkv, query_scale, dropout
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
        mask: Tensor | Documents | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [b, s, d].
            y: torchtune's layer passes x a second time; anything else is refused.
            mask: [b, s, c] or [1, s, c] bool, True = may attend; documents: nothing between them
                is seen, nor computed where there is a way, and each begins a chunk; None: causal.
            input_pos: [b, s] or [s] int positions, also [b] or [] where s is 1 (torchtune's
                ``generate``); None: 0 … s-1.

        Returns:
            [b, s, d].
        """
        if y is not None and y is not x:
            raise InputError("GroupedQueryAttention is self-attention: y must be x or left out")
        s = x.shape[1]
        positions = torch.arange(s, device=x.device) if input_pos is None else input_pos
        positions = positions.reshape(-1, s)  # [b, s] or [1, s]
        q = self._heads(self.q_proj(x), self.num_heads, self.q_norm)
        k = self._heads(self.k_proj(x), self.num_kv_heads, self.k_norm)
        v = self._heads(self.v_proj(x), self.num_kv_heads, None)  # [b, n|m, s, r]
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        if self.norm_after_rope:
            q = q if self.q_norm is None else self.q_norm(q)
            k = k if self.k_norm is None else self.k_norm(k)
        if self.query_scale is not None:
            q = (q * self.query_scale(positions)[:, None, :, None]).to(q.dtype)
        places = None  # of the queries in the cache
        if self.kv_cache is not None and self.cache_enabled:
            places = self.kv_cache.cache_pos[:s].clone()
            k, v = self.kv_cache.update(k, v)  # [b, m, c, r]
        moved = input_pos is not None
        documents = self._documents(q, mask, places, moved=moved)
        if documents is not None:
            out = attend_documents(
                q, k, v, documents,
                scale=self.scale, window=self.window, chunk=self.chunk, sinks=self.sinks,
            )  # [b, n, s, r]  # fmt: skip
        else:
            if isinstance(mask, Documents):
                positions, moved = mask.positions(rows=x.shape[0], positions=s), True
                mask = mask.mask(rows=x.shape[0], positions=s)
            mask = self._narrowed(mask, positions, k.shape[2], places, moved=moved)
            out = self._attend(q, k, v, mask)  # [b, n, s, r]
        return self.output_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
        """[b, s, heads·r] -> [b, heads, s, r], normalised if that comes before the rotary step."""
        early = norm if norm is not None and not self.norm_after_rope else None
        if early is not None and self.norm_width == "full":
            x, early = early(x), None
        x = x.unflatten(-1, (heads, self.head_dim))
        if early is not None:
            x = early(x)
        if self.clip_qkv is not None:
            x = x.clamp(-self.clip_qkv, self.clip_qkv)
        return x.transpose(1, 2)

    def _documents(
        self, q: Tensor, mask: Tensor | Documents | None, places: Tensor | None, *, moved: bool
    ) -> Documents | None:
        """What attends without a mask; None where one is needed, or causal says all."""
        b, _, s, _ = q.shape
        if isinstance(mask, Documents) and places is not None:
            raise InputError(NO_CACHE)
        dropped = self.training and self.dropout > 0
        if isinstance(mask, Tensor) or places is not None or dropped or not can_attend_documents(q):
            return None
        if mask is None:  # whole rows, in which chunks may begin anywhere if positions are given
            limits = [limit for limit in (self.window, self.chunk) if limit is not None]
            limited = self.sinks is not None or min(limits, default=s) < s
            if not limited or (self.chunk is not None and moved):
                return None
            return whole_rows(b, s, q.device)
        return mask

    def _narrowed(
        self,
        mask: Tensor | None,
        positions: Tensor,
        num_keys: int,
        places: Tensor | None,
        *,
        moved: bool,
    ) -> Tensor | None:
        """The mask with window and chunk in it; None where causal says all.

        A window counts places in the row or in the cache, chunks count positions: each packed
        document begins a chunk.
        """
        s = positions.shape[1]
        rows = torch.arange(num_keys, device=positions.device)[None]  # [1, c]
        queries, key_positions = rows, positions
        if places is not None:  # padding on the left parts places from positions
            queries = places[None]  # [1, s]
            key_positions = rows + positions[:, -1:] - places[-1]  # [b|1, c]
        limits = []
        if self.window is not None and self.window < num_keys:
            limits.append(window_mask(queries, rows, self.window))
        if self.chunk is not None and (moved or self.chunk < num_keys):
            limits.append(chunk_mask(positions, key_positions, self.chunk))
        if mask is None and (limits or places is not None or self.sinks is not None):
            mask = causal_mask(queries, rows)
        for limit in limits:
            mask = limit if mask is None else mask & limit
        assert mask is None or mask.shape[1] == s
        return mask

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[b, n, s, r], [b, m, c, r] twice, [b|1, s, c] -> [b, n, s, r]."""
        grouped = self.num_kv_heads != self.num_heads
        if mask is not None and grouped:
            # with a mask, GPU kernels other than the one that stores [b, n, s, c] want equal heads
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k, v))
        scale = self.scale
        if self.sinks is not None:
            assert mask is not None
            scale = self.head_dim**-0.5 if scale is None else scale
            q, k, v, mask = _with_sinks(q, k, v, mask, self.sinks / scale)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[:, None],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped and mask is None,
        )
        return out[..., : self.head_dim]


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One more key that all queries see, with score ``sinks`` [n] (before the scale), value 0.

    A dim is added in which queries are 1, keys 0 and the sink's key its number, so that any
    attention kernel serves and its backward gives the sinks their gradient. Heads grow by 8, a
    multiple that fast kernels accept.
    """
    b, n, _, r = k.shape
    one = q.new_zeros(8)
    one[0] = 1
    q = torch.cat((q, one.expand(b, n, q.shape[2], 8)), dim=-1)
    key = torch.cat((q.new_zeros(n, r), sinks.to(q.dtype)[:, None], q.new_zeros(n, 7)), dim=-1)
    k = torch.cat((F.pad(k, (0, 8)), key[None, :, None].expand(b, n, 1, r + 8)), dim=2)
    v = F.pad(v, (0, 8, 0, 1))
    return q, k, v, F.pad(mask, (0, 1), value=True)
