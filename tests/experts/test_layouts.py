"""Experts' weights as files of other layouts have them: names, places, and to the bit and back."""

import pytest
import torch
from helpers import quick, randomise
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.experts.layouts import LAYOUTS, from_layout, to_layout

E, D, H = 3, 6, 5
UNGATED = {"nemo_list", "nemo_stacked"}
GATED = {"fused_alternating", "automodel_alternating"}


def experts_of(activation="swiglu", **options):
    sizes = {"dim": D, "hidden_dim": H, "num_experts": E} | options
    return randomise(GroupedExperts(activation=activation, **sizes))


def activation_of(layout):
    return "gelu_tanh" if layout in UNGATED else "swiglu"


@quick
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    gated=st.booleans(),
    bias=st.booleans(),
    e=st.integers(1, 5),
    h=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_there_and_back(layout, gated, bias, e, h, dtype):
    if layout in UNGATED | GATED:
        gated = layout in GATED
    activation = "swiglu" if gated else "relu2"
    experts = experts_of(activation, bias=bias, num_experts=e, hidden_dim=h).to(dtype)
    state = {"other": torch.zeros(1)} | to_layout(experts, layout, prefix="mlp.experts.")
    again = from_layout(state, layout, activation=activation, prefix="mlp.experts.")
    wanted, got = experts.state_dict(), again.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], value), name
        assert got[name].is_contiguous()
        assert not any(got[name].data_ptr() == v.data_ptr() for v in state.values())
    assert all(v.is_contiguous() for v in state.values())


SHAPES = {
    "per_expert": {
        "2.gate_proj.weight": (H, D), "2.gate_proj.bias": (H,), "2.up_proj.weight": (H, D),
        "2.up_proj.bias": (H,), "2.down_proj.weight": (D, H), "2.down_proj.bias": (D,),
    },
    "fused": {
        "gate_up_proj": (E, 2 * H, D), "gate_up_proj_bias": (E, 2 * H),
        "down_proj": (E, D, H), "down_proj_bias": (E, D),
    },
    "fused_transposed": {
        "gate_up_proj": (E, D, 2 * H), "gate_up_proj_bias": (E, 2 * H),
        "down_proj": (E, H, D), "down_proj_bias": (E, D),
    },
    "fused_alternating": {
        "gate_up_proj": (E, D, 2 * H), "gate_up_proj_bias": (E, 2 * H),
        "down_proj": (E, H, D), "down_proj_bias": (E, D),
    },
    "automodel": {
        "gate_and_up_projs": (E, D, 2 * H), "gate_up_proj_bias": (E, 2 * H),
        "down_projs": (E, H, D), "down_proj_bias": (E, D),
    },
    "automodel_alternating": {
        "gate_and_up_projs": (E, D, 2 * H), "gate_up_proj_bias": (E, 2 * H),
        "down_projs": (E, H, D), "down_proj_bias": (E, D),
    },
    "nemo_list": {
        "1.proj.conv.weight": (H, D, 1), "1.proj.conv.bias": (H,),
        "1.o_net.conv.weight": (D, H, 1), "1.o_net.conv.bias": (D,),
    },
    "nemo_stacked": {"w1": (E, H, D), "b1": (E, H), "w2": (E, D, H), "b2": (E, D)},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes(layout):
    state = to_layout(experts_of(activation_of(layout), bias=True), layout)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes.items() >= SHAPES[layout].items()
    numbered = any(name[0].isdigit() for name in shapes)
    assert len(shapes) == len(SHAPES[layout]) * (E if numbered else 1)
    # without biases those names alone are missing
    bare = to_layout(experts_of(activation_of(layout)), layout)
    assert len(bare) == len(shapes) // 2
    assert bare.keys() < shapes.keys()


def test_where_each_number_lies():
    experts = experts_of(bias=True)
    gate, up = experts.gate_up_proj.detach().split(H, dim=1)  # [e, h, d] each
    each = to_layout(experts, "per_expert")
    assert torch.equal(each["1.gate_proj.weight"], gate[1])
    assert torch.equal(each["1.up_proj.weight"], up[1])
    assert torch.equal(each["1.up_proj.bias"], experts.gate_up_bias[1, H:])
    turned = to_layout(experts, "fused_transposed")
    assert torch.equal(turned["gate_up_proj"][2], torch.cat((gate[2], up[2])).t())
    assert torch.equal(turned["down_proj"][2], experts.down_proj[2].t())
    alternating = to_layout(experts, "fused_alternating")
    assert torch.equal(alternating["gate_up_proj"][..., ::2], gate.transpose(1, 2))
    assert torch.equal(alternating["gate_up_proj"][..., 1::2], up.transpose(1, 2))
    assert torch.equal(alternating["gate_up_proj_bias"][:, 1::2], experts.gate_up_bias[:, H:])


def test_between_layouts():
    """Older and newer files of one model, by way of ours."""
    experts = experts_of("gelu_tanh", bias=True)
    old, new = to_layout(experts, "nemo_list"), to_layout(experts, "nemo_stacked")
    again = to_layout(from_layout(old, "nemo_list", activation="gelu_tanh"), "nemo_stacked")
    assert again.keys() == new.keys()
    assert all(torch.equal(again[name], value) for name, value in new.items())
    assert torch.equal(new["w1"][1], old["1.proj.conv.weight"][..., 0])


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def test_refused():
    experts = experts_of(bias=True)
    with pytest.raises(InputError, match="layout 'x' is not one of per_expert, fused, "):
        to_layout(experts, "x")
    with pytest.raises(InputError, match="'nemo_list' has no place for gated experts"):
        to_layout(experts, "nemo_list")
    with pytest.raises(InputError, match="'fused_alternating' has no place for ungated experts"):
        to_layout(experts_of("relu2"), "fused_alternating")
    with pytest.raises(InputError, match="hidden_scale has no place in the layout 'fused'"):
        to_layout(experts_of(hidden_scale=True), "fused")
    state = to_layout(experts, "per_expert")
    for changed, message in (
        (without(state, "0.up_proj.weight"), r"'per_expert' needs 0.up_proj.weight"),
        (without(state, "1.up_proj.weight"), "2.up_proj.weight has no place|gate rows are"),
        (without(state, "0.down_proj.bias"), "0.gate_proj.bias has no place|needs 0.down_proj.b"),
        (state | {"router.weight": torch.zeros(1)}, "router.weight has no place in the layout"),
        (state | {"1.up_proj.weight": torch.zeros(4, D)}, "up_proj.weight have different shapes"),
        (
            state | {f"{j}.up_proj.weight": torch.zeros(4, D) for j in range(E)},
            r"gate rows are \(3, 5, 6\), but up rows \(3, 4, 6\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            from_layout(changed, "per_expert")
    fused = to_layout(experts, "fused")
    with pytest.raises(InputError, match=r"gate_up_proj would be \(3, 9, 6\), but must be"):
        from_layout(fused | {"gate_up_proj": torch.zeros(3, 9, 6)}, "fused")
    with pytest.raises(InputError, match=r"gate_up_proj would be \(3, 5, 6\)|has no place|needs"):
        from_layout(to_layout(experts_of("relu2"), "fused"), "fused")
