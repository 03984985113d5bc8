"""Every router of the package and what is claimed of it: one line a router (or a way to use one).

A new router gets a line here; tests/routers/test_causality.py then holds it to the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers import randomise
from torch import Tensor, nn

from moe_builders.routers import (
    CoordinateDescentRouter,
    ExpertChoiceTopKRouter,
    ForcedBalanceRouter,
    HashRouter,
    SinkhornRouter,
    ThresholdRouter,
    TokenChoiceTopKRouter,
)
from moe_builders.routing import LearningRouter, Routing, TokenInfo

DIM, EXPERTS = 6, 8


@dataclass(frozen=True)
class RouterCase:
    """A way to use a router, and what is claimed of it.

    Attributes:
        make: (dim, num_experts) -> the router as it is trained.
        causal_training, causal_eval: whether a token's routing depends on nothing after it;
            causal_eval None: the router refuses to be evaluated.
        needs_input_ids: it routes by vocabulary ids.
        has_gate: a gate is trained through the weights.
    """

    make: Callable[[int, int], nn.Module]
    causal_training: bool
    causal_eval: bool | None
    needs_input_ids: bool = False
    has_gate: bool = True
    # what a token gets depends on how many real tokens there are, too (capacity)
    given_length: bool = False
    # a decoder gives the same logits token by token; None: as causal_eval says
    generates: bool | None = None


def token_choice(**changes):
    def make(dim, num_experts):
        arguments = {"experts_per_token": 2} | changes
        return TokenChoiceTopKRouter(dim=dim, num_experts=num_experts, **arguments)

    return make


def expert_choice(**changes):
    def make(dim, num_experts):
        arguments = {"capacity_factor": 2.0} | changes
        return ExpertChoiceTopKRouter(dim=dim, num_experts=num_experts, **arguments)

    return make


def of(router_class, **changes):
    def make(dim, num_experts):
        arguments = {"experts_per_token": 2} | changes
        return router_class(dim=dim, num_experts=num_experts, **arguments)

    return make


GROUPS = {"num_groups": 4, "groups_per_token": 2}
IN_DOCUMENTS = {"scope": "sequence", "max_experts_per_token": 4}

ROUTERS = {
    "token choice": RouterCase(token_choice(), True, True),
    "token choice, one expert": RouterCase(token_choice(experts_per_token=1), True, True),
    "token choice, sigmoid": RouterCase(token_choice(score_function="sigmoid"), True, True),
    "token choice, topk_softmax": RouterCase(
        token_choice(score_function="topk_softmax"), True, True
    ),
    "token choice, groups": RouterCase(
        token_choice(score_function="sigmoid", expert_bias=True, **GROUPS), True, True
    ),
    "token choice, biases": RouterCase(token_choice(expert_bias=True, gate_bias=True), True, True),
    "expert choice, bare": RouterCase(expert_choice(), False, None),
    "expert choice, leak allowed": RouterCase(
        expert_choice(allow_noncausal_eval=True), False, False
    ),
    "expert choice, cutoffs": RouterCase(expert_choice(inference="threshold_ema"), False, True),
    "expert choice, predictor": RouterCase(expert_choice(inference="predictor"), False, True),
    "expert choice, bce": RouterCase(expert_choice(inference="bce"), False, True),
    "expert choice, documents": RouterCase(
        expert_choice(scope="sequence", allow_noncausal_eval=True), False, False
    ),
    "expert choice, documents, cutoffs, four at most": RouterCase(
        expert_choice(inference="threshold_ema", **IN_DOCUMENTS), False, True
    ),
    "expert choice, documents, bce, four at most": RouterCase(
        expert_choice(inference="bce", **IN_DOCUMENTS), False, True
    ),
    "threshold": RouterCase(
        of(ThresholdRouter, policy="threshold", threshold=0.4, capacity_factor=None), True, True
    ),
    "threshold, three of it": RouterCase(
        of(
            ThresholdRouter,
            policy="threshold",
            experts_per_token=3,
            threshold=(0.3, 0.2),
            capacity_factor=None,
        ),
        True,
        True,
    ),
    "threshold, capacity": RouterCase(
        of(ThresholdRouter, policy="all", capacity_factor=1.0, min_capacity=1),
        True,
        True,
        given_length=True,
    ),
    "threshold, capacity by rank": RouterCase(
        of(
            ThresholdRouter,
            policy="all",
            capacity_factor=1.0,
            min_capacity=1,
            slot_order="rank_major",
        ),
        False,
        True,
    ),
    "threshold, coordinate descent": RouterCase(
        of(ThresholdRouter, policy="all", capacity_factor=None, differentiable_topk=True),
        True,
        True,
    ),
    "coordinate descent": RouterCase(of(CoordinateDescentRouter), True, True),
    "sinkhorn": RouterCase(of(SinkhornRouter), False, True),
    "sinkhorn, documents": RouterCase(of(SinkhornRouter, per_sequence=True), False, True),
    "sinkhorn, select only": RouterCase(of(SinkhornRouter, select_only=True), False, True),
    "hash": RouterCase(of(HashRouter), True, True, needs_input_ids=True),
    # by a token's number in the batch: where that is the same, whatever follows
    "forced balance": RouterCase(
        of(ForcedBalanceRouter), True, True, has_gate=False, generates=False
    ),
    "forced balance, noise": RouterCase(
        of(ForcedBalanceRouter, noise=0.5), True, True, has_gate=False, generates=False
    ),
}


def router_in_mode(name: str, *, training: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A case's router with random weights, after one step of learning if it learns from steps."""
    router = randomise(ROUTERS[name].make(DIM, EXPERTS)).to(dtype)
    learn_from(router, torch.randn(64, DIM, dtype=dtype), info_of(64))
    return router.train(training)


def learn_from(router: nn.Module, x: Tensor, info: TokenInfo) -> None:
    """One training forward on x [t, d], and what a step's end does with it."""
    if isinstance(router, LearningRouter):
        with torch.no_grad():
            router.learn(router.tally(router(x, info)))


def info_of(t: int, mask: Tensor | None = None, *, documents: int = 1) -> TokenInfo:
    """Documents of nearly equal length one after another, and some vocabulary ids."""
    ids = torch.arange(t) * documents // max(t, 1)
    return TokenInfo(mask=mask, sequence_ids=ids, input_ids=torch.arange(t) * 7 % 17)


def losses_of(routing: Routing) -> Tensor:
    """Something of everything that carries a gradient: weights, logits, probs, own loss."""
    mask = routing.info.mask
    total = routing.weights.square().sum()
    for part in (routing.logits, routing.probs):
        real = part if mask is None else torch.where(mask[:, None], part, 0)
        total = total + real.square().sum()
    if routing.own_loss is not None:
        total = total + routing.own_loss.sum()
    return total
