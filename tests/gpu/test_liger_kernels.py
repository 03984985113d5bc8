"""Liger's real kernels against our own experts. Also in Triton's interpreter, where asked for."""

import os

import pytest
import torch
from helpers import gradients, randomise

from moe_builders.dispatch import Assigned, dispatch_locally
from moe_builders.experts import GroupedExperts, liger
from moe_builders.ops.permute import sort_by_expert

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not INTERPRETED, reason="needs a GPU"
)
T, K, E, D, H = 37, 3, 6, 64, 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", [False, True])
def test_equals_our_own(monkeypatch, dtype, dead):
    pytest.importorskip("liger_kernel.ops.fused_moe")
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot add bf16 atomically")
    device = "cpu" if INTERPRETED else "cuda"
    monkeypatch.setattr(liger, "_DEVICES", (device,))
    live = torch.rand(T, K) > 0.3 if dead else None
    x, grad = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    if live is not None:
        live[4:9] = False
        x[4:9] = grad[4:9] = float("nan")
    found = sort_by_expert(torch.rand(T, E).topk(K).indices, E, live)
    weights = torch.rand(T * K)
    theirs = randomise(GroupedExperts(dim=D, hidden_dim=H, num_experts=E, backend="liger"))
    own = GroupedExperts(dim=D, hidden_dim=H, num_experts=E)
    own.load_state_dict(theirs.state_dict())

    def run(experts, to):
        experts = experts.to(device, to)
        leaf = weights.to(device).requires_grad_()
        tokens = x.to(device, to).requires_grad_()
        index, counts, slots = (t.to(device) for t in (found.token_index, found[2], found.slot_of))
        y = dispatch_locally(tokens, Assigned(index, counts, slots, output_weights=leaf), experts)
        y.backward(grad.to(device, to))
        return {"y": y.detach(), "x": tokens.grad, "weights": leaf.grad, **gradients(experts)}

    rounded = own.to(dtype).to(torch.float32)
    theirs.load_state_dict(rounded.state_dict())
    got, wanted = run(theirs, dtype), run(rounded, torch.float32)
    for name, value in wanted.items():
        apart = (got[name].float() - value).abs().max() / value.abs().max()
        exact = 1e-5 if INTERPRETED else 3e-3  # a GPU multiplies fp32 as TF32
        assert apart <= (3e-2 if dtype == torch.bfloat16 else exact), name
