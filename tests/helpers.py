"""What several tests of the core share: random parameters, and references in plain loops.

The references use no sorting, no batched weights and no function of the package: a token, an
expert, a matrix at a time.
"""

import math

import torch
from hypothesis import settings
from torch import Tensor, nn

from moe_builders.experts import GroupedExperts
from moe_builders.moe import MoE, shared_experts
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter

D, E, H = 6, 4, 5  # of ``moe_of``

quick = settings(max_examples=25, deadline=None, derandomize=True)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter (norms and biases too) and every ``expert_bias`` a random value."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.2, generator=stream)
            else:
                parameter.normal_(0, 0.5, generator=stream)
        for name, buffer in module.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(0, 0.3, generator=stream)
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Each parameter's gradient, taken away from it."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


def assert_same_bits(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert torch.equal(value, wanted[name]), name


def assert_near(got: Tensor, wanted: Tensor, limit: float, what: str = "") -> None:
    """max|Δ| / max|wanted| ≤ limit; shapes and dtypes equal."""
    got, wanted = got.detach(), wanted.detach()
    assert got.shape == wanted.shape, what
    assert got.dtype == wanted.dtype, what
    scale = wanted.abs().max().clamp(min=1e-30) if wanted.numel() else 1
    worst = (got - wanted).abs().max() / scale if got.numel() else torch.zeros(())
    assert worst <= limit, f"{what}: {float(worst):.3g} > {limit}"


def reference_choice(router: TokenChoiceTopKRouter, x: Tensor) -> list[list[tuple[int, Tensor]]]:
    """For each token its (expert, weight), best first."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    chosen = []
    for token in x:
        logits = [
            (router.gate.weight[j].to(x.dtype) * token).sum()
            + (0 if router.gate.bias is None else router.gate.bias[j].to(x.dtype))
            for j in range(router.num_experts)
        ]
        total = sum(logit.exp() for logit in logits)
        scores = {
            "softmax": [logit.exp() / total for logit in logits],
            "sigmoid": [1 / (1 + (-logit).exp()) for logit in logits],
            "sqrtsoftplus": [(1 + logit.exp()).log().sqrt() for logit in logits],
            "topk_softmax": logits,
            "topk_sigmoid": logits,
        }[router.score_function]
        bias = [0.0] * router.num_experts if router.expert_bias is None else router.expert_bias
        wish = [float(s.detach()) + float(b) for s, b in zip(scores, bias, strict=True)]
        allowed = list(range(router.num_experts))
        if router.num_groups > 1:
            size = router.num_experts // router.num_groups
            groups = [allowed[g * size : (g + 1) * size] for g in range(router.num_groups)]
            groups.sort(
                key=lambda group: sum(
                    sorted((wish[j] for j in group), reverse=True)[: router.group_score_topk]
                ),
                reverse=True,
            )
            allowed = [j for group in groups[: router.groups_per_token] for j in group]
        best = sorted(allowed, key=lambda j: wish[j], reverse=True)[: router.experts_per_token]
        counted = [0.0] * router.num_experts if router.weights_from == "scores" else bias
        weights = [scores[j] + float(counted[j]) for j in best]
        if router.score_function == "topk_softmax":
            weights = [w.exp() for w in weights]
        if router.score_function == "topk_sigmoid":
            weights = [1 / (1 + (-w).exp()) for w in weights]
        if router.score_function == "topk_softmax" or router.normalize_weights:
            weights = [w / sum(weights) for w in weights]
        chosen.append([(j, w * router.route_scale) for j, w in zip(best, weights, strict=True)])
    return chosen


def plain_activation(name: str, z: Tensor) -> Tensor:
    def gelu(v: Tensor) -> Tensor:
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    half = z.shape[-1] // 2
    match name:
        case "swiglu":
            return z[:half] / (1 + torch.exp(-z[:half])) * z[half:]
        case "geglu":
            return gelu(z[:half]) * z[half:]
        case "geglu_exact":
            return z[:half] * 0.5 * (1 + torch.erf(z[:half] / math.sqrt(2))) * z[half:]
        case "gpt_oss":
            gate = torch.minimum(z[:half], torch.tensor(7.0).to(z))
            up = z[half:].where(z[half:].abs() < 7, 7 * z[half:].sign())
            return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        case "limited_swiglu":  # of limit 0.75
            gate = torch.minimum(z[:half], torch.tensor(0.75).to(z))
            up = z[half:].where(z[half:].abs() < 0.75, 0.75 * z[half:].sign())
            return gate / (1 + torch.exp(-gate)) * up
        case "gelu":
            return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        case "relu2":
            return torch.where(z > 0, z * z, 0 * z)
        case "gelu_tanh":
            return gelu(z)
        case "silu":
            return z / (1 + torch.exp(-z))
    raise AssertionError(name)


def one_expert(experts: GroupedExperts, number: int, x: Tensor) -> Tensor:
    """One expert's answer to one vector: [d] -> [d]."""
    prefix = "gate_up" if experts.activation.gated else "up"
    up, up_bias = getattr(experts, f"{prefix}_proj"), getattr(experts, f"{prefix}_bias")
    z = up[number] @ x
    z = z if up_bias is None else z + up_bias[number]
    hidden = plain_activation(experts.activation.name, z)
    if experts.hidden_scale is not None:
        hidden = hidden * experts.hidden_scale[number]
    y = experts.down_proj[number] @ hidden
    return y if experts.down_bias is None else y + experts.down_bias[number]


def plain_moe(
    moe: MoE, tokens: Tensor, choice: list[list[tuple[int, Tensor]]], mask: Tensor | None = None
) -> Tensor:
    """The layer as two loops: [t, d] -> [t, d]."""
    rows = []
    for number, x in enumerate(tokens):
        y = torch.zeros_like(x)
        if mask is None or mask[number]:
            for expert, weight in choice[number]:
                if moe.score_position == "before":
                    y = y + one_expert(moe.experts, expert, weight * x)
                else:
                    y = y + weight * one_expert(moe.experts, expert, x)
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            gate, up = shared.w1.weight @ x, shared.w3.weight @ x
            always = shared.w2.weight @ (gate / (1 + torch.exp(-gate)) * up)
            if moe.shared_gate is not None:
                always = always / (1 + torch.exp(-(moe.shared_gate.weight @ x)))
            y = y + always
        rows.append(y)
    return torch.stack(rows)


def moe_of(
    score_position="after",
    *,
    shared="none",
    bias=False,
    k=2,
    activation="swiglu",
    router="token",
    dtype=torch.float64,
) -> MoE:
    """A layer of d 6, e 4, h 5 with random parameters and biases."""
    moe = MoE(
        router=TokenChoiceTopKRouter(
            dim=D, num_experts=E, experts_per_token=k, expert_bias=bias, gate_bias=bias
        )
        if router == "token"
        else ExpertChoiceTopKRouter(dim=D, num_experts=E, capacity_factor=1.5),
        experts=GroupedExperts(
            dim=D, hidden_dim=H, num_experts=E, activation=activation, bias=bias
        ),
        shared_experts=shared_experts(embed_dim=D, shared_hidden_dim=7)
        if shared != "none"
        else None,
        shared_gate=nn.Linear(D, 1, bias=False) if shared == "gated" else None,
        score_position=score_position,
    )
    return randomise(moe).to(dtype)
