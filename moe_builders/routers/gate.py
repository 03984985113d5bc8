"""What most routers begin with: a linear gate in a precision of its own, and noise on it.

Letters: t tokens · d dim · e num_experts.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_builders.errors import InputError

JitterKind = Literal["logit_gaussian", "input_uniform", "gumbel"]
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Jitter:
    """Noise on a gate while it trains, from torch's global random stream.

    That stream is part of a checkpoint and is wound back for a recomputation, so that a resumed
    and a checkpointed run see the same noise.

    Attributes:
        kind: "logit_gaussian": logits + N(0, 1) · scale (MagpieTTS); "input_uniform": the gate
            sees x · U(1 - scale, 1 + scale), the experts do not (Switch); "gumbel": logits +
            Gumbel(0, 1) · scale, and the z-loss stays on the clean logits (ST-MoE).
        scale: ≥ 0; 0 is none.

    Raises:
        InputError: an unknown kind or a negative scale.
    """

    kind: JitterKind
    scale: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(JitterKind):
            raise InputError(
                f"jitter {self.kind!r} is not one of {', '.join(get_args(JitterKind))}"
            )
        if not self.scale >= 0:
            raise InputError(f"jitter_scale is {self.scale}, but must be at least 0")


def make_jitter(kind: JitterKind | None, scale: float) -> Jitter | None:
    """The noise that a router's arguments ``jitter`` and ``jitter_scale`` ask for.

    Raises:
        InputError: one without the other.
    """
    if kind is None and scale == 0:
        return None
    if kind is None:
        raise InputError(
            f"jitter_scale is {scale}, but jitter is not set: choose one of "
            f"{', '.join(get_args(JitterKind))}"
        )
    return Jitter(kind, scale)


def gate_logits(gate: nn.Linear, x: Tensor, *, precision: str | None = None) -> Tensor:
    """The gate's output in fp32 (fp64 for fp64 inputs), whatever the storage: [t, d] -> [t, e].

    Args:
        gate: d -> e.
        x: [t, d].
        precision: a name of ``PRECISIONS`` that the product is computed in; None: as the output.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    inner = wide if precision is None else PRECISIONS[precision]
    bias = None if gate.bias is None else gate.bias.to(inner)
    return F.linear(x.to(inner), gate.weight.to(inner), bias).to(wide)


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """[t, d] with masked rows at 0, selected: what a gate is to be given.

    A masked token may hold NaN, which a product would carry into the gate's gradient even where
    its row's gradient is 0.
    """
    return x if mask is None else torch.where(mask[:, None], x, 0)


def jittered_logits(
    gate: nn.Linear,
    x: Tensor,
    jitter: Jitter | None,
    *,
    training: bool,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(logits that the z-loss sees, logits to route by), each [t, e]; x is left as it is.

    Args:
        gate: d -> e.
        x: [t, d].
        jitter: None: no noise.
        training: without it there is no noise.
        precision: of ``gate_logits``.
    """
    if jitter is None or not training or jitter.scale == 0:
        logits = gate_logits(gate, x, precision=precision)
        return logits, logits
    if jitter.kind == "input_uniform":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        noise = torch.empty_like(wide).uniform_(1 - jitter.scale, 1 + jitter.scale)
        logits = gate_logits(gate, wide * noise, precision=precision)
        return logits, logits
    logits = gate_logits(gate, x, precision=precision)
    if jitter.kind == "logit_gaussian":
        logits = logits + torch.randn_like(logits) * jitter.scale
        return logits, logits
    gumbel = -torch.empty_like(logits).exponential_().log()
    return logits, logits + gumbel * jitter.scale


def check_precision(precision: str | None) -> None:
    """Refuse a ``gate_precision`` that is not known.

    Raises:
        InputError: the known ones are listed.
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(
            f"gate_precision {precision!r} is not one of {', '.join(PRECISIONS)} (or null)"
        )


def check_gate(router: object, dim: int) -> None:
    """Refuse a router whose linear ``gate`` takes vectors of another width.

    Args:
        router: any; one without such a gate passes.
        dim: d, of the tokens that it will be given.

    Raises:
        InputError: both widths are named.
    """
    gate = getattr(router, "gate", None)
    if isinstance(gate, nn.Linear) and gate.in_features != dim:
        raise InputError(
            f"the {type(router).__name__}'s dim is {gate.in_features}, but its tokens have {dim}: "
            f"give it dim={dim}, or leave dim out where it is filled in"
        )
