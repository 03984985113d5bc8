"""Routing that ignores the tokens: perfectly even, or uneven by a known amount, for benchmarks.

Letters: t tokens · d dim · e num_experts · k experts_per_token · n experts that are not skipped.
"""

import math

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.routers.gate import gate_logits, real_rows
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routers.scores import check_experts_per_token
from moe_builders.routing import Routing, TokenInfo, route_by_choice

WORD = 0xFFFFFFFF  # 32 bits


class ForcedBalanceRouter(nn.Module):
    """Experts in turn, whatever the tokens are; how a model runs when its load is known.

    The i-th real token goes to experts skip + (i · k + j) mod n, j = 0 … k - 1, each with the
    weight 1/k: loads differ by one at most. With ``noise`` experts and weights are drawn. Some
    experts are then liked better than others; largest load over mean load is about 1.2 with noise
    0.1, 1.6 with 0.3, 2.0 with 0.5 and 2.8 with 1 (8 of 64 experts a token; more with more).

    The draw is made of x: equal x, equal routing, so that a recomputation and a second forward
    agree, and another batch is routed otherwise. It is a hash of the bits of the first real token's
    first four elements, and of each token's and expert's number, in integers on x's own device: no
    random stream is used up and nothing is read on the host. A compiled model may round x otherwise
    and so draw otherwise.

    Causal: only the number of real tokens before a token and the first one count.

    The gate is there so that checkpoints load, its cost is paid and its losses can be watched. The
    weights do not come from it: the language-model loss gives it no gradient.

    Args:
        dim: d.
        num_experts: e.
        experts_per_token: k, 1 ≤ k ≤ e.
        noise: from 0 (even, weights 1/k) to 1 (weights drawn altogether).
        skip_first_n_experts: these get nothing, ≥ 0; the other n = e - skip must be at least k.

    Raises:
        InputError: a number out of its range.

    Source: the formulas of NeMo Automodel's balanced benchmarking gate; the draw is our own.
    """

    causal = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        experts_per_token: int,
        noise: float = 0.0,
        skip_first_n_experts: int = 0,
    ) -> None:
        super().__init__()
        check_experts_per_token(experts_per_token, num_experts)
        if not 0 <= noise <= 1:
            raise InputError(f"noise is {noise}, but must lie between 0 and 1")
        most = num_experts - experts_per_token
        if not 0 <= skip_first_n_experts <= most:
            raise InputError(
                f"skip_first_n_experts is {skip_first_n_experts}, but must lie between 0 and {most}"
                f", so that {experts_per_token} of {num_experts} experts are left for a token"
            )
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.noise = noise
        self.skip_first_n_experts = skip_first_n_experts
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.replay = ReplaySlot()

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are routed nowhere and not counted: padding changes nothing.
        """
        logits = gate_logits(self.gate, real_rows(x, info.mask))  # [t, e]
        if info.mask is None:
            before = torch.arange(x.shape[0], device=x.device)  # [t] real tokens before each
        else:
            real = info.mask.long()
            before = real.cumsum(0) - real
        if self.noise == 0:
            choice = torch.arange(self.experts_per_token, device=x.device)  # [k]
            expert = before[:, None] * self.experts_per_token + choice  # [t, k]
            own = expert % (self.num_experts - self.skip_first_n_experts)
            weights = torch.full_like(own, 1, dtype=logits.dtype) / self.experts_per_token
        else:
            # the bits of x decide all: a recomputation's may be others
            key = info.decided(lambda: _content_key(x.detach(), info.mask))  # []
            own, weights = self._draw(key, before, logits.dtype)
        expert = info.decided(lambda: self.replay(own + self.skip_first_n_experts))
        return route_by_choice(
            expert=expert, weights=weights, logits=logits, probs=logits.softmax(-1), info=info
        )

    def _draw(self, key: Tensor, before: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[t, k] experts before any is skipped, and their weights."""
        k, n = self.experts_per_token, self.num_experts - self.skip_first_n_experts
        liking = _uniform(key, torch.arange(n, device=key.device), stream=1)  # [n]
        liking = math.sqrt(2) * torch.erfinv(2 * liking - 1)  # N(0, 1)
        cells = before[:, None] * n + torch.arange(n, device=key.device)  # [t, n]
        scores = _uniform(key, cells, stream=2) + 0.1 * self.noise * liking
        expert = scores.topk(k, dim=-1).indices  # [t, k]
        drawn = _uniform(key, cells[:, :k], stream=3).to(dtype)  # [t, k]
        drawn = drawn / drawn.sum(-1, keepdim=True)
        return expert, (1 - self.noise) / k + self.noise * drawn


def _content_key(x: Tensor, mask: Tensor | None) -> Tensor:
    """[] int64, a 32-bit number made of the first real token's first four elements."""
    if x.shape[0] == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    if mask is not None:  # the first True; a masked token's content must not count
        x = x.index_select(0, mask.long().argmax(0, keepdim=True))  # [1, d]
    bits = x[0, :4].float().contiguous().view(torch.int32).long() & WORD
    key = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in bits.unbind():
        key = _mix(key ^ part)
    return key


def _uniform(key: Tensor, counter: Tensor, *, stream: int) -> Tensor:
    """A number in (0, 1) for each counter, fp32; another for each stream."""
    return _fraction(_mix(_mix(counter & WORD) ^ _mix(key + stream & WORD)))


def _fraction(word: Tensor) -> Tensor:
    """A 32-bit number's upper 23 bits as fp32 in (0, 1).

    With one bit more the largest would round to 1, whose normal variate is infinite.
    """
    return ((word >> 9).float() + 0.5) / 2**23


def _mix(word: Tensor) -> Tensor:
    """Scatter 32-bit numbers, held in int64: every bit in changes about half of the bits out.

    Both factors are below 2^31, so that no product leaves int64.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD
    return word ^ (word >> 15)
