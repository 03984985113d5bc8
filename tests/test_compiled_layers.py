"""Compiled layers: one graph each, and none compiled again whatever routers choose."""

import pytest
import torch
from helpers import assert_near, gradients
from helpers_decoder import D, V, batch, decoder_of
from helpers_routers import ROUTERS

from moe_builders.decisions import Decisions
from moe_builders.experts import GroupedExperts
from moe_builders.moe import MoE, collect_routing

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = (
    "token choice", "token choice, groups", "expert choice, predictor", "threshold, capacity",
    "coordinate descent", "hash",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def model_of(name, dtype, mode):
    def mlp(_):
        router = ROUTERS[name].make(D, 8)
        return MoE(router=router, experts=GroupedExperts(dim=D, hidden_dim=8, num_experts=8))

    model = decoder_of(dtype, num_layers=1, mlp=mlp)
    model.activation_checkpointing, model.ac_mode = mode is not None, mode or "full"
    return model


def step(model, tokens, info):
    logits = model(tokens, info=info)
    logits.float().square().mean().backward()
    (routing,) = collect_routing(model).values()
    return logits.detach(), gradients(model), routing.num_tokens_per_expert.tolist()


def recompiles(model, name, mode):
    """How many graphs the first step makes; the steps after it must make none."""
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    loads, first = set(), 0
    for seed in range(4):
        tokens, info = batch(seed=seed)
        *_, load = step(model, tokens, info)
        loads.add(tuple(load))
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        first = first or made
        assert made == first, f"{name}, {mode}: step {seed} compiled again"
    assert len(loads) > 1, "all batches were routed alike"
    return first


@pytest.mark.parametrize("mode", [None, "full", "selective"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_one_graph_whatever_is_chosen(dtype, mode):
    """Also of a recomputation, which takes over decisions."""
    assert recompiles(model_of("token choice", dtype, mode), "token choice", mode) == 1


@pytest.mark.parametrize("name", KINDS[1:])
def test_other_routers_are_one_graph_too(name):
    assert recompiles(model_of(name, BF16, None), name, None) == 1


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_compiled_layers_give_the_eager_numbers(mode):
    name = "threshold, capacity"
    eager, compiled = model_of(name, FP32, mode), model_of(name, FP32, mode)
    for layer in compiled.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    tokens, info = batch()
    assert tokens.max() < V
    (logits, grads, load), (got, got_grads, got_load) = (
        step(model, tokens, info) for model in (eager, compiled)
    )
    assert load == got_load
    assert_near(got, logits, 1e-5)
    for key, value in grads.items():
        assert_near(got_grads[key], value, 1e-5, key)


def test_a_compiled_recomputation_takes_over_what_was_decided(monkeypatch):
    """The gate is changed between forward and backward: what is recomputed would choose anew."""
    model = model_of("token choice", FP32, "full")
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    seen, swap = [], Decisions.swap

    def noting(self, chosen, place):
        seen.append((chosen.clone(), swap(self, chosen, place)))
        return seen[-1][1].clone()

    monkeypatch.setattr(Decisions, "swap", noting)
    tokens, info = batch()
    loss = model(tokens, info=info).square().mean()
    model.layers[0].mlp.router.gate.weight.data.neg_()
    loss.backward()
    (first, given), (again, given_again) = seen
    assert torch.equal(first, given)
    assert not torch.equal(again, first)
    assert torch.equal(given_again, given)
