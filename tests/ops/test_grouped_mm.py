"""Grouped matrix product: both back ends, by a row-by-row reference, in every odd case."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near

from moe_builders.errors import InputError
from moe_builders.ops.grouped_mm import (
    _grouped_mm,
    _grouped_mm_weight_grad,
    grouped_mm,
    multiply_groups,
    multiply_transposed,
)
from moe_builders.ops.product_ways import way_of_groups, way_of_transposed

CASES = {  # rows of each expert, dead rows at the end
    "ragged": ([3, 1, 5, 2], 0),
    "dead rows": ([3, 1, 5, 2], 4),
    "first empty": ([0, 4, 1, 3], 2),
    "last empty": ([4, 1, 3, 0], 2),
    "inner empty": ([4, 0, 0, 3], 1),
    "all in one": ([0, 0, 9, 0], 0),
    "all dead": ([0, 0, 0, 0], 5),
    "no rows": ([0, 0, 0, 0], 0),
}


def plain(x, weight, counts):
    """Row by row."""
    expert = [j for j, n in enumerate(counts) for _ in range(n)]
    rows = [weight[j] @ x[row] for row, j in enumerate(expert)]
    rows += [x.new_zeros(weight.shape[1])] * (x.shape[0] - len(expert))
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def inputs(counts, dead, *, dtype=torch.float32, i=8, o=12):
    a, live = sum(counts) + dead, sum(counts)
    x = torch.randn(a, i, dtype=dtype)
    weight = torch.randn(len(counts), o, i, dtype=dtype)
    grad = torch.randn(a, o, dtype=dtype)
    return x, weight, grad, torch.tensor(counts, dtype=torch.int32), live


def forward_backward(x, weight, counts, grad, backend):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = grouped_mm(x, weight, counts, backend=backend)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("backend", ["grouped", "loop", "bmm"])
@pytest.mark.parametrize(("counts", "dead"), CASES.values(), ids=CASES.keys())
def test_both_ways_equal_the_row_by_row_product(counts, dead, backend):
    x, weight, grad, counts_tensor, live = inputs(counts, dead)
    reference_x, reference_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wanted = plain(reference_x, reference_weight, counts)
    if live:
        (wanted * grad)[:live].sum().backward()
    x[live:] = float("nan")  # dead rows may hold anything, the incoming gradient's too
    grad[live:] = float("nan")
    y, x_grad, weight_grad = forward_backward(x, weight, counts_tensor, grad, backend)

    assert torch.equal(y[live:], torch.zeros(dead, 12))
    assert torch.equal(x_grad[live:], torch.zeros(dead, 8))
    assert_near(y, wanted.detach(), 1e-5, "y")
    if live:
        assert_near(x_grad, reference_x.grad, 1e-5, "x.grad")
        assert_near(weight_grad, reference_weight.grad, 1e-5, "weight.grad")
    for expert, rows in enumerate(counts):
        if rows == 0:
            assert torch.equal(weight_grad[expert], torch.zeros(12, 8))


def test_what_the_kernel_leaves_in_dead_rows_is_selected_away(monkeypatch):
    kernel = F.grouped_mm

    def dirty(first, second, *, offs):
        y = kernel(first, second, offs=offs)
        if second.ndim == 3:
            y[offs[-1] :] = float("nan")  # on a bad day, what stood in that memory
        return y

    monkeypatch.setattr(F, "grouped_mm", dirty)
    x, weight, grad, counts, live = inputs(*CASES["dead rows"])
    y, x_grad, _ = forward_backward(x, weight, counts, grad, "grouped")
    assert torch.equal(y[live:], torch.zeros(4, 12))
    assert torch.equal(x_grad[live:], torch.zeros(4, 8))


@pytest.mark.parametrize("backend", ["grouped", "loop", "bmm"])
def test_a_sums_expanded_gradient(backend):
    x, weight, _, counts, _ = inputs(*CASES["dead rows"])
    wanted = forward_backward(x, weight, counts, torch.ones(x.shape[0], 12), backend)
    expanded = torch.ones(()).expand(x.shape[0], 12)
    assert expanded.stride() == (0, 0)
    for got, want in zip(
        forward_backward(x, weight, counts, expanded, backend), wanted, strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["grouped", "loop", "bmm"])
def test_a_transposed_view_is_used_as_it_is(backend):
    x, weight, grad, counts, _ = inputs(*CASES["inner empty"])
    wanted = forward_backward(x, weight, counts, grad, backend)
    base = weight.transpose(1, 2).contiguous().requires_grad_()  # [e, i, o]
    view = base.transpose(1, 2)
    assert not view.is_contiguous()
    y = grouped_mm(x, view, counts, backend=backend)
    y.backward(grad)
    assert_near(y.detach(), wanted[0], 1e-6)
    assert_near(base.grad.transpose(1, 2), wanted[2], 1e-6)


def ways(dtype, i, o, device):
    """Of y and of the gradients of x and weight."""
    x, weight, grad, _, _ = inputs(*CASES["dead rows"], dtype=dtype, i=i, o=o)
    return [
        way_of_groups("auto", x, weight, device=device).name,
        way_of_groups("auto", grad, weight.transpose(1, 2), device=device).name,
        way_of_transposed("auto", grad, x, device=device).name,
    ]


def test_auto_takes_the_kernel_where_it_fits_and_the_loop_elsewhere():
    gpu = torch.device("cuda")
    assert ways(torch.float32, 8, 12, gpu) == ["grouped"] * 3
    assert ways(torch.bfloat16, 8, 16, gpu) == ["grouped"] * 3
    assert ways(torch.float64, 8, 12, gpu) == ["loop"] * 3
    assert ways(torch.float32, 7, 5, gpu) == ["loop"] * 3
    assert ways(torch.bfloat16, 4, 12, gpu) == ["loop"] * 3  # 8 and 24 bytes
    assert ways(torch.float32, 8, 5, gpu) == ["grouped", "loop", "loop"]  # x' rows are aligned


def test_a_cpu_goes_expert_by_expert():
    cpu = torch.device("cpu")
    assert ways(torch.float32, 8, 12, cpu) == ["loop"] * 3
    assert ways(torch.float64, 7, 5, cpu) == ["loop"] * 3
    assert ways(torch.bfloat16, 8, 16, cpu) == ["rounded"] * 3


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_products_are_written_where_they_are_told_to(backend):
    x, weight, grad, counts, _ = inputs(*CASES["dead rows"], dtype=torch.float32, i=8, o=16)
    room, room_grad = torch.full_like(grad, torch.nan), torch.full_like(weight, torch.nan)
    assert multiply_groups(x, weight, counts, backend, room) is room
    assert multiply_transposed(grad, x, counts, backend, room_grad) is room_grad
    assert torch.equal(room, multiply_groups(x, weight, counts, backend))
    assert torch.equal(room_grad, multiply_transposed(grad, x, counts, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    x, weight, _, counts, _ = inputs(*CASES["dead rows"], i=64, o=16)
    x, weight = x.to(dtype), weight.to(dtype)
    exact = plain(x.double(), weight.double(), CASES["dead rows"][0])
    for backend in ("grouped", "loop", "bmm"):
        y = grouped_mm(x, weight, counts, backend=backend)
        assert y.dtype == dtype
        assert_near(y.double(), exact, torch.finfo(dtype).eps)


def test_gradients_by_differences():
    x, weight, _, counts, _ = inputs([2, 0, 3], 2, dtype=torch.float64, i=3, o=4)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, counts), (x, weight))


def test_only_the_wanted_gradient_is_computed():
    x, weight, grad, counts, _ = inputs(*CASES["ragged"])
    wanted = forward_backward(x, weight, counts, grad, "loop")
    frozen = weight.clone()
    y = grouped_mm(x.requires_grad_(), frozen, counts, backend="loop")
    y.backward(grad)
    assert torch.equal(x.grad, wanted[1])
    assert frozen.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_keep_what_they_promise_the_compiler(dtype):
    x, weight, grad, counts, _ = inputs(*CASES["dead rows"], dtype=dtype)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (x.requires_grad_(), weight.requires_grad_(), counts, "auto")
    torch.library.opcheck(_grouped_mm, args, test_utils=checks)
    args = (grad, x.detach(), counts, "auto")
    torch.library.opcheck(_grouped_mm_weight_grad, args, test_utils=checks)


def test_compiled_in_fp32_without_a_graph_break():
    x, weight, grad, counts, live = inputs(*CASES["dead rows"])
    x[live:] = float("nan")

    def layer(x, weight, counts):
        return grouped_mm(x, weight, counts).sin()

    eager = [t.clone().requires_grad_() for t in (x, weight)]
    compiled = [t.clone().requires_grad_() for t in (x, weight)]
    wanted = layer(*eager, counts)
    got = torch.compile(layer, fullgraph=True)(*compiled, counts)
    wanted.backward(grad)
    got.backward(grad)
    assert_near(got.detach(), wanted.detach(), 1e-6)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert_near(ours.grad, theirs.grad, 1e-6)


@pytest.mark.parametrize(
    ("x", "weight", "counts", "backend", "message"),
    [
        ((4, 7), (2, 4, 7), 2, "grouped", "multiple of 16 bytes"),
        ((4, 8), (2, 4, 8), 2, "fast", "'fast' is not one of auto, grouped, loop, bmm, gather"),
        ((4, 8), (2, 4, 7), 2, "auto", r"\(4, 8\) and \(2, 4, 7\)"),
        ((4, 8), (4, 8), 2, "auto", "weight"),
        ((4, 8), (2, 4, 8), 3, "auto", "holds 2 experts"),
    ],
)
def test_refused(x, weight, counts, backend, message):
    counts = torch.ones(counts, dtype=torch.int32)
    with pytest.raises(InputError, match=message):
        grouped_mm(torch.zeros(x), torch.zeros(weight), counts, backend=backend)


def test_the_kernel_is_refused_fp64():
    with pytest.raises(InputError, match="float64"):
        grouped_mm(
            torch.zeros(4, 8, dtype=torch.float64),
            torch.zeros(1, 8, 8, dtype=torch.float64),
            torch.tensor([4]),
            backend="grouped",
        )
