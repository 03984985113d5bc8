"""What is told of the experts' products is what happens; a back end for a whole model."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, gradients, randomise
from torch import nn

from moe_builders.dispatch import Assigned, dispatch_locally
from moe_builders.errors import InputError
from moe_builders.experts import ExpertList, GroupedExperts
from moe_builders.experts.backends import (
    CHOICES,
    describe_backend,
    product_ways,
    set_backend,
)
from moe_builders.experts.grouped import BACKENDS
from moe_builders.ops import grouped_mm as products
from moe_builders.ops.activations import ACTIVATIONS, Activation
from moe_builders.ops.permute import sort_by_expert

CPU, GPU = torch.device("cpu"), torch.device("cuda")
E, K, T = 4, 2, 13
OWN = Activation("mine", True, ACTIVATIONS["swiglu"].function)


def experts_of(d=8, h=12, **more):
    return randomise(GroupedExperts(dim=d, hidden_dim=h, num_experts=E, **more))


def assigned_tokens():
    found = sort_by_expert(torch.rand(T, E).topk(K).indices, E, torch.rand(T, K) > 0.2)
    weights = torch.rand(T * K)
    return Assigned(
        found.token_index, found.num_tokens_per_expert, found.slot_of, output_weights=weights
    )


class Spy:
    """Counts the products that were really called, by the names of their ways."""

    def __init__(self, monkeypatch):
        self.seen = Counter()
        self._watch(monkeypatch, F, "grouped_mm", "grouped")
        for name in ("rounded_mm", "rounded_weight_grad"):
            self._watch(monkeypatch, products, name, "rounded")
        for name in ("padded_mm", "padded_weight_grad"):
            self._watch(monkeypatch, products, name, "bmm")
        self._watch(monkeypatch, torch, "mm", "mm")

    def _watch(self, monkeypatch, where, name, way):
        inner = getattr(where, name)

        def watched(*args, **kwargs):
            self.seen[way] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(where, name, watched)

    def ways(self):
        """A loop is a product for each of the E experts."""
        found = Counter({name: n for name, n in self.seen.items() if name != "mm"})
        if self.seen["mm"] and not self.seen["rounded"]:
            assert self.seen["mm"] % E == 0
            found["loop"] = self.seen["mm"] // E
        return found


SIZES = [(8, 12), (16, 32), (8, 6), (6, 8), (8, 7), (12, 20), (24, 4), (5, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("backend", ["auto", "loop", "bmm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "h"), SIZES)
def test_every_product_goes_the_way_that_is_told(monkeypatch, d, h, dtype, backend):
    for more in ({}, {"recompute_up": True}, {"activation": "gelu"}, {"activation": OWN}):
        experts = experts_of(d, h, backend=backend, **more).to(dtype)
        told = product_ways(experts, device=CPU, dtype=dtype)
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            x = torch.randn(T, d, dtype=dtype, requires_grad=True)
            dispatch_locally(x, assigned_tokens(), experts).sum().backward()
        assert spy.ways() == Counter(way.name for way in told.values()), more


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_what_is_asked_for_is_done_also_where_auto_would_not(monkeypatch, dtype):
    experts = experts_of(16, 32, backend="grouped").to(dtype)
    spy = Spy(monkeypatch)
    x = torch.randn(T, 16, dtype=dtype, requires_grad=True)
    dispatch_locally(x, assigned_tokens(), experts).sum().backward()
    assert spy.seen["grouped"] == 6
    told = product_ways(experts, device=CPU, dtype=dtype).values()
    assert set(told) == {("grouped", "the back end is grouped")}


def gpu_of(monkeypatch, capability):
    """There is a GPU of that capability, as far as anybody asks."""
    if capability is not None:
        properties = SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_halves_on_a_gpu_need_sizes_that_a_cpu_does_not(monkeypatch):
    """The decision is a function of dtype and strides: what a GPU does needs no GPU to be told."""
    gpu_of(monkeypatch, (9, 0))
    half = {"device": GPU, "dtype": torch.bfloat16}
    names = [way.name for way in product_ways(experts_of(16, 24), **half).values()]
    assert names == ["grouped"] * 6
    ways = product_ways(experts_of(16, 12), **half)
    assert {name for name, way in ways.items() if way.name == "loop"} == {
        "down", "gradient of hidden", "gradient of down",
    }  # fmt: skip
    reason = "rows of 12 numbers in bf16 are no multiple of 16 bytes"
    assert {way.reason for way in ways.values() if way.name == "loop"} == {reason}
    told = describe_backend(experts_of(16, 12), **half)
    assert f"3 of 6 by a loop over experts ({reason})" in told
    assert "3 of 6 by torch's grouped product (it takes dtype and strides; one kernel on" in told


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "told"),
    [
        (GPU, torch.bfloat16, (9, 0), "one kernel on this GPU"),
        (GPU, torch.bfloat16, (8, 0), "on this GPU a loop inside torch that waits for the counts"),
        (GPU, torch.float32, (9, 0), "on this GPU a loop inside torch that waits for the counts"),
    ],
)
def test_what_torchs_product_is_there(monkeypatch, device, dtype, capability, told):
    gpu_of(monkeypatch, capability)
    line = describe_backend(experts_of(16, 24), device=device, dtype=dtype)
    assert line.startswith(
        f"experts' products: torch's grouped product (it takes dtype and strides; {told});"
    )
    assert "there is no GPU" not in line


def test_what_a_cpu_does():
    experts = experts_of(16, 24)
    assert describe_backend(experts, device=CPU, dtype=torch.float32) == (
        "experts' products: a loop over experts (a CPU multiplies one expert after the other); "
        "rows by plain torch (there is no GPU)"
    )
    assert describe_backend(
        experts_of(16, 24, backend="grouped"), device=CPU, dtype=torch.float32
    ).startswith(
        "experts' products: torch's grouped product (the back end is grouped; on a CPU a loop "
        "inside torch); rows"
    )


@pytest.mark.parametrize(
    ("triton", "capability", "dtype", "told"),
    [
        (True, (9, 0), torch.bfloat16, "rows by Triton (there is a GPU)"),
        (False, (9, 0), torch.bfloat16, "rows by plain torch (Triton is not installed)"),
        (True, (7, 5), torch.float32, "rows by plain torch (Triton compiles for no GPU as old as"),
        (True, (9, 0), torch.float64, "rows by plain torch (there are no kernels for"),
    ],
)
def test_what_passes_over_rows(monkeypatch, triton, capability, dtype, told):
    gpu_of(monkeypatch, capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if triton else None)
    assert told in describe_backend(experts_of(16, 24), device=GPU, dtype=dtype)


def test_experts_that_are_told_otherwise():
    on = {"device": CPU, "dtype": torch.float32}
    assert "'mine' is your own" in describe_backend(experts_of(activation=OWN), **on)
    assert "summed apart (dropout is 0.1)" in describe_backend(experts_of(dropout=0.1), **on)
    assert "(the back end is loop)" in describe_backend(experts_of(backend="loop"), **on)
    networks = ExpertList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert describe_backend(networks, **on) == "experts compute as their class ExpertList does"
    with torch.device("meta"):
        assert "a loop over experts" in describe_backend(experts_of(), **on)
    with pytest.raises(InputError, match=r"multiple of 16 bytes, got torch\.float64"):
        describe_backend(experts_of(backend="grouped"), device=CPU, dtype=torch.float64)


def test_each_back_end_gives_the_same():
    wanted, x, assigned = experts_of(), torch.randn(T, 8), assigned_tokens()
    found = {}
    for backend in CHOICES:
        if backend == "liger":
            continue
        model = nn.ModuleDict({"experts": experts_of()})
        model.load_state_dict(nn.ModuleDict({"experts": wanted}).state_dict())
        set_backend(model, backend=backend, recompute_up=backend == "bmm")
        experts = model["experts"]
        assert experts.backend == backend
        assert experts.recompute_up == (backend == "bmm")
        tokens = x.clone().requires_grad_()
        y = dispatch_locally(tokens, assigned, experts)
        y.square().sum().backward()
        found[backend] = {"y": y, "x": tokens.grad, **gradients(experts)}
    for backend, values in found.items():
        for name, value in values.items():
            assert_near(value, found["loop"][name], 1e-5, f"{backend} {name}")


def test_what_was_built_otherwise_stays():
    model = nn.ModuleList([experts_of(backend="loop"), experts_of(recompute_up=True)])
    set_backend(model)
    assert [m.backend for m in model] == ["loop", "auto"]
    set_backend(model, recompute_up=True)
    assert [(m.backend, m.recompute_up) for m in model] == [("loop", True), ("auto", True)]
    model = nn.ModuleList([experts_of(backend="loop"), experts_of(recompute_up=True)])
    set_backend(model, backend="bmm")
    assert [(m.backend, m.recompute_up) for m in model] == [("bmm", False), ("bmm", True)]
    set_backend(nn.Linear(2, 2))  # nothing is asked for
    assert set(CHOICES) == set(BACKENDS) - {"gather"}


@pytest.mark.parametrize(
    ("experts", "wanted", "message"),
    [
        (lambda: nn.Linear(2, 2), {"backend": "loop"},
         "^expert_backend=loop is for GroupedExperts, but the model has none: leave it out$"),
        (lambda: nn.Linear(2, 2), {"recompute_up": True}, "^recompute_up=true is for GroupedExp"),
        (lambda: experts_of(activation=OWN), {"recompute_up": True},
         "own, 'mine': leave recompute_up out$"),
        (experts_of, {"backend": "fast"}, "^backend 'fast' is not one of auto, grouped, loop, bmm"),
    ],
)  # fmt: skip
def test_refused(experts, wanted, message):
    with pytest.raises(InputError, match=message):
        set_backend(nn.ModuleDict({"inner": experts()}), **wanted)
