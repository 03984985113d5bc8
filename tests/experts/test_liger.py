"""Liger's experts: what its function is given, by a stand-in that computes plainly; refusals.

The real kernels: tests/gpu/test_liger_kernels.py.
"""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from helpers import assert_near, gradients, randomise

from moe_builders.dispatch import Assigned, dispatch_locally
from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts, liger
from moe_builders.experts.backends import describe_backend, set_backend
from moe_builders.ops.activations import ACTIVATIONS, Activation
from moe_builders.ops.permute import sort_by_expert

T, K, E, D, H = 11, 3, 5, 8, 6
NAN = float("nan")


class StandIn:
    """What Liger's function computes, choice by choice: dead choices are unknown to it."""

    @staticmethod
    def apply(x, up, down, ids, weights):
        assert ids.dtype == torch.int32
        assert ids.shape == weights.shape == (x.shape[0], ids.shape[1])
        assert 0 <= int(ids.min()) <= int(ids.max()) < up.shape[0]
        gate, value = torch.einsum("td,tkwd->tkw", x, up[ids.long()]).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * value
        rows = torch.einsum("tkh,tkdh->tkd", hidden, down[ids.long()])
        return (weights[..., None].to(x.dtype) * rows).sum(1)


@pytest.fixture
def on_cpu(monkeypatch):
    module = ModuleType("liger_kernel.ops.fused_moe")
    module.LigerFusedMoEFunction = StandIn
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger, "_DEVICES", ("cuda", "cpu"))


def experts_of(**more):
    return randomise(GroupedExperts(**({"dim": D, "hidden_dim": H, "num_experts": E} | more)))


def assigned_tokens(live=None, *, weights=True):
    found = sort_by_expert(torch.rand(T, E).topk(K).indices, E, live)
    given = torch.rand(T * K).requires_grad_() if weights else None
    return Assigned(
        found.token_index, found.num_tokens_per_expert, found.slot_of, output_weights=given
    )


def run(experts, x, assigned, grad):
    x = x.clone().requires_grad_()
    experts.zero_grad()
    y = dispatch_locally(x, assigned, experts)
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad, **gradients(experts)}
    if assigned.output_weights is not None:
        found["weights"], assigned.output_weights.grad = assigned.output_weights.grad, None
    return found


@pytest.mark.parametrize("dead", ["none", "some", "all"])
@pytest.mark.parametrize("weights", [True, False])
def test_equals_our_own(on_cpu, dead, weights):
    live = {"none": None, "some": torch.rand(T, K) > 0.3, "all": torch.zeros(T, K, dtype=bool)}[
        dead
    ]
    if dead == "some":
        live[2:5] = False  # masked tokens, which may hold anything
    assigned = assigned_tokens(live, weights=weights)
    x, grad = torch.randn(T, D), torch.randn(T, D)
    if live is not None:
        x[~live.any(-1)] = NAN
        grad[~live.any(-1)] = NAN
    theirs = experts_of(backend="liger")
    own = experts_of()
    own.load_state_dict(theirs.state_dict())
    wanted, found = (run(each, x, assigned, grad) for each in (own, theirs))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].isfinite().all(), name
        assert_near(found[name], value, 1e-5, name)


def test_dead_choices_are_dealt_out(on_cpu, monkeypatch):
    seen, inner = [], StandIn.apply
    monkeypatch.setattr(StandIn, "apply", lambda *a: seen.append(a[3]) or inner(*a))
    experts = experts_of(backend="liger")
    dispatch_locally(torch.randn(T, D), assigned_tokens(torch.zeros(T, K, dtype=bool)), experts)
    counts = seen[0].flatten().bincount(minlength=E)
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"activation": "geglu"}, "the activation geglu"),
        ({"activation": Activation("swiglu", True, lambda z: z)}, "the activation your own"),
        ({"activation": replace(ACTIVATIONS["gelu"])}, "the activation gelu"),
        ({"bias": True}, "biases"),
        ({"hidden_scale": True}, "hidden_scale"),
        ({"dropout": 0.1}, "dropout"),
        ({"recompute_up": True}, "recompute_up"),
    ],
)
def test_experts_that_it_does_not_compute(on_cpu, more, what):
    message = f"^the back end 'liger' computes plain SwiGLU experts, but these have {what}: set the"
    with pytest.raises(InputError, match=message):
        experts_of(backend="liger", **more)
    with pytest.raises(InputError, match=message):
        set_backend(experts_of(**more), backend="liger")


def test_routings_that_it_does_not_compute(on_cpu):
    experts, x, assigned = experts_of(backend="liger"), torch.randn(T, D), assigned_tokens()
    weights = torch.ones(T * K)
    for other, message in (
        (replace(assigned, slot_of=None), "takes tokens that each choose as many experts"),
        (replace(assigned, input_weights=weights), "weighs the experts' answers alone"),
        (replace(assigned, row_weights=weights), "weighs the experts' answers alone"),
    ):
        with pytest.raises(InputError, match=f"^the back end 'liger' {message}"):
            dispatch_locally(x, other, experts)
    with pytest.raises(InputError, match=r"^the back end 'liger' takes tokens that each choose"):
        experts(x[assigned.token_index], assigned.num_tokens_per_expert)


def test_where_it_does_not_compute(on_cpu, monkeypatch):
    with pytest.raises(InputError, match=r"bf16, fp16 or fp32, but tokens are torch\.float64: set"):
        dispatch_locally(
            torch.randn(T, D, dtype=torch.float64), assigned_tokens(), experts_of(backend="liger")
        )
    monkeypatch.setattr(liger, "_DEVICES", ("cuda",))
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(InputError, match=r"needs a GPU, but the device is cpu: set the back end"):
        dispatch_locally(torch.randn(T, D), assigned_tokens(), experts_of(backend="liger"))
    with pytest.raises(InputError, match="needs a GPU, but the device is cpu: set the back end to"):
        set_backend(experts_of(), backend="liger", **cpu)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for use in (
        lambda: experts_of(backend="liger"),
        lambda: set_backend(experts_of(), backend="liger"),
    ):
        with pytest.raises(
            InputError, match=r"^the back end 'liger' needs liger-kernel 0\.8 or new"
        ):
            use()


def test_what_is_told(on_cpu):
    told = describe_backend(
        experts_of(backend="liger"), device=torch.device("cpu"), dtype=torch.float32
    )
    assert told == "experts by Liger's fused kernels (the back end is liger)"
