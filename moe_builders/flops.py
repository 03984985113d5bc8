"""What a model costs: FLOPs of a step, active parameters, and the peak of the GPU it runs on.

Letters: e num_experts · k experts_per_token.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtune.modules import TiedLinear

from moe_builders.errors import InputError
from moe_builders.experts.grouped import GroupedExperts
from moe_builders.moe import moe_layers

# Dense bf16 products with fp32 sums [TFLOP/s], by the name that torch.cuda.get_device_name gives.
# Vendors print twice the number for sparse matrices where they can; it is halved here.
_PEAKS = (
    (r"NVIDIA A100\b.*", 312.0),  # NVIDIA A100 data sheet
    (r"NVIDIA H100 PCIe", 756.0),  # NVIDIA H100 data sheet, PCIe: 1,513 sparse
    (r"NVIDIA H100 NVL", 835.5),  # NVIDIA H100 data sheet, NVL: 1,671 sparse
    (r"NVIDIA H100( 80GB HBM3)?", 989.0),  # NVIDIA H100 data sheet, SXM: 1,979 sparse
    (r"NVIDIA GH200\b.*", 989.0),  # NVIDIA GH200 data sheet: 1,979 sparse
    (r"NVIDIA H200 NVL", 835.5),  # NVIDIA H200 data sheet, NVL: 1,671 sparse
    (r"NVIDIA H200", 989.0),  # NVIDIA H200 data sheet, SXM: 1,979 sparse
    (r"NVIDIA B200", 2250.0),  # NVIDIA HGX B200 data sheet: 36 PFLOP/s sparse for eight
    (r"NVIDIA L40S", 362.0),  # NVIDIA L40S data sheet
    (r"NVIDIA L4", 121.0),  # NVIDIA L4 data sheet: 242 sparse
    (r"NVIDIA GeForce RTX 4090", 165.2),  # NVIDIA Ada whitepaper: fp32 sums, 330.3 sparse
    (r"NVIDIA GeForce RTX 3090", 71.0),  # NVIDIA Ampere GA102 whitepaper: fp32 sums, 142 sparse
)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward: ``per_token`` · tokens + ``per_pair`` · (query, key) pairs.

    A multiplication and an addition are two. Only matrix products are counted: projections,
    the router's gate, the experts that a token uses, shared experts and their gate, attention
    scores and values, the output. Norms, activations, softmax and biases are not, nor is what
    activation checkpointing computes a second time. Pairs are those that may attend, as in
    Megatron-LM and NeMo; PaLM and torchtitan count the whole square, which flatters long rows.

    A layer with a sliding window attends to fewer pairs than are counted for it (all causal ones
    of a document): where documents are longer than the window, the number is an upper bound.
    """

    per_token: float
    per_pair: float

    def forward(self, *, num_tokens: Any, attended: Any) -> Any:
        """FLOPs of a forward over all layers.

        Args:
            num_tokens: tokens; a number or a tensor.
            attended: (query, key) pairs of one layer: n(n+1)/2 for a document of n tokens
                (``Batch.attended_pairs``). A kernel that computes the whole square does more.
        """
        return self.per_token * num_tokens + self.per_pair * attended

    def training(self, *, num_tokens: Any, attended: Any) -> Any:
        """FLOPs of forward and backward: each product has two more behind it, so three times."""
        return 3 * self.forward(num_tokens=num_tokens, attended=attended)


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model holds, and how many of them one token meets."""

    total: int
    active: int


@dataclass(frozen=True)
class Utilisation:
    """What MFU (model FLOPs utilisation) is computed from.

    Attributes:
        flops: of the model.
        peak: FLOP/s of all devices together.
    """

    flops: ModelFlops
    peak: float

    def mfu(self, *, num_tokens: Any, attended: Any, seconds: float) -> Any:
        """FLOPs that a step needed over those the devices could have done in its time.

        Args:
            num_tokens, attended: of the step over all processes; padding is no token.
            seconds: that the step took.
        """
        return self.flops.training(num_tokens=num_tokens, attended=attended) / (self.peak * seconds)


def mfu_of_step(used: Utilisation | None, **step: Any) -> dict[str, Any]:
    """{"mfu": ...} of a step (see ``Utilisation.mfu``), or {} where it cannot be computed."""
    return {} if used is None else {"mfu": used.mfu(**step)}


def utilisation(
    model: nn.Module, *, peak_tflops: float | None, compute_dtype: torch.dtype,
    device: torch.device, num_devices: int,
) -> Utilisation | None:  # fmt: skip
    """How to compute MFU; None where no peak is known, or a model's cost is not.

    Args:
        model: the decoder.
        peak_tflops: of one device; None: looked up, for a known GPU that computes in bf16.
        compute_dtype: of forward and backward.
        device: where this process computes.
        num_devices: how many there are.

    Raises:
        InputError: peak_tflops is given, but the model's FLOPs cannot be counted.
    """
    if peak_tflops is not None:
        return Utilisation(model_flops(model), peak_tflops * 1e12 * num_devices)
    if device.type != "cuda" or compute_dtype != torch.bfloat16:
        return None
    known = known_peak_tflops(torch.cuda.get_device_name(device))
    try:
        return Utilisation(model_flops(model), known * 1e12 * num_devices) if known else None
    except InputError:  # nobody asked: not for this should a model of one's own be refused
        return None


def model_flops(model: nn.Module) -> ModelFlops:
    """Count a decoder's FLOPs from its modules; also on the meta device or sharded.

    Raises:
        InputError: a module that nobody knows the cost of, or a router that does not tell how many
            experts a token uses.
    """
    shares = _expert_shares(model)
    per_token = 0.0
    for name, module in model.named_modules():
        share = next((s for path, s in shares.items() if _inside(name, path)), 1.0)
        per_token += share * sum(2.0 * size for size in _matrices(name, module))
    output = getattr(model, "output", None)
    if isinstance(output, TiedLinear):  # no module: the walk does not meet it
        tied: Any = output.tied_module
        per_token += 2 * tied.weight.numel()
    per_pair = 0.0
    layers: Any = model.layers
    for layer in layers:
        per_pair += _per_pair(layer.attn)
    return ModelFlops(per_token, per_pair)


def flops_without_experts(model: Any) -> ModelFlops:
    """Of attention and of mlps without experts: what ac_mode selective computes again."""
    parts = [layer.attn for layer in model.layers]
    parts += [layer.mlp for layer in model.layers if not any(moe_layers(layer.mlp))]
    sizes = (
        size for part in parts for name, m in part.named_modules() for size in _matrices(name, m)
    )
    return ModelFlops(2.0 * sum(sizes), sum(_per_pair(layer.attn) for layer in model.layers))


def count_parameters(model: nn.Module) -> ParameterCounts:
    """All parameters, and those that a token meets: k of e experts, everything else whole.

    Embedding and output are counted, each once also where they share a weight, as releases count
    them (Qwen3-30B-A3B: 30.5 B and 3.3 B).

    Raises:
        InputError: a router that does not tell how many experts a token uses.
    """
    total, idle = sum(p.numel() for p in model.parameters()), 0.0
    for path, share in _expert_shares(model).items():
        held = sum(p.numel() for p in model.get_submodule(path).parameters())
        idle += held * (1 - share)
    return ParameterCounts(total, round(total - idle))


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU as its vendor states them; None for one not in the table."""
    found = (peak for pattern, peak in _PEAKS if re.fullmatch(pattern, device_name))
    return None if "MIG" in device_name else next(found, None)


def _per_pair(attention: Any) -> float:
    """Scores of one (query, key) pair, and its part of the values; of all heads of a layer."""
    heads, width = (getattr(attention, key, None) for key in ("num_heads", "head_dim"))
    if heads is None or width is None:
        raise InputError(
            f"FLOPs of the attention {type(attention).__name__} are not known: give it "
            "attributes num_heads and head_dim (and v_head_dim where values have another width)"
        )
    return 2 * heads * (width + getattr(attention, "v_head_dim", width))


def _expert_shares(model: nn.Module) -> dict[str, float]:
    """Of each MoE's experts (by module name): the share that one token uses, k / e."""
    return {
        f"{name}.experts" if name else "experts": experts_per_token(moe.router)
        / moe.router.num_experts
        for name, moe in moe_layers(model)
    }


def experts_per_token(router: Any) -> float:
    """k of a router, or the mean where experts pick tokens.

    Raises:
        InputError: it does not tell.
    """
    for key in ("experts_per_token", "capacity_factor"):
        if hasattr(router, key):
            return getattr(router, key)
    raise InputError(
        f"the router {type(router).__name__} does not tell how many experts a token uses: give it "
        "an attribute experts_per_token"
    )


def _matrices(name: str, module: nn.Module) -> Iterator[int]:
    """Sizes of the matrices that a module itself, without its children, multiplies a token by."""
    if isinstance(module, nn.Embedding):
        return  # a look-up
    if isinstance(module, nn.Linear | GroupedExperts):
        yield from (p.numel() for key, p in module._parameters.items()
                    if p is not None and not key.endswith(("bias", "hidden_scale")))  # fmt: skip
        return
    unknown = [key for key, p in module._parameters.items() if p is not None and p.ndim > 1]
    if unknown:
        raise InputError(
            f"FLOPs of {name or 'the model'} ({type(module).__name__}) are not known: its "
            f"{unknown[0]} is no nn.Linear, nn.Embedding or GroupedExperts"
        )


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")
