"""A top-k whose k is soft: scores near 1 for what is taken, with a gradient to what is not.

Letters: t tokens · d dim · e num_experts · k experts_per_token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.routers.gate import JitterKind, jittered_logits, make_jitter, real_rows
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routers.scores import check_experts_per_token
from moe_builders.routing import Routing, TokenInfo, route_by_choice


def coordinate_descent(
    values: Tensor,
    *,
    k: float,
    iterations: int = 20,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Scores in [0, 1] that sum to about k along the last dim, higher for higher values.

    Maximises Σ values·scores + eps·entropy under 0 ≤ score ≤ 1 and Σ score = k by adjusting the
    two constraints' multipliers in turn. Every iteration keeps a few tensors of the size of
    ``values`` for backward.

    Args:
        values: [.., e]; the arithmetic is fp32 or wider.
        k: how many are wanted, > 0 and ≤ e; need not be whole.
        iterations: ≥ 1.
        eps: > 0, the softness: towards 0 the scores become those of a hard top-k, but it takes ever
            more iterations, unless one starts soft:
        eps_init: start with this eps if it is larger ...
        eps_decay: ... and multiply it by this after every iteration, down to ``eps``.
        mask: [.., e] bool, False where a value takes no part (it may be NaN): its score is 0.

    Returns:
        [.., e] in the arithmetic's precision.

    Raises:
        InputError: a number out of its range.

    Source: Lei et al. 2023 (2304.04947) section 3.1; Ainslie et al. 2023 (2303.09752).
    """
    _check_numbers(k, values.shape[-1], iterations, eps, eps_init, eps_decay)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if mask is not None:  # here and at the end: what a row without allowed values makes stays in it
        values = torch.where(mask, values, 0)
    log_k, lowest = math.log(k), torch.finfo(values.dtype).min
    now = eps if eps_init is None else max(eps_init, eps)
    row, own = values.new_zeros(()), -values
    for _ in range(iterations):
        shifted = (values + own) / now
        if mask is not None:
            shifted = torch.where(mask, shifted, lowest)
        row = now * (log_k - shifted.logsumexp(-1, keepdim=True))  # [.., 1]
        own = -F.relu(values + row)
        now = max(now * eps_decay, eps)
    scores = ((values + row + own) / now).exp()
    return scores if mask is None else torch.where(mask, scores, 0)


def soft_top_k(
    values: Tensor,
    k: int,
    *,
    k_ratio: float = 9 / 8,
    iterations: int = 20,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """([t, e] scores, [t, k] the best): a little more than k is asked of the scores.

    Args:
        values: [t, e] positive.
        k: experts of a token.
        k_ratio: the scores sum to about min(k·k_ratio, e), so that the next best learn, too.
        iterations, eps, eps_init, eps_decay: of ``coordinate_descent``.
    """
    scores = coordinate_descent(
        values,
        k=min(k * k_ratio, values.shape[-1]),
        iterations=iterations,
        eps=eps,
        eps_init=eps_init,
        eps_decay=eps_decay,
    )
    # many scores are 1, of all that are taken: the values themselves say which are best
    return scores, values.detach().topk(k, dim=-1).indices


class CoordinateDescentRouter(nn.Module):
    """Each token takes its k best experts, weighted by the scores of a soft top-k.

    probs = softmax(gate(x)); scores = ``coordinate_descent`` of the probs; the k best probs are
    selected, their scores are the weights. An expert that is not taken gets a gradient through the
    scores' sum.

    Causal: a token's routing depends on that token alone.

    Args:
        dim: d.
        num_experts: e.
        experts_per_token: k, 1 ≤ k ≤ e.
        k_ratio: ≥ 1; the scores of a token sum to about min(k·k_ratio, e).
        iterations, eps, eps_init, eps_decay: of ``coordinate_descent``.
        normalize_weights: divide a token's weights by their sum (k > 1 only: with k = 1 every
            weight would be 1, without a gradient).
        normalize_eps: what that sum counts for at least.
        route_scale: multiplies the weights at the end.
        jitter, jitter_scale: see ``Jitter``.

    Raises:
        InputError: a number out of its range.

    Source: of the scores see ``coordinate_descent``.
    """

    causal = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        experts_per_token: int,
        k_ratio: float = 9 / 8,
        iterations: int = 20,
        eps: float = 0.1,
        eps_init: float | None = None,
        eps_decay: float = 1.0,
        normalize_weights: bool = True,
        normalize_eps: float = 1e-9,
        route_scale: float = 1.0,
        jitter: JitterKind | None = None,
        jitter_scale: float = 0.0,
    ) -> None:
        super().__init__()
        check_experts_per_token(experts_per_token, num_experts)
        if not k_ratio >= 1:
            raise InputError(f"k_ratio is {k_ratio}, but must be at least 1")
        _check_numbers(experts_per_token, num_experts, iterations, eps, eps_init, eps_decay)
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.k_ratio = k_ratio
        self.iterations = iterations
        self.eps, self.eps_init, self.eps_decay = eps, eps_init, eps_decay
        self.normalize_weights = normalize_weights and experts_per_token > 1
        self.normalize_eps = normalize_eps
        self.route_scale = route_scale
        self.jitter = make_jitter(jitter, jitter_scale)
        self.replay = ReplaySlot()
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are routed nowhere and may hold anything.
        """
        x = real_rows(x, info.mask)
        clean, logits = jittered_logits(self.gate, x, self.jitter, training=self.training)
        probs = logits.softmax(-1)  # [t, e]
        scores, best = soft_top_k(
            probs,
            self.experts_per_token,
            k_ratio=self.k_ratio,
            iterations=self.iterations,
            eps=self.eps,
            eps_init=self.eps_init,
            eps_decay=self.eps_decay,
        )
        expert = info.decided(lambda: self.replay(best))  # [t, k]
        weights = scores.gather(1, expert)  # [t, k]
        if self.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=self.normalize_eps)
        if self.route_scale != 1.0:
            weights = weights * self.route_scale
        return route_by_choice(expert=expert, weights=weights, logits=clean, probs=probs, info=info)


def _check_numbers(
    k: float, e: int, iterations: int, eps: float, eps_init: float | None, eps_decay: float
) -> None:
    if not 0 < k <= e:
        raise InputError(f"k is {k}, but must be above 0 and at most the number of values ({e})")
    if iterations < 1:
        raise InputError(f"iterations is {iterations}, but must be at least 1")
    if not eps > 0 or (eps_init is not None and not eps_init > 0):
        raise InputError(f"eps is {eps} and eps_init {eps_init}, but both must be above 0")
    if not 0 < eps_decay <= 1:
        raise InputError(f"eps_decay is {eps_decay}, but must be above 0 and at most 1")
