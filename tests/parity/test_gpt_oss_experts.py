"""A MoE layer from plain numbers against transformers' gpt-oss layer, which stores it otherwise."""

import pytest
import torch
import transformers
from helpers import assert_near, gradients
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from moe_builders.moe import moe_layer
from moe_builders.ops.activations import gpt_oss_swiglu

D, H, E, K, T = 16, 12, 6, 2, 40


def ours_of(theirs):
    """Their tensors under our names: transposed, gate rows first and not in turns."""
    found = {
        "router.gate.weight": theirs["router.weight"],
        "router.gate.bias": theirs["router.bias"],
        "experts.down_proj": theirs["experts.down_proj"].transpose(1, 2),
        "experts.down_bias": theirs["experts.down_proj_bias"],
    }
    up = theirs["experts.gate_up_proj"].transpose(1, 2)  # [e, 2h, d]
    bias = theirs["experts.gate_up_proj_bias"]
    found["experts.gate_up_proj"] = torch.cat((up[:, ::2], up[:, 1::2]), dim=1)
    found["experts.gate_up_bias"] = torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)
    return found


def make_pair(backend, *, limit, alpha):
    config = transformers.GptOssConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=K,
        swiglu_limit=limit, swiglu_alpha=alpha, experts_implementation="eager",
    )  # fmt: skip
    theirs = GptOssMLP(config)
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.7, generator=stream)
        theirs.router.bias[1] = -1e4  # nobody takes this one
    ours = moe_layer(
        embed_dim=D,
        expert_hidden_dim=H,
        num_experts=E,
        experts_per_token=K,
        score_function="topk_softmax",
        gate_bias=True,
        expert_proj_bias=True,
        activation="gpt_oss" if (limit, alpha) == (7.0, 1.702)
        else gpt_oss_swiglu(limit=limit, alpha=alpha),
    )  # fmt: skip
    ours.load_state_dict(ours_of(theirs.state_dict()))
    ours.experts.backend = backend
    return ours, theirs


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize(("limit", "alpha"), [(7.0, 1.702), (2.0, 0.9)])
def test_transformers_gives_the_same(limit, alpha, backend):
    ours, theirs = make_pair(backend, limit=limit, alpha=alpha)
    x = 2 * torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(4))
    again = x.clone().requires_grad_()
    x.requires_grad_()
    got = ours(x)
    wanted = theirs(again)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    counts = ours.last_routing.num_tokens_per_expert
    assert counts[1] == 0
    assert counts.sum() == T * K
    z = x.detach().flatten(0, 1) @ ours.experts.gate_up_proj[0].t()
    assert (z[:, :H] > limit).any()  # the clamps are met
    assert (z[:, H:] > limit).any()
    assert (z[:, H:] < -limit).any()
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    (got * probe).sum().backward()
    (wanted * probe).sum().backward()
    assert_near(got, wanted, 1e-5)
    assert_near(x.grad, again.grad, 1e-5, "x")
    grads = gradients(ours)
    wanted_grads = ours_of({name: p.grad for name, p in theirs.named_parameters()})
    assert grads.keys() == wanted_grads.keys()
    for name, gradient in grads.items():
        assert_near(gradient, wanted_grads[name], 1e-5, name)
    assert not grads["experts.gate_up_bias"][1].any()
