"""Experts, latent space and shared experts against NeMo Automodel 0.7.0: outputs and gradients."""

import itertools

import pytest
import torch
from helpers import assert_near, randomise

pytest.importorskip("nemo_automodel")

from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import MoE as AutomodelMoE

from moe_builders.experts.layouts import from_layout
from moe_builders.initialization import initialize
from moe_builders.moe import moe_layer
from moe_builders.ops.activations import find_activation, gpt_oss_swiglu, limited_swiglu
from moe_builders.routing import TokenInfo

B, S, D, H, E, K, LATENT = 2, 9, 16, 12, 4, 2, 8

# their name: (ours, layout of their tensors)
ACTIVATIONS = {
    "swiglu": ("swiglu", "automodel"),
    "swigluoai": (gpt_oss_swiglu(limit=1.5, alpha=1.3), "automodel"),
    "quick_geglu": (gpt_oss_swiglu(limit=1.5, alpha=1.3), "automodel_alternating"),
    "geglu": ("geglu", "automodel"),
    "relu2": ("relu2", "automodel"),
    "swiglu with a limit": (limited_swiglu(limit=0.8), "automodel"),
}
SHARED = ("swiglu", "relu2")


@pytest.fixture(autouse=True)
def _not_compiled():
    """Their activations are compiled for a GPU, which takes minutes here and changes nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs_of(activation, bias, after_down, latent, gate, backend, shared):
    config = MoEConfig(
        n_routed_experts=E, n_shared_experts=1, n_activated_experts=K, n_expert_groups=1,
        n_limited_groups=1, train_gate=True, gate_bias_update_factor=0.0, aux_loss_coeff=0.0,
        score_func="softmax", softmax_before_topk=True, norm_topk_prob=True, route_scale=1.0,
        dim=D, inter_dim=H, moe_inter_dim=H, dtype=torch.float32, expert_bias=bias,
        expert_activation=activation.partition(" ")[0], activation_alpha=1.3,
        activation_limit=1.5, swiglu_limit=0.8 if "limit" in activation else 0.0,
        apply_router_weight_after_down=after_down, moe_latent_size=LATENT if latent else None,
        shared_expert_gate=gate, shared_expert_activation=shared, router_weights_fp32=True,
    )  # fmt: skip
    made = AutomodelMoE(config, BackendConfig(experts=backend, linear="torch", attn="sdpa"))
    return randomise(made, 3)


def experts_from(state, activation):
    ours, layout = ACTIVATIONS[activation]
    return from_layout(state, layout, activation=ours, prefix="experts.")


def names_of(ours, theirs):
    """{ours: theirs} of everything but the routed experts."""
    gated = theirs.shared_experts.gate_proj is not None
    layers = {"router.gate": "gate", "latent_down": "fc1_latent_proj",
              "latent_up": "fc2_latent_proj", "shared_gate": "shared_expert_gate"}  # fmt: skip
    if gated and hasattr(ours.shared_experts, "w1"):
        layers |= {f"shared_experts.{w}": f"shared_experts.{name}_proj"
                   for w, name in (("w1", "gate"), ("w2", "down"), ("w3", "up"))}  # fmt: skip
    else:
        layers |= {f"shared_experts.{name}_proj": f"shared_experts.{name}_proj"
                   for name in ("gate", "up", "down")}  # fmt: skip
    names = {}
    for mine, other in layers.items():
        for kind in ("weight", "bias"):
            if f"{mine}.{kind}" in dict(ours.named_parameters()):
                names[f"{mine}.{kind}"] = f"{other}.{kind}"
    return names


def compare(activation, bias, after_down, backend, *, mask, latent, gate, shared):
    theirs = theirs_of(activation, bias, after_down, latent, gate, backend, shared)
    limited = "limit" in activation
    ours = moe_layer(
        embed_dim=D, expert_hidden_dim=H, num_experts=E, experts_per_token=K,
        shared_hidden_dim=H, shared_gate=gate, shared_bias=bias,
        shared_activation=limited_swiglu(limit=0.8) if limited and shared == "swiglu" else shared,
        activation=find_activation(ACTIVATIONS[activation][0]), expert_proj_bias=bias,
        latent_dim=LATENT if latent else None, latent_bias=bias and latent,
        score_position="after" if after_down else "mid",
    )  # fmt: skip
    state = {name: value.detach().clone() for name, value in theirs.state_dict().items()}
    names = names_of(ours, theirs)
    own = {mine: state[other] for mine, other in names.items()}
    own |= {f"experts.{n}": v for n, v in experts_from(state, activation).state_dict().items()}
    ours.load_state_dict(own)  # strict: nothing is left out
    routed = {name for name in state if name.startswith("experts.")}
    assert {*names.values(), *routed} == set(state)

    stream = torch.Generator().manual_seed(1)
    x = torch.randn(B, S, D, generator=stream)
    probe = torch.randn(B, S, D, generator=stream)
    padding = torch.zeros(B, S, dtype=torch.bool)
    if mask:
        padding[:, 6:] = True
    probe[padding] = 0  # a masked token's answer is of no use to either
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    wanted = theirs(inputs[0], padding if mask else None)
    got = ours(inputs[1], TokenInfo(mask=~padding.flatten()) if mask else None)
    assert_near(got[~padding], wanted[~padding], 1e-5, "output")
    (wanted * probe).sum().backward()
    (got * probe).sum().backward()
    assert_near(inputs[1].grad, inputs[0].grad, 1e-5, "x")
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    mine = {name: p.grad for name, p in ours.named_parameters()}
    for name, other in names.items():
        assert_near(mine[name], grads[other], 1e-5, name)
    for name, gradient in experts_from(grads, activation).state_dict().items():
        assert_near(mine[f"experts.{name}"], gradient, 1e-5, name)


@pytest.mark.parametrize("backend", ["torch", "torch_mm"])
@pytest.mark.parametrize("after_down", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients(activation, bias, after_down, backend):
    for mask, latent, gate in itertools.product([False, True], repeat=3):
        shared = SHARED[mask ^ latent]
        compare(
            activation, bias, after_down, backend, mask=mask, latent=latent, gate=gate,
            shared=shared,
        )  # fmt: skip


def test_initial_weights_need_no_gradients_switched_off():
    """Gate, experts and latent projections N(0, std), biases 0; theirs raises with gradients on."""
    theirs = theirs_of("swiglu", True, False, True, False, "torch", "swiglu")
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        theirs.init_weights(torch.device("cpu"))
    ours = moe_layer(
        embed_dim=D, expert_hidden_dim=H, num_experts=64, latent_dim=LATENT, latent_bias=True,
        expert_proj_bias=True,
    )  # fmt: skip
    initialize(ours, seed=1, std=0.02)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 500:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
