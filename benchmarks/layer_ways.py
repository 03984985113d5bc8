"""One MoE layer in several ways, all on the same weights, tokens and choices.

Letters: t tokens · k experts_per_token · a = t·k assignments · e experts · d dim · h hidden_dim.

Routing is given as ids [t, k] and weights [t, k], so that no gate is measured and all ways have
the same load. What a way does to sort the assignments is part of it. The experts are SwiGLU without
biases, whatever a released model of that size has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.experts.liger import check_rows, find_liger, fused_experts
from moe_builders.moe import MoE
from moe_builders.ops.activations import Activation, swiglu
from moe_builders.ops.permute import combine_rows, gather_rows, sort_by_expert
from moe_builders.routing import Routing, TokenInfo, route_by_choice

Answer = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """Of a layer: d, h, e, k."""

    dim: int
    hidden: int
    experts: int
    k: int

    def flops(self, tokens: int, *, backward: bool) -> float:
        """Of the products alone: 6·a·d·h forward, 12·a·d·h backward."""
        return (18 if backward else 6) * tokens * self.k * self.dim * self.hidden


@dataclass(frozen=True)
class Problem:
    """What every way gets.

    Attributes:
        size: of the layer.
        x: [t, d], wants a gradient.
        ids: [t, k] int64, distinct in a row.
        weights: [t, k] fp32, wants a gradient.
        gate_up: [e, 2h, d], gate rows first.
        down: [e, d, h].
        grad: [t, d], of the answer.
    """

    size: Size
    x: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: nn.Parameter
    down: nn.Parameter
    grad: Tensor


@dataclass(frozen=True)
class Way:
    """A way to compute the layer.

    Attributes:
        forward: one forward that keeps what its backward needs.
        both: a forward and its backward.
        leaves: where the gradients are: x, weights, gate_up, down; {} where this is another layer,
            or no layer at all.
        same: it computes the layer: its answer and gradients can be compared.
        parameters: no activations.
        products: these FLOPs are the layer's, so that a rate means something.
    """

    forward: Answer
    both: Callable[[], object]
    leaves: dict[str, Tensor]
    same: bool = True
    parameters: tuple[Tensor, ...] = ()
    products: bool = True

    def clear(self) -> None:
        """Free all gradients."""
        for leaf in (*self.leaves.values(), *self.parameters):
            leaf.grad = None


def make_problem(
    size: Size, ids: Tensor, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Random weights and tokens for given choices.

    Numbers are such that answers are of order 1 and gradients do not vanish.
    """
    stream = torch.Generator(device).manual_seed(seed)
    t, d, h, e = ids.shape[0], size.dim, size.hidden, size.experts

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.normal_(0, scale, generator=stream)

    weights = torch.empty(ids.shape, device=device).exponential_(generator=stream)  # [t, k]
    weights = weights / weights.sum(-1, keepdim=True)
    return Problem(
        size=size,
        x=drawn(t, d).requires_grad_(),
        ids=ids.to(device),
        weights=weights.requires_grad_(),
        gate_up=nn.Parameter(drawn(e, 2 * h, d, scale=d**-0.5)),
        down=nn.Parameter(drawn(e, d, h, scale=h**-0.5)),
        grad=drawn(t, d),
    )


def with_ids(problem: Problem, ids: Tensor, seed: int) -> Problem:
    """The same weights for other choices and other tokens."""
    nothing = replace(problem.size, experts=0)  # draws tokens alone
    fresh = make_problem(nothing, ids, dtype=problem.x.dtype, device=problem.x.device, seed=seed)
    return replace(fresh, size=problem.size, gate_up=problem.gate_up, down=problem.down)


def draw_ids(size: Size, tokens: int, kind: str, *, seed: int = 0) -> Tensor:
    """[t, k] choices, distinct in a row.

    Args:
        size: of the layer.
        tokens: t.
        kind: "uniform": every expert is as likely; "zipf": the n-th most liked one is 1/n as likely
            as the first (before a token's experts have to differ); "balanced": in turn, loads
            differ by one at most; "ragged": uniform, but every third expert gets nothing where
            enough are left.
        seed: of the draw.
    """
    stream = torch.Generator().manual_seed(seed)
    e, k = size.experts, size.k
    if kind == "balanced":
        return (torch.arange(tokens)[:, None] * k + torch.arange(k)) % e  # [t, k]
    liking = torch.zeros(e)
    if kind == "zipf":
        ranks = torch.randperm(e, generator=stream) + 1
        liking = -ranks.float().log()
    elif kind == "ragged":
        idle = torch.arange(e) % 3 == 2
        if e - int(idle.sum()) >= k:
            liking = torch.where(idle, -torch.inf, liking)
    # Gumbel noise: the k largest are a draw without replacement
    noise = -torch.empty(tokens, e).exponential_(generator=stream).log()
    return (liking + noise).topk(k, dim=-1).indices


class GivenRouter(nn.Module):
    """Routes as it was told; its answer has no gate behind it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token = problem.size.experts, problem.size.k
        self.ids, self.weights = problem.ids, problem.weights
        shape = (problem.ids.shape[0], problem.size.experts)
        self.zeros = problem.weights.detach().new_zeros(shape)  # [t, e] nobody reads them

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x: [t, d]."""
        return route_by_choice(
            expert=self.ids, weights=self.weights, logits=self.zeros, probs=self.zeros, info=info
        )


def _grouped_experts(
    problem: Problem, backend: str, activation: str | Activation = "swiglu"
) -> GroupedExperts:
    with torch.device("meta"):
        experts = GroupedExperts(
            dim=problem.size.dim, hidden_dim=problem.size.hidden,
            num_experts=problem.size.experts, backend=backend, activation=activation,
        )  # fmt: skip
    experts.gate_up_proj, experts.down_proj = problem.gate_up, problem.down
    return experts


def _by_autograd(problem: Problem, forward: Answer, weights: Tensor | None = None) -> Way:
    def both() -> None:
        forward().backward(problem.grad)

    leaves = {
        "x": problem.x, "weights": problem.weights if weights is None else weights,
        "gate_up": problem.gate_up, "down": problem.down,
    }  # fmt: skip
    return Way(forward, both, leaves, parameters=(problem.gate_up, problem.down))


def ours(problem: Problem, backend: str = "auto") -> Way:
    """The package's layer as it is."""
    layer = MoE(router=GivenRouter(problem), experts=_grouped_experts(problem, backend))

    def forward() -> Tensor:
        answer = layer(problem.x)
        layer.last_routing = None  # a reader's, not the backward's
        return answer

    return _by_autograd(problem, forward)


def loop(problem: Problem) -> Way:
    """The package's layer, one product an expert."""
    return ours(problem, "loop")


def plain(problem: Problem) -> Way:
    """The package's parts one by one: rows copied, experts on rows, rows added up.

    The activation is one that only autograd can differentiate: nothing is fused.
    """
    experts = _grouped_experts(problem, "auto", Activation("plain_swiglu", True, swiglu))

    def forward() -> Tensor:
        found = sort_by_expert(problem.ids, problem.size.experts, None)
        rows = gather_rows(problem.x, found.token_index, found.slot_of)  # [a, d]
        answers = experts(rows, found.num_tokens_per_expert)  # [a, d]
        weights = problem.weights.flatten().index_select(0, found.order)  # [a]
        return combine_rows(answers, weights, found.token_index, found.slot_of, problem.x.shape[0])

    return _by_autograd(problem, forward)


def _transformers(problem: Problem, implementation: str) -> Way:
    """Qwen3's experts; weights come in x's dtype, as its gate gives them."""
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    size = problem.size
    config = transformers.Qwen3MoeConfig(
        hidden_size=size.dim, moe_intermediate_size=size.hidden, num_experts=size.experts,
        num_experts_per_tok=size.k,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = problem.gate_up, problem.down
    weights = problem.weights.detach().to(problem.x.dtype).requires_grad_()
    return _by_autograd(problem, lambda: experts(problem.x, problem.ids, weights), weights)


def hf_grouped(problem: Problem) -> Way:
    """transformers' experts, grouped product."""
    return _transformers(problem, "grouped_mm")


def hf_eager(problem: Problem) -> Way:
    """transformers' experts, an expert at a time."""
    return _transformers(problem, "eager")


def liger(problem: Problem) -> Way:
    """Liger's fused experts (Triton)."""
    try:
        find_liger()
        check_rows(problem.x.device, problem.x.dtype)
    except InputError as error:
        raise NotHere(str(error)) from error
    weights = problem.weights.detach().to(problem.x.dtype).requires_grad_()

    def forward() -> Tensor:
        return fused_experts(problem.x, problem.gate_up, problem.down, problem.ids, weights)

    return _by_autograd(problem, forward, weights)


_GROUP = 256  # tokens that share st-moe's capacity


def st_moe(problem: Problem) -> Way:
    """st-moe-pytorch: its own gate, GEGLU with biases, and a capacity of 1.25 times the mean load.

    Another layer of the same size: its answer is not compared, and what exceeds the capacity is
    dropped.
    """
    try:
        import st_moe_pytorch
    except ImportError as error:
        raise NotHere(f"st-moe-pytorch cannot be imported ({error})") from error
    size, x = problem.size, problem.x
    group = min(_GROUP, x.shape[0])
    if x.shape[0] % group:
        raise NotHere(f"{x.shape[0]} tokens are no whole groups of {group}")
    layer = st_moe_pytorch.MoE(
        dim=size.dim, num_experts=size.experts, gating_top_n=size.k,
        expert_hidden_mult=(size.hidden + 0.5) * 1.5 / size.dim, threshold_train=0.0,
        capacity_factor_train=1.25 * size.k, is_distributed=False,
    ).to(x)  # fmt: skip
    rows, grad = x.view(-1, group, size.dim), problem.grad.view(-1, group, size.dim)

    def forward() -> Tensor:
        return layer(rows).outputs

    def both() -> None:
        forward().backward(grad)

    return Way(forward, both, {"x": x}, same=False, parameters=tuple(layer.parameters()),
               products=False)  # fmt: skip


def _given_rows(problem: Problem) -> tuple[dict[str, Tensor], Tensor]:
    """What the products of a layer are given, random, and the counts."""
    a, size = problem.ids.numel(), problem.size
    made = {
        name: torch.randn(a, width, device=problem.x.device).to(problem.x.dtype)
        for name, width in (
            ("x", size.dim), ("a", size.hidden), ("dy", size.dim), ("dz", 2 * size.hidden),
        )
    }  # fmt: skip
    return made, sort_by_expert(problem.ids, size.experts, None).num_tokens_per_expert


def bare(problem: Problem) -> Way:
    """torch's grouped product: two forward, four backward, on given tensors; nothing else."""
    rows, counts = _given_rows(problem)
    offsets = counts.cumsum(0, dtype=torch.int32)
    up, down = problem.gate_up.detach(), problem.down.detach()

    def forward() -> Tensor:
        F.grouped_mm(rows["x"], up.transpose(1, 2), offs=offsets)
        return F.grouped_mm(rows["a"], down.transpose(1, 2), offs=offsets)

    def both() -> None:
        forward()
        F.grouped_mm(rows["dy"], down, offs=offsets)
        F.grouped_mm(rows["dy"].t(), rows["a"], offs=offsets)
        F.grouped_mm(rows["dz"], up, offs=offsets)
        F.grouped_mm(rows["dz"].t(), rows["x"], offs=offsets)

    return Way(forward, both, {}, same=False)


def bare_own(problem: Problem) -> Way:
    """The same with the package's product, which takes other roads on a CPU in half precision."""
    rows, counts = _given_rows(problem)
    up, down = problem.gate_up.detach(), problem.down.detach()
    product = torch.ops.moe_builders.grouped_mm
    weight_grad = torch.ops.moe_builders.grouped_mm_weight_grad

    def forward() -> Tensor:
        product(rows["x"], up, counts, "auto")
        return product(rows["a"], down, counts, "auto")

    def both() -> None:
        forward()
        product(rows["dy"], down.transpose(1, 2), counts, "auto")
        weight_grad(rows["dy"], rows["a"], counts, "auto")
        product(rows["dz"], up.transpose(1, 2), counts, "auto")
        weight_grad(rows["dz"], rows["x"], counts, "auto")

    return Way(forward, both, {}, same=False)


def dense(problem: Problem) -> Way:
    """The same FLOPs as one product of all rows with one matrix, and its two backward products."""
    rows, _ = _given_rows(problem)
    d, h = problem.size.dim, problem.size.hidden
    matrix = torch.randn(d, 3 * h, device=problem.x.device).to(problem.x.dtype)  # [d, 3h]
    grad = torch.cat([rows["dz"], rows["a"]], dim=1)  # [a, 3h]

    def forward() -> Tensor:
        return rows["x"] @ matrix

    def both() -> None:
        forward()
        torch.mm(grad, matrix.t())
        torch.mm(rows["x"].t(), grad)

    return Way(forward, both, {}, same=False)


class NotHere(Exception):
    """This way cannot run here; the message says why."""


WAYS: dict[str, Callable[[Problem], Way]] = {
    "ours": ours, "plain": plain, "loop": loop, "hf_grouped": hf_grouped, "hf_eager": hf_eager,
    "liger": liger, "st_moe": st_moe, "bare": bare, "bare_own": bare_own, "dense": dense,
}  # fmt: skip
OWN = ("ours", "plain", "loop", "bare_own")  # that these fail is an error


def reference(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Answer and gradients, an expert at a time, in a wider dtype; no function of the package."""
    x, weights, grad = (v.detach().to(dtype) for v in (problem.x, problem.weights, problem.grad))
    h = problem.size.hidden
    answer, dx, dweights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    d_up, d_down = [], []
    for expert in range(problem.size.experts):
        token, choice = (problem.ids == expert).nonzero(as_tuple=True)
        up, down = (p.detach()[expert].to(dtype) for p in (problem.gate_up, problem.down))
        own, weight, out = x[token], weights[token, choice][:, None], grad[token]
        z = own @ up.t()
        gate, value = z[:, :h], z[:, h:]
        share = gate.sigmoid()
        hidden = gate * share * value
        rows = hidden @ down.t()
        answer.index_add_(0, token, weight * rows)
        dweights[token, choice] = (rows * out).sum(-1)
        d_hidden = (weight * out) @ down
        d_gate = d_hidden * value * share * (1 + gate * (1 - share))
        dz = torch.cat([d_gate, d_hidden * gate * share], dim=1)
        dx.index_add_(0, token, dz @ up)
        d_up.append((dz.t() @ own).float())
        d_down.append(((weight * out).t() @ hidden).float())
    return {"answer": answer, "x": dx, "weights": dweights, "gate_up": torch.stack(d_up),
            "down": torch.stack(d_down)}  # fmt: skip


def error_of(way: Way, wanted: dict[str, Tensor]) -> float:
    """Largest difference over the largest number wanted, of the answer and of every gradient."""
    way.clear()
    got = {"answer": way.forward().detach()}
    way.both()
    got |= {name: leaf.grad for name, leaf in way.leaves.items() if leaf.grad is not None}
    way.clear()
    if got.keys() != wanted.keys():
        raise AssertionError(f"gradients of {sorted(got)}, but {sorted(wanted)} were wanted")
    shares = []
    for name, value in got.items():
        own = wanted[name]
        shares.append((value.to(own.dtype) - own).abs().max().double() / own.abs().max())
    return float(torch.stack(shares).max())  # torch's keeps a NaN, Python's might lose it
