"""Experts' weights as files of other layouts have them, to the bit and back.

Letters: e num_experts · d dim · h hidden_dim of an expert · i, o in- and out-features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.experts.grouped import GroupedExperts
from moe_builders.ops.activations import Activation, find_activation


@dataclass(frozen=True)
class Layout:
    """How a file names and turns experts' weights.

    Attributes:
        names: (weight, bias) of "gate_up", or of "gate" and "up" (an ungated activation has "up"
            alone), and of "down"; ``{}`` stands for an expert's number, else all are in one tensor.
        transposed: matrices lie [i, o].
        alternating: gate and up rows take turns, gate first.
        pointwise: a matrix is a convolution's, [o, i, 1].
    """

    names: Mapping[str, tuple[str, str]]
    transposed: bool = False
    alternating: bool = False
    pointwise: bool = False

    @property
    def numbered(self) -> bool:
        """Whether each expert has tensors of its own."""
        return "{}" in self.names["down"][0]


def _linear(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


_FUSED = Layout({kind: (f"{kind}_proj", f"{kind}_proj_bias") for kind in ("gate_up", "up", "down")})
_AUTOMODEL = Layout(
    {kind: ("gate_and_up_projs", "gate_up_proj_bias") for kind in ("gate_up", "up")}
    | {"down": ("down_projs", "down_proj_bias")},
    transposed=True,
)

LAYOUTS = {
    # Hugging Face: most files; transformers 5 in memory; Llama 4; gpt-oss
    "per_expert": Layout({kind: _linear(f"{{}}.{kind}_proj") for kind in ("gate", "up", "down")}),
    "fused": _FUSED,
    "fused_transposed": replace(_FUSED, transposed=True),
    "fused_alternating": replace(_FUSED, transposed=True, alternating=True),
    # NeMo Automodel; the second with its activation quick_geglu
    "automodel": _AUTOMODEL,
    "automodel_alternating": replace(_AUTOMODEL, alternating=True),
    # NeMo's MagpieTTS decoder, which has no gate: convolutions of width 1 (older), stacked (newer)
    "nemo_list": Layout(
        {"up": _linear("{}.proj.conv"), "down": _linear("{}.o_net.conv")}, pointwise=True
    ),
    "nemo_stacked": Layout({"up": ("w1", "b1"), "down": ("w2", "b2")}),
}


def to_layout(experts: GroupedExperts, layout: str, *, prefix: str = "") -> dict[str, Tensor]:
    """Experts' weights as a file of that layout has them: copies, to the bit.

    Args:
        experts: not sharded.
        layout: a name of ``LAYOUTS``.
        prefix: before each name, as "model.layers.0.mlp.experts.".

    Raises:
        InputError: unknown layout, or one without a place for what these experts have.
    """
    form, kinds = _find_layout(layout, experts.activation)
    if experts.hidden_scale is not None:
        raise InputError(
            f"hidden_scale has no place in the layout {layout!r}: save the model under its own "
            "names, or use split_experts"
        )
    up = "gate_up" if experts.activation.gated else "up"
    found = {}
    for place, what in enumerate(("proj", "bias")):
        first, down = (getattr(experts, f"{name}_{what}") for name in (up, "down"))
        if down is None:
            continue
        values = [*first.detach().chunk(len(kinds) - 1, dim=1), down.detach()]  # [e, o(, i)] each
        for kind, value in zip(kinds, values, strict=True):
            name = prefix + form.names[kind][place]
            value = _to_file(value, form, kind)
            if form.numbered:
                found |= {name.format(j): part.clone() for j, part in enumerate(value)}
            else:
                found[name] = value.clone(memory_format=torch.contiguous_format)
    return found


def from_layout(
    state: Mapping[str, Tensor],
    layout: str,
    *,
    activation: str | Activation = "swiglu",
    prefix: str = "",
    backend: str = "auto",
) -> GroupedExperts:
    """Experts from the tensors of a file, copied to the bit: the reverse of ``to_layout``.

    Args:
        state: names that do not begin with ``prefix`` are left alone.
        layout: a name of ``LAYOUTS``.
        activation: which no file of these tells.
        prefix: before each name.
        backend: of ``GroupedExperts``.

    Raises:
        InputError: unknown layout, or names that are missing, left over, or of shapes that do not
            fit each other.
    """
    activation = find_activation(activation)
    form, kinds = _find_layout(layout, activation)
    rest = {name: value for name, value in state.items() if name.startswith(prefix)}
    biased = any(prefix + form.names["down"][1].format(0) == name for name in rest)
    up = "gate_up" if activation.gated else "up"
    stacked: dict[str, Tensor] = {}
    for place, what in enumerate(("proj", "bias") if biased else ("proj",)):
        values = [
            _from_file(_take(rest, prefix + form.names[kind][place], form, layout), form, kind)
            for kind in kinds
        ]
        first = values[0] if len(values) == 2 else _joined(values[0], values[1])  # [e, 2h(, d)]
        stacked |= {f"{up}_{what}": first, f"down_{what}": values[-1]}
    if rest:
        raise InputError(f"{min(rest)} has no place in the layout {layout!r} of these experts")
    e, dim, hidden_dim = stacked["down_proj"].shape
    with torch.device("meta"):
        experts = GroupedExperts(
            dim=dim, hidden_dim=hidden_dim, num_experts=e, activation=activation, bias=biased,
            backend=backend,
        )  # fmt: skip
    for name, parameter in experts.named_parameters():
        if stacked[name].shape != parameter.shape:
            raise InputError(
                f"{name} would be {tuple(stacked[name].shape)}, but must be "
                f"{tuple(parameter.shape)} beside a down projection of {(e, dim, hidden_dim)}"
            )
    experts.load_state_dict(
        {name: v.clone(memory_format=torch.contiguous_format) for name, v in stacked.items()},
        assign=True,
    )
    return experts


def _find_layout(layout: str, activation: Activation) -> tuple[Layout, list[str]]:
    """The layout, and which of its names these experts have, "down" last."""
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    form = LAYOUTS[layout]
    if not activation.gated and "up" in form.names and not form.alternating:
        return form, ["up", "down"]
    for kinds in (["gate_up", "down"], ["gate", "up", "down"]):
        if activation.gated and all(kind in form.names for kind in kinds):
            return form, kinds
    gated = "gated" if activation.gated else "ungated"
    raise InputError(
        f"the layout {layout!r} has no place for {gated} experts ({activation.name}): take another "
        f"of {', '.join(LAYOUTS)}"
    )


def _to_file(value: Tensor, form: Layout, kind: str) -> Tensor:
    """[e, o, i] or a bias's [e, o] as it lies in the file."""
    if form.alternating and kind == "gate_up":
        value = torch.stack(value.chunk(2, dim=1), dim=2).flatten(1, 2)  # [e, 2h(, d)]
    if value.ndim == 3 and form.transposed:
        value = value.transpose(1, 2)  # [e, i, o]
    return value[..., None] if value.ndim == 3 and form.pointwise else value


def _from_file(value: Tensor, form: Layout, kind: str) -> Tensor:
    """The reverse of ``_to_file``."""
    if form.pointwise and value.ndim == 4:
        value = value.squeeze(-1)  # [e, o, i]
    if value.ndim == 3 and form.transposed:
        value = value.transpose(1, 2)  # [e, o, i]
    if form.alternating and kind == "gate_up":
        value = torch.cat((value[:, ::2], value[:, 1::2]), dim=1)  # [e, 2h(, d)]
    return value


def _take(rest: dict[str, Tensor], name: str, form: Layout, layout: str) -> Tensor:
    """A tensor, or those of all experts stacked, taken out of what is left."""
    if not form.numbered:
        names = [name] if name in rest else []
    else:
        names = []
        while name.format(len(names)) in rest:
            names.append(name.format(len(names)))
    if not names:
        raise InputError(f"the layout {layout!r} needs {name.format(0)}, which is not there")
    values = [rest.pop(name) for name in names]
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise InputError(f"the experts' {name} have different shapes: {sorted(shapes)}")
    return torch.stack(values) if form.numbered else values[0]


def _joined(gate: Tensor, up: Tensor) -> Tensor:
    if gate.shape != up.shape:
        raise InputError(
            f"gate rows are {tuple(gate.shape)}, but up rows {tuple(up.shape)}: they must be equal"
        )
    return torch.cat((gate, up), dim=1)
