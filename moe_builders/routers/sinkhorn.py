"""Token choice under a transport plan that loads all experts alike (Sinkhorn).

Letters: t tokens · d dim · e num_experts · k experts_per_token · r rows of the dual: 1, or t where
each document has its own.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.ops.segments import segment_logsumexp, segment_spread
from moe_builders.routers.gate import (
    JitterKind,
    check_precision,
    jittered_logits,
    make_jitter,
    real_rows,
)
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routers.scores import check_experts_per_token
from moe_builders.routing import Routing, TokenInfo, route_by_choice


class SinkhornRouter(nn.Module):
    """Each token takes its k best experts of a plan that gives every expert the same mass.

    In training the logits z are scaled to a plan P[t, e] with row sums 1/t and column sums 1/e:
    u = log(1/t) - lse_e(z + v), v = log(1/e) - lse_t(z + u). A row of P times t is
    softmax(z + v), so all that is sought is v: a bias per expert, found anew for every batch. It is
    good enough when the largest max|e · Σ_t P - 1| is below ``tolerance``. The k best entries of a
    row are selected and are its weights. In evaluation: softmax(z), as plain token choice.

    **Not causal in training**: v depends on all tokens of the batch (or of the document), later
    ones included. Training and evaluation also differ in their weights.

    Masked tokens take no part, whatever they hold; their logits and probs are 0.

    Balances itself: a balancing loss would pull at the same logits with another aim.

    Time and memory: on an accelerator all ``max_iterations`` are computed, since asking whether it
    is enough would wait for the device; what comes after convergence is thrown away by selection.
    Unless ``select_only`` each iteration keeps about two [t, e] for backward.

    Args:
        dim: d.
        num_experts: e.
        experts_per_token: k, 1 ≤ k ≤ e.
        tolerance: largest relative error of an expert's mass, > 0.
        max_iterations: at most so many corrections of v, ≥ 1. Logits far apart need more: noise of
            standard deviation 2 took 6, 20 took over 40.
        select_only: the plan selects, without a gradient, and softmax(z) weighs.
        per_sequence: every document of ``info.sequence_ids`` has equal column sums of its own. A
            document of few tokens is then spread over the experts whatever its logits say.
        normalize_weights: divide a token's weights by their sum (k > 1; a single weight of 1 would
            carry no gradient).
        gate_bias: the gate has a bias of its own, 0 at first. The plan does not see it (v takes it
            back), the softmax does.
        jitter, jitter_scale: noise in training, see ``gate.Jitter``.
        gate_precision: "fp32", "fp64" or "bf16"; None: fp32, or fp64 for fp64 inputs.

    Attributes:
        balances_itself: True.

    The routing's ``probs`` are what the weights come from: rows of P times t in training, softmax
    with ``select_only`` and in evaluation.

    Raises:
        InputError: a number out of its range.

    Source: Clark et al. 2022 (2202.01169) section 3 (S-BASE); Cuturi 2013 (1306.0895); Megatron's
    form is ``select_only``.
    """

    balances_itself = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        experts_per_token: int,
        tolerance: float = 0.01,
        max_iterations: int = 30,
        select_only: bool = False,
        per_sequence: bool = False,
        normalize_weights: bool = True,
        gate_bias: bool = False,
        jitter: JitterKind | None = None,
        jitter_scale: float = 0.0,
        gate_precision: str | None = None,
    ) -> None:
        super().__init__()
        check_experts_per_token(experts_per_token, num_experts)
        if not 0 < tolerance < math.inf:
            raise InputError(f"tolerance is {tolerance}, but must be above 0 (0.01 is 1 %)")
        if max_iterations < 1:
            raise InputError(f"max_iterations is {max_iterations}, but must be at least 1")
        check_precision(gate_precision)
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.select_only = select_only
        self.per_sequence = per_sequence
        self.normalize_weights = normalize_weights and experts_per_token > 1
        self.jitter = make_jitter(jitter, jitter_scale)
        self.gate_precision = gate_precision
        self.gate = nn.Linear(dim, num_experts, bias=gate_bias)
        if gate_bias:
            nn.init.zeros_(self.gate.bias)  # no expert is preferred before anything is learned
        self.replay = ReplaySlot()

    @property
    def causal(self) -> bool:
        """In evaluation a token's routing depends on that token alone; in training on all."""
        return not self.training

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: masked tokens are routed nowhere and count in no mass; ``sequence_ids`` matters
                with ``per_sequence``.
        """
        x = real_rows(x, info.mask)
        logits, noisy = jittered_logits(
            self.gate, x, self.jitter, training=self.training, precision=self.gate_precision
        )  # [t, e] each
        if info.mask is not None:  # of the gate's bias and of noise
            logits, noisy = (torch.where(info.mask[:, None], z, 0) for z in (logits, noisy))
        probs = plan = noisy.softmax(-1)
        if self.training:
            sequence_ids = info.sequence_ids if self.per_sequence else None
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.select_only):
                plan = balanced_log_probs(
                    noisy,
                    mask=info.mask,
                    sequence_ids=sequence_ids,
                    tolerance=self.tolerance,
                    max_iterations=self.max_iterations,
                    decided=info.decided,
                ).exp()
            probs = probs if self.select_only else plan
        k, wishes = self.experts_per_token, plan.detach()
        expert = info.decided(lambda: self.replay(wishes.topk(k, dim=-1).indices))  # [t, k]
        weights = probs.gather(1, expert)  # [t, k]
        if self.normalize_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if info.mask is not None:
            probs = torch.where(info.mask[:, None], probs, 0)
        return route_by_choice(
            expert=expert, weights=weights, logits=logits, probs=probs, info=info
        )


def balanced_log_probs(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    tolerance: float,
    max_iterations: int,
    decided: Callable[[Callable[[], Tensor]], Tensor] = lambda choose: choose(),
) -> Tensor:
    """log softmax(logits + v), v such that every expert's mean over the tokens is 1/e.

    All in the log domain, so that logits of ±1e4 stay finite. The rows sum to 1 exactly, the
    columns within ``tolerance`` unless ``max_iterations`` came first. A token that is alone has
    nothing to be balanced with: its v stays 0.

    Args:
        logits: [t, e], finite.
        mask: [t] bool, the tokens that have mass; the others' rows are normalised by the same v.
        sequence_ids: [t] int in [0, t), a v for each document; None: one for all.
        tolerance: v is kept as it is once max|e · mean - 1| is below it.
        max_iterations: at most so many corrections of v.
        decided: ``TokenInfo.decided``: a recomputation makes as many corrections.

    Returns:
        [t, e]; carries the gradient through all corrections.
    """
    t, e = logits.shape
    segment = None if sequence_ids is None else sequence_ids.long()
    count = _count(t, mask, segment, logits)  # [r, 1]
    level = -math.log(e)
    v = logits.new_zeros(1 if segment is None else t, e)  # [r, e]
    # on the host's own tensors asking costs nothing
    may_stop = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    for _ in range(max_iterations):
        mass = _log_mass(_log_rows(logits, v, segment), mask, segment)  # [r, e]
        mean = torch.where(count > 0, mass - count.clamp(min=1).log(), level)
        # one token alone would be given to all experts alike: rounding would choose among them
        enough = decided(functools.partial(_enough, mean.detach(), tolerance)) | (count <= 1)
        if may_stop and bool(enough.all()):
            break
        v = torch.where(enough, v, v + level - mean)
    return _log_rows(logits, v, segment)


def _enough(mean: Tensor, tolerance: float) -> Tensor:
    """[r, e] logarithms of the experts' mean masses -> [r, 1] bool."""
    off = (mean + math.log(mean.shape[-1])).expm1().abs()
    return (off < tolerance).all(-1, keepdim=True)


def _log_rows(logits: Tensor, v: Tensor, segment: Tensor | None) -> Tensor:
    return (logits + (v if segment is None else segment_spread(v, segment))).log_softmax(-1)


def _log_mass(log_rows: Tensor, mask: Tensor | None, segment: Tensor | None) -> Tensor:
    """log Σ over the tokens with mass: [t, e] -> [r, e]."""
    if segment is not None:
        return segment_logsumexp(log_rows, segment, mask)
    if mask is not None:
        # not -inf: a column of nothing else has no gradient but NaN
        log_rows = torch.where(mask[:, None], log_rows, torch.finfo(log_rows.dtype).min)
    return log_rows.logsumexp(0, keepdim=True)


def _count(t: int, mask: Tensor | None, segment: Tensor | None, like: Tensor) -> Tensor:
    """[r, 1] the tokens with mass."""
    real = torch.ones(t, dtype=torch.int64, device=like.device) if mask is None else mask.long()
    if segment is None:
        return real.sum().to(like.dtype).view(1, 1)
    counts = torch.zeros_like(real).index_add(0, segment, real)  # [t]
    return counts.to(like.dtype)[:, None]
