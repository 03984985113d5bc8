"""Multi-head latent attention: keys and values of all heads come from one narrow vector a position.

Letters: b batch · s query positions · c key positions · d dim · n heads · z latent width ·
p head dims without positions · r rotary head dims · w head dims of a value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import KVCache

from moe_builders.attention.gqa import NO_CACHE
from moe_builders.attention.rope import RotaryEmbedding, yarn_mscale
from moe_builders.errors import InputError
from moe_builders.ops.attend_documents import attend_documents, can_attend_documents
from moe_builders.ops.documents import Documents
from moe_builders.ops.masks import causal_mask


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention of DeepSeek-V2 and V3, Kimi-K2, Moonlight, GLM-4.7-Flash.

    A position's keys and values are a projection of a normalised latent [z]; its rotary key [r] is
    one for all heads. A head's query and key are p dims without positions, then r rotary ones;
    its value has w. Queries may come from a latent of their own.

    Args:
        embed_dim: d.
        num_heads: n.
        q_lora_rank: width of the queries' latent; None: one projection, without a norm.
        kv_lora_rank: z.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: p, r, w.
        rope: positional module (x [b, n or 1, s, r], positions [b or 1, s]) -> same; None: no
            positions.
        scale: of the scores; None: (p + r)^-½. For YaRN's mscale² see ``score_scale``.
        norm_eps: of the norms of the latents. Releases: 1e-6, whatever ``rms_norm_eps`` says.
        bias: of the projections from d down and of the output; those up from a latent, and q_proj,
            never have one.

    Attributes:
        head_dim: p + r.
        takes_documents: ``mask`` may be ``Documents``.

    Raises:
        InputError: a size below 1.

    Source: DeepSeek-V2 (2405.04434) section 2.1; transformers ``DeepseekV3Attention``.
    """

    takes_documents = True

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: nn.Module | None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(
            embed_dim=embed_dim,
            num_heads=num_heads,
            q_lora_rank=1 if q_lora_rank is None else q_lora_rank,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
        )
        self.num_heads, self.q_lora_rank, self.kv_lora_rank = num_heads, q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.head_dim, self.v_head_dim = qk_nope_head_dim + qk_rope_head_dim, v_head_dim
        self.scale = self.head_dim**-0.5 if scale is None else scale
        q_width = num_heads * self.head_dim
        if q_lora_rank is None:
            self.q_proj = nn.Linear(embed_dim, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(embed_dim, q_lora_rank, bias=bias)
            self.q_a_norm = nn.RMSNorm(q_lora_rank, eps=norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, q_width, bias=False)
        self.kv_a_proj = nn.Linear(embed_dim, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_norm = nn.RMSNorm(kv_lora_rank, eps=norm_eps)
        self.kv_b_proj = nn.Linear(
            kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False
        )
        self.output_proj = nn.Linear(num_heads * v_head_dim, embed_dim, bias=bias)
        self.rope = rope
        self.kv_cache: KVCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Keep latents and rotary keys (z + r numbers a position) between forwards."""
        cache = KVCache(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            num_kv_heads=1,
            head_dim=self.kv_lora_rank,
            dtype=dtype,
        )
        # torchtune gives both one width; latents stand in the keys' place, rotary keys here
        shape = (batch_size, 1, max_seq_len, self.qk_rope_head_dim)
        cache.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.kv_cache = cache
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
                is seen, nor computed where there is a way; None: causal.
            input_pos: [b, s] or [s] int positions, also [b] or [] where s is 1 (torchtune's
                ``generate``); None: 0 … s-1.

        Returns:
            [b, s, d].
        """
        if y is not None and y is not x:
            raise InputError("MultiHeadLatentAttention is self-attention: y must be x or left out")
        b, s, _ = x.shape
        q = self._queries(x).view(b, s, self.num_heads, self.head_dim).transpose(1, 2)
        latent, k_turned = self.kv_a_proj(x)[:, None].split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )  # [b, 1, s, z], [b, 1, s, r]
        latent = self.kv_a_norm(latent)
        if self.rope is not None:
            positions = torch.arange(s, device=x.device) if input_pos is None else input_pos
            positions = positions.reshape(-1, s)  # [b, s] or [1, s]
            plain, turned = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
            q = torch.cat((plain, self.rope(turned, positions)), dim=-1)  # [b, n, s, p + r]
            k_turned = self.rope(k_turned, positions)
        if self.kv_cache is not None and self.cache_enabled:
            if isinstance(mask, Documents):
                raise InputError(NO_CACHE)
            places = self.kv_cache.cache_pos[None, :s].clone()  # of the queries in the cache
            latent, k_turned = self.kv_cache.update(latent, k_turned)  # [b, 1, c, z], [b, 1, c, r]
            if mask is None:
                mask = causal_mask(places, torch.arange(latent.shape[2], device=x.device)[None])
        k_plain, v = (
            self.kv_b_proj(latent[:, 0])
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)
            .split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        )  # [b, n, c, p], [b, n, c, w]
        k = torch.cat((k_plain, k_turned.expand(-1, self.num_heads, -1, -1)), dim=-1)
        out = attend(q, k, v, mask=mask, scale=self.scale)  # [b, n, s, w]
        return self.output_proj(out.transpose(1, 2).flatten(2))

    def _queries(self, x: Tensor) -> Tensor:
        """[b, s, d] -> [b, s, n·(p + r)], not turned yet."""
        if self.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))


def score_scale(head_dim: int, rope: RotaryEmbedding) -> float:
    """Scale of the scores: head_dim^-½, times mscale² where the rotary scaling has mscale_all_dim.

    Args:
        head_dim: p + r.
        rope: tells scaling and factor.

    Source: transformers ``DeepseekV2Attention``, for any rope_type but the default one.
    """
    mscale = rope.rule.get("mscale_all_dim") or 0
    stretch = yarn_mscale(rope.rule["factor"], mscale) if mscale else 1.0
    return head_dim**-0.5 * stretch**2


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | Documents | None, scale: float
) -> Tensor:
    """Softmax attention whose values may be of another width than its keys.

    Args:
        q, k: [b, n, s, u] and [b, n, c, u].
        v: [b, n, c, w].
        mask: [b, s, c] or [1, s, c] bool, True = may attend; documents; None: causal.
        scale: of the scores.

    Returns:
        [b, n, s, w].
    """
    width = v.shape[-1]
    if isinstance(mask, Documents):
        wide = equal_widths(q, k, v)
        if can_attend_documents(wide[0]):
            return attend_documents(*wide, documents=mask, scale=scale)[..., :width]
        mask = mask.mask(rows=q.shape[0], positions=q.shape[2])
    if q.is_cpu:  # its fused kernel takes equal widths only; the other one stores [b, n, s, c]
        q, k, v = equal_widths(q, k, v)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None,
        scale=scale,
    )
    return out[..., :width]


def equal_widths(*tensors: Tensor) -> list[Tensor]:
    """Zeros behind the last dim of each, up to the widest: in q and k they change no score."""
    width = max(t.shape[-1] for t in tensors)
    return [t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in tensors]


def _check_sizes(**sizes: int) -> None:
    wrong = ", ".join(f"{name} is {size}" for name, size in sizes.items() if size < 1)
    if wrong:
        raise InputError(f"sizes of an attention must be at least 1, but {wrong}")
