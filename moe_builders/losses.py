"""Router losses as pure functions of a Routing, and the language-model loss as a sum.

Letters: t tokens · e num_experts · k experts_per_token · l layers with experts · b, s, v batch,
sequence, vocabulary.

Every router loss is a sum over real tokens divided by ``num_tokens``. Give the step's total there
and the values of all micro-batches and ranks add up to the loss of one big batch; leave it out and
a single routing is averaged by itself. Masked tokens count in nothing.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_builders.counts import (
    Choices,
    Counted,
    count_assignments,
    count_kept,
    count_rows,
)
from moe_builders.errors import InputError
from moe_builders.ops.cross_entropy import IGNORE_INDEX
from moe_builders.routing import Routing

Scope = Literal["sequence", "micro", "global"]


def load_balancing_loss(
    routing: Routing,
    *,
    scope: Scope,
    counts: Tensor | None = None,
    num_tokens: Tensor | int | None = None,
    on: Counted = "assigned",
    choices: Choices = "all",
) -> Tensor:
    """Balancing loss e · Σ_j f_j · P_j of one layer: 1 when balanced.

    f_j is the share of a scope's assignments that went to expert j (from the selection itself; no
    gradient), P_j the mean score of expert j over the scope's tokens. Where all tokens take the
    same k experts with all of their score it is e/k: e when one expert takes all.

    ``choices="first"`` is ST-MoE's form: f_j is the share of tokens whose best expert is j.
    ``on="kept"`` takes dropped choices out of f_j, but not out of what it is a share of: an expert
    that is full then costs no more, which is why the original under-penalises collapse.

    Args:
        routing: one layer's decision.
        scope: over what f is counted. "sequence": each document by itself (exact under any split
            into micro-batches and ranks). "micro": this routing as it is. "global": ``counts``.
        counts: [e] assignments per expert of the whole scope, with scope "global" only.
        num_tokens: what the sum over tokens is divided by; default: the real tokens here.
        on: "assigned": choices before any was dropped; "kept": those that were not.
        choices: "all", or each token's "first".

    Returns:
        Scalar in the routing's precision; carries gradient through ``probs`` only.

    Raises:
        InputError: unknown scope, counts given or missing against the scope, ``on`` or ``choices``
            with counts, or first choices where tokens do not choose.

    Source: Fedus et al. 2021 (2101.03961) eq. 4–6; sequence scope: DeepSeek-V3 (2412.19437)
    eq. 17–20; global scope: Qiu et al. 2025 (2501.11873); first choices: Zoph et al. 2022
    (2202.08906).
    """
    _check_words(scope=(scope, Scope), on=(on, Counted), choices=(choices, Choices))
    if (counts is not None) != (scope == "global"):
        raise InputError("scope 'global' takes counts [e] of the whole scope; the others take none")
    if counts is not None and (on, choices) != ("assigned", "all"):
        raise InputError(
            f"scope 'global' uses its counts as they are, but on is {on!r} and choices is "
            f"{choices!r}: leave these out"
        )
    t, e = routing.probs.shape
    mask = routing.info.mask
    if counts is None:
        documents = _documents(routing) if scope == "sequence" else None
        counted = count_rows(routing, documents, on=on, choices=choices)  # [r, e]
        whole = counted
        if on == "kept":
            whole = count_rows(routing, documents, on="assigned", choices=choices)
        share = counted.to(routing.probs.dtype) / whole.sum(-1, keepdim=True).clamp(min=1)  # [r, e]
        if documents is not None:
            share = share[documents]  # [t, e] each token's row is its document's f
    else:
        share = counts.to(routing.probs.dtype) / counts.sum().clamp(min=1)  # [e]
    per_token = e * (routing.probs * share).sum(-1)  # [t]
    return _masked_sum(per_token, mask) / _divisor(num_tokens, mask, t)


def mse_balancing_loss(
    routing: Routing, *, scope: Scope, num_tokens: Tensor | int | None = None
) -> Tensor:
    """Mean over experts of (usage - 1/e)², usage being the mean score: 0 when balanced.

    It sees scores alone, not what was selected: alike scores are balanced whoever wins.

    Args:
        routing: one layer's decision.
        scope: over what the mean score is taken: "sequence" (each document by itself, weighted by
            its tokens) or "micro" (this routing as it is).
        num_tokens: what the sum over tokens is divided by; default: the real tokens here.

    Raises:
        InputError: another scope.
    """
    if scope not in ("sequence", "micro"):
        raise InputError(f"the mse form's scope is {scope!r}, but must be sequence or micro")
    t, e = routing.probs.shape
    mask = routing.info.mask
    probs = routing.probs if mask is None else torch.where(mask[:, None], routing.probs, 0)
    real = torch.ones(t, device=probs.device, dtype=torch.int64) if mask is None else mask.long()
    if scope == "micro":
        sums, tokens = probs.sum(0, keepdim=True), real.sum().view(1)  # [1, e], [1]
    else:
        documents = _documents(routing)
        empty = torch.zeros(t, dtype=torch.int64, device=probs.device)
        order = documents.sort(stable=True).indices
        # summed run by run, in order: adding into cells has no fixed order on a GPU
        lengths = empty.scatter_add(0, documents, torch.ones_like(empty))  # [t]
        sums = torch.segment_reduce(probs[order], "sum", lengths=lengths, axis=0, unsafe=True)
        tokens = empty.scatter_add(0, documents, real)
    usage = sums / tokens.clamp(min=1)[:, None]
    per_row = (usage - 1 / e).square().mean(-1) * tokens  # rows without a token: 0
    return per_row.sum() / _divisor(num_tokens, mask, t)


def pooled_load_balancing_loss(
    routings: Sequence[Routing], *, on: Counted = "assigned", num_tokens: Tensor | int | None = None
) -> Tensor:
    """The balancing loss over all layers at once, as transformers' models define it: k if balanced.

    Counts and scores of all layers are added up before they are multiplied, so that layers which
    collapse onto different experts look balanced together. It is here to continue a run with the
    loss that it began with; ``load_balancing_loss`` layer by layer has no such blind spot.

    Args:
        routings: one a layer, of the same tokens.
        on: "assigned": choices before any was dropped; "kept": those that were not.
        num_tokens: the value counts as so many tokens' share of it; default: it is the mean.

    Raises:
        InputError: layers with different numbers of experts.
    """
    if len({routing.probs.shape[1] for routing in routings}) != 1:
        raise InputError("layers have different numbers of experts, so their loads cannot be added")
    t, e = routings[0].probs.shape
    mask = routings[0].info.mask
    count = count_assignments if on == "assigned" else count_kept
    counts = torch.stack([count(routing) for routing in routings]).sum(0)  # [e]
    scores = torch.stack([score_sums(routing) for routing in routings]).sum(0)  # [e]
    tokens = _divisor(None, mask, t)
    rows = tokens * len(routings)
    value = e * (counts.to(scores.dtype) / rows * (scores / rows)).sum()
    return value if num_tokens is None else value * (tokens / num_tokens)


def router_z_loss(routing: Routing, *, num_tokens: Tensor | int | None = None) -> Tensor:
    """Mean over real tokens of the squared log-sum-exp of the logits.

    Args:
        routing: one layer's decision.
        num_tokens: what the sum over tokens is divided by; default: the real tokens here.

    Source: Zoph et al. 2022 (2202.08906) eq. 5.
    """
    logits, mask = routing.logits, routing.info.mask
    if mask is not None:  # before the logarithm: its gradient at a NaN would be NaN, even times 0
        logits = torch.where(mask[:, None], logits, 0)
    per_token = logits.logsumexp(-1).square()  # [t]
    return _masked_sum(per_token, mask) / _divisor(num_tokens, mask, per_token.shape[0])


def router_own_loss(routing: Routing, *, num_tokens: Tensor | int | None = None) -> Tensor:
    """Mean over real tokens of what the router itself asks for; 0 where it asks for nothing.

    Args:
        routing: one layer's decision.
        num_tokens: what the sum over tokens is divided by; default: the real tokens here.
    """
    if routing.own_loss is None:
        return routing.probs.new_zeros(())
    mask, t = routing.info.mask, routing.own_loss.shape[0]
    return _masked_sum(routing.own_loss, mask) / _divisor(num_tokens, mask, t)


def attach_loss(tensor: Tensor, loss: Tensor) -> Tensor:
    """``tensor``, unchanged, whose backward also sends the gradient of ``loss`` on its way.

    For places where a loss cannot be returned (a pipeline's stage, a layer of somebody else's). The
    gradients are those of adding ``loss`` to whatever is differentiated, with factor 1 however
    that is scaled: put coefficient and scale into ``loss``. A recomputation adds nothing.

    Args:
        tensor: any tensor on the way to what is differentiated.
        loss: scalar.

    Raises:
        InputError: loss is not a scalar.
    """
    if loss.dim() != 0:
        raise InputError(f"a loss to attach must be a scalar, but its shape is {[*loss.shape]}")
    return _Attach.apply(tensor, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.like = {"dtype": loss.dtype, "device": loss.device}
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.ones((), **ctx.like)


def score_sums(routing: Routing, dtype: torch.dtype | None = None) -> Tensor:
    """[e] sum of the scores over real tokens; over their number it is the experts' usage.

    Args:
        routing: one layer's decision.
        dtype: to add up in; None: the routing's own.
    """
    mask = routing.info.mask
    probs = routing.probs if mask is None else torch.where(mask[:, None], routing.probs, 0)
    return probs.sum(0, dtype=dtype)


def cross_entropy_sum(logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """Sum over labelled tokens of -log p(label), in nats; 0 when none is labelled.

    Args:
        logits: [b, s, v], or chunks of it along s.
        labels: [b, s] int, the token to predict at each position; IGNORE_INDEX = none.

    Returns:
        [] in fp32, or fp64 for fp64.
    """
    chunks = [logits] if isinstance(logits, Tensor) else logits
    own = labels.split([chunk.shape[1] for chunk in chunks], dim=1)
    sums = [
        F.cross_entropy(
            chunk.flatten(0, -2).to(torch.promote_types(chunk.dtype, torch.float32)),
            each.flatten(), ignore_index=IGNORE_INDEX, reduction="sum",
        )
        for chunk, each in zip(chunks, own, strict=True)
    ]  # fmt: skip
    return torch.stack(sums).sum()


def _check_words(**given: tuple[str, Any]) -> None:
    for name, (word, known) in given.items():
        if word not in get_args(known):
            raise InputError(f"{name} {word!r} is not one of {', '.join(get_args(known))}")


def _documents(routing: Routing) -> Tensor:
    """[t] int64 in [0, t), the document of each token."""
    ids = routing.info.sequence_ids
    t = routing.probs.shape[0]
    return (
        torch.zeros(t, dtype=torch.int64, device=routing.probs.device)
        if ids is None
        else ids.long()
    )


def _masked_sum(per_token: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of real tokens; selected, not multiplied: a masked token may hold NaN."""
    return per_token.sum() if mask is None else torch.where(mask, per_token, 0).sum()


def _divisor(num_tokens: Tensor | int | None, mask: Tensor | None, t: int) -> Tensor | int:
    if num_tokens is not None:
        return num_tokens
    return t if mask is None else mask.sum().clamp(min=1)
