"""The fused op against the same sums written out: values, gradients, what is kept, odd cases."""

import dataclasses

import pytest
import torch
from helpers import assert_near
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders.dispatch import Assigned, dispatch_locally
from moe_builders.experts import GroupedExperts
from moe_builders.ops import routed_blocks
from moe_builders.ops.activations import (
    ACTIVATIONS,
    Activation,
    gpt_oss_swiglu,
    is_named,
    limited_swiglu,
)
from moe_builders.ops.permute import sort_by_expert
from moe_builders.ops.routed_experts import ExpertWeights, routed_experts
from moe_builders.ops.routed_passes import LEARNING, Given

T, K, E, D, H = 23, 3, 6, 8, 12
WEIGHTS = ("input_weights", "row_weights", "output_weights")
KINDS = {**ACTIVATIONS, "limited_swiglu": limited_swiglu(limit=0.5)}


@pytest.fixture(autouse=True, params=["whole", "blocks"])
def in_blocks(request, monkeypatch):
    """Everything here also for some experts at a time, as on a CPU with more rows."""
    if request.param == "blocks":
        monkeypatch.setattr(routed_blocks, "ROWS", 8)


def assigned_of(*, weights=WEIGHTS, slots=True, dead=True, idle=True, dtype=torch.float64, t=T):
    """Ragged: expert 1 is idle, some choices are dropped."""
    scores = torch.rand(t, E)
    if idle:
        scores[:, 1] = -1
    live = torch.rand(t, K) > 0.2 if dead else None
    found = sort_by_expert(scores.topk(K).indices, E, live)
    there = torch.arange(t * K) < found.num_tokens_per_expert.sum()
    given = {name: (torch.rand(t * K, dtype=dtype) + 0.5) * there for name in weights}
    slot_of = found.slot_of if slots else None
    return Assigned(found.token_index, found.num_tokens_per_expert, slot_of, **given)


def experts_of(activation="swiglu", *, bias=True, scale=True, dtype=torch.float64, **more):
    experts = GroupedExperts(
        dim=D, hidden_dim=H, num_experts=E, activation=activation, bias=bias, hidden_scale=scale,
        **more,
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return experts


def written_out(experts):
    """The same experts with an activation that the fused op does not know."""
    own = dataclasses.replace(
        experts.activation, function=lambda z, f=experts.activation.function: f(z)
    )
    assert not is_named(own)
    twin = GroupedExperts(
        dim=D, hidden_dim=H, num_experts=E, activation=own,
        bias=experts.down_bias is not None, hidden_scale=experts.hidden_scale is not None,
    )  # fmt: skip
    twin.load_state_dict(experts.state_dict())
    return twin.to(experts.down_proj.dtype)


def run(experts, x, assigned, grad):
    """Output and all gradients, by name."""
    x = x.clone().requires_grad_()
    leaves = {
        name: weights.clone().requires_grad_()
        for name in WEIGHTS
        if (weights := getattr(assigned, name)) is not None
    }
    experts.zero_grad()
    y = dispatch_locally(x, dataclasses.replace(assigned, **leaves), experts)
    y.backward(grad)
    return {
        "y": y.detach(),
        "x": x.grad,
        **{name: leaf.grad for name, leaf in leaves.items()},
        **{name: p.grad.clone() for name, p in experts.named_parameters()},
    }


def compare(experts, assigned, *, tolerance, dtype=torch.float64, t=T):
    x, grad = torch.randn(t, D, dtype=dtype), torch.randn(t, D, dtype=dtype)
    found = run(experts, x, assigned, grad)
    wanted = run(written_out(experts), x, assigned, grad)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert_near(found[name], value, tolerance, name)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("slots", [True, False], ids=["slots", "any number"])
@pytest.mark.parametrize("recompute_up", [True, False], ids=["recompute", "keep"])
def test_equals_the_sums_written_out(kind, slots, recompute_up):
    experts = experts_of(kind, recompute_up=recompute_up)
    assert experts.takes_tokens
    compare(experts, assigned_of(slots=slots), tolerance=1e-12)


@pytest.mark.parametrize("weights", [(), *((name,) for name in WEIGHTS), WEIGHTS[1:]])
@pytest.mark.parametrize("parts", ["plain", "biases", "scale"])
def test_equals_them_with_any_part_left_out(weights, parts):
    experts = experts_of(bias=parts == "biases", scale=parts == "scale")
    compare(experts, assigned_of(weights=weights), tolerance=1e-12)
    compare(experts, assigned_of(weights=weights, dead=False, idle=False), tolerance=1e-12)


@pytest.mark.parametrize("backend", ["grouped", "loop", "auto", "bmm"])
def test_equals_them_in_fp32_whatever_multiplies(backend):
    experts = experts_of(dtype=torch.float32, backend=backend)
    compare(experts, assigned_of(dtype=torch.float32), tolerance=1e-5, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_nearer_to_fp32_than_when_written_out(dtype):
    wide = experts_of("swiglu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(parameter.to(dtype))
    half = experts_of("swiglu", dtype=dtype)
    half.load_state_dict(wide.state_dict())
    assigned = assigned_of(dtype=torch.float32, t=300)
    x, grad = torch.randn(300, D).to(dtype), torch.randn(300, D).to(dtype)
    exact = run(wide, x.float(), assigned, grad.float())
    fused, plain = run(half, x, assigned, grad), run(written_out(half), x, assigned, grad)
    for name, value in exact.items():
        apart, allowed = ((each[name].float() - value).norm() for each in (fused, plain))
        assert apart <= 1.1 * allowed, name
        assert apart > 0


def test_gradients_by_finite_differences():
    assigned = assigned_of(t=5)
    experts = experts_of("gpt_oss")
    leaves = [torch.randn(5, D, dtype=torch.float64)]
    leaves += [p.detach().clone() for p in experts.parameters()]
    names = [name for name, _ in experts.named_parameters()]

    def answers(x, *parameters):
        return torch.func.functional_call(
            experts, dict(zip(names, parameters, strict=True)),
            (x, assigned.num_tokens_per_expert, assigned.row_weights), {"assigned": assigned},
        )  # fmt: skip

    assert torch.autograd.gradcheck(answers, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "tokens"])
@pytest.mark.parametrize("dead", ["some", "all", "no rows"])
def test_dead_rows_may_hold_anything(dead, rows):
    experts = experts_of()
    t = 0 if dead == "no rows" else 9
    live = torch.zeros(t, K, dtype=torch.bool)
    live[: t // 2] = dead == "some"
    found = sort_by_expert(torch.rand(t, E).topk(K).indices, E, live)
    there = torch.arange(t * K) < found.num_tokens_per_expert.sum()
    weights = torch.rand(t * K, dtype=torch.float64) * there
    tokens, masked = torch.randn(t, D, dtype=torch.float64), ~live.any(-1)
    x = tokens[found.token_index] if rows else tokens.clone()
    nan = ~there if rows else masked
    x[nan] = float("nan")
    grad = torch.randn_like(x)
    grad[nan] = float("nan")
    x.requires_grad_()
    if rows:
        y = experts(x, found.num_tokens_per_expert, weights)
    else:
        assigned = Assigned(
            found.token_index, found.num_tokens_per_expert, found.slot_of,
            input_weights=weights.requires_grad_(), output_weights=weights,
        )  # fmt: skip
        y = dispatch_locally(x, assigned, experts)
    y.backward(grad)
    assert torch.equal(y[nan], torch.zeros_like(y[nan]))
    assert x.grad.isfinite().all()
    for name, parameter in experts.named_parameters():
        assert parameter.grad.isfinite().all(), name
    if not rows:
        assert weights.grad.isfinite().all()


@pytest.mark.parametrize("recompute_up", [True, False])
def test_keeps_tokens_and_pre_activation_alone(recompute_up):
    experts = experts_of(dtype=torch.float32, recompute_up=recompute_up)
    assigned = assigned_of(dtype=torch.float32)
    x, kept = torch.randn(T, D, requires_grad=True), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dispatch_locally(x, assigned, experts)
    given = [x, *experts.parameters(), *(v for v in vars(assigned).values() if v is not None)]
    ours = {tensor.untyped_storage().data_ptr() for tensor in given}
    shapes = [tuple(tensor.shape) for place, tensor in kept.items() if place not in ours]
    assert shapes == ([(0,)] if recompute_up else [(T * K, 2 * H)])


def test_the_same_bits_every_time():
    experts = experts_of(dtype=torch.float32)
    assigned = assigned_of(dtype=torch.float32)
    x, grad = torch.randn(T, D), torch.randn(T, D)
    first, second = (run(experts, x, assigned, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_frozen_costs_nothing():
    experts = experts_of(dtype=torch.float32)
    assigned = assigned_of(weights=WEIGHTS[2:], dtype=torch.float32)
    x = torch.randn(T, D)

    def flops():
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            dispatch_locally(x, assigned, experts).sum().backward()
        return counter.get_total_flops()

    up, down = 2 * T * K * 2 * H * D, 2 * T * K * H * D
    assert flops() == (up + down) + (up + 2 * down)  # x has no gradient
    x.requires_grad_()
    assert flops() == 3 * (up + down)
    experts.gate_up_proj.requires_grad_(False)
    assert flops() == (up + down) + (up + 2 * down)
    experts.recompute_up = True
    assert flops() == (up + down) + (2 * up + 2 * down)


@pytest.mark.parametrize("slots", [True, False])
def test_torch_agrees_with_what_it_was_told(slots):
    assigned = assigned_of(slots=slots, dtype=torch.float32)
    experts = experts_of(dtype=torch.float32, backend="loop")
    weights = [
        getattr(experts, name)
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "hidden_scale")
    ]
    x = torch.randn(T, D, requires_grad=True)
    torch.library.opcheck(
        torch.ops.moe_builders.routed_experts.default,
        (x, *weights, assigned.num_tokens_per_expert, assigned.token_index, assigned.slot_of,
         *(getattr(assigned, name) for name in WEIGHTS), "swiglu", [], False, "loop", "auto"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype):
    experts = experts_of(dtype=dtype)
    assigned = assigned_of(dtype=torch.float32)
    x, grad = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    wanted = run(experts, x, assigned, grad)
    experts.compile(fullgraph=True, backend="aot_eager")
    found = run(experts, x, assigned, grad)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_an_answer_that_nobody_uses_has_no_gradient():
    experts = experts_of(dtype=torch.float32)
    weights = ExpertWeights(experts.gate_up_proj, experts.down_proj)
    counts = torch.tensor([1, 2, 0, 0, 0, 0])
    y = routed_experts(torch.randn(3, D), weights, counts, activation=ACTIVATIONS["swiglu"])
    (y.detach().sum() + experts.down_bias.sum()).backward()
    assert experts.gate_up_proj.grad is None


@pytest.mark.parametrize(
    "own",
    [
        Activation("swiglu", gated=True, function=ACTIVATIONS["geglu"].function),
        dataclasses.replace(ACTIVATIONS["gpt_oss"], function=limited_swiglu(limit=0.5).function),
        dataclasses.replace(
            ACTIVATIONS["gpt_oss"], function=gpt_oss_swiglu(limit=0.1, alpha=1.0).function
        ),
        Activation("gpt_oss", gated=True, function=gpt_oss_swiglu(limit=0.1).function),
    ],
    ids=["another's", "another's with numbers", "other numbers", "no numbers"],
)
def test_a_known_name_does_not_take_the_place_of_ones_own_function(own):
    assert not is_named(own)
    experts, assigned = experts_of(own), assigned_of()
    assert not experts.takes_tokens
    compare(experts, assigned, tolerance=1e-12)


def test_backward_is_not_given_zeros_for_what_has_no_gradient():
    experts = experts_of(dtype=torch.float32, recompute_up=False)
    assigned = assigned_of(dtype=torch.float32)
    y = dispatch_locally(torch.randn(T, D), assigned, experts)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "zeros" in str(function):
                made.append(tuple(args[0]))
            return function(*args, **(kwargs or {}))

    with Watch():
        y.backward(torch.ones_like(y))
    assert (T * K, 2 * H) not in made


def test_gradients_have_the_dtype_that_compiled_code_was_promised():
    experts = experts_of(dtype=torch.bfloat16)
    assigned = assigned_of(dtype=torch.bfloat16)
    given = Given(
        torch.randn(T, D).bfloat16(), experts.gate_up_proj, experts.down_proj,
        experts.gate_up_bias, experts.down_bias, experts.hidden_scale,
        assigned.num_tokens_per_expert, assigned.token_index, assigned.slot_of,
        *(getattr(assigned, name) for name in WEIGHTS),
    )  # fmt: skip
    values = ("swiglu", [], False, "auto", "auto")
    with torch.no_grad():
        y, z = torch.ops.moe_builders.routed_experts(*given, *values)
        found = torch.ops.moe_builders.routed_experts_backward(
            *given, *values, torch.ones_like(y), z, list(LEARNING)
        )
    for name, gradient in zip(LEARNING, found, strict=True):
        assert gradient.dtype == torch.bfloat16, name
        assert gradient.shape == getattr(given, name).shape, name


def test_the_gradient_that_arrives_is_not_written_to():
    """It may belong to others, dead rows and all."""
    experts, counts = experts_of(), torch.tensor([2, 0, 3, 0, 0, 1])
    x, grad = (torch.randn(9, D, dtype=torch.float64) for _ in range(2))
    kept = grad.clone()
    experts(x, counts).backward(grad)
    assert torch.equal(grad, kept)
