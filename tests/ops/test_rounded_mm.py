"""Half precision on a CPU: the loop's answers in few shapes."""

import pytest
import torch
from helpers import assert_near

from moe_builders.ops.grouped_mm import grouped_mm
from moe_builders.ops.product_ways import way_of_groups
from moe_builders.ops.rounded_mm import rounded

HALVES = [torch.bfloat16, torch.float16]
CASES = {  # rows of each expert, dead rows at the end
    "room behind": ([40, 3, 70, 33], 100),
    "no room at the end": ([40, 3, 70, 33], 0),
    "little room": ([40, 3, 70, 33], 5),
    "empty ones": ([0, 64, 0, 0, 7, 0], 50),
    "fits exactly": ([32, 64, 320], 0),
    "hundreds": ([300, 257, 700, 1], 20),
    "all dead": ([0, 0], 9),
}


def inputs(counts, dead, dtype, i=16, o=24):
    a, live = sum(counts) + dead, sum(counts)
    x, weight, grad = (torch.randn(s) for s in ((a, i), (len(counts), o, i), (a, o)))
    x, weight, grad = (t.to(dtype) for t in (x, weight, grad))
    x[live:] = grad[live:] = float("nan")
    return x, weight, grad, torch.tensor(counts, dtype=torch.int32), live


def run(x, weight, counts, grad, backend):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = grouped_mm(x, weight, counts, backend=backend)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("numbers", "dead"), CASES.values(), ids=CASES.keys())
def test_equal_to_the_exact_answer_rounded_once(numbers, dead, dtype):
    x, weight, grad, counts, live = inputs(numbers, dead, dtype)
    got = run(x, weight, counts, grad, "auto")
    exact = run(x.double(), weight.double(), counts, grad.double(), "loop")
    for name, one, wanted in zip(("y", "x.grad", "weight.grad"), got, exact, strict=True):
        assert one.dtype == dtype
        assert_near(one.double(), wanted, torch.finfo(dtype).eps, name)
    for rows in got[:2]:
        assert torch.equal(rows[live:], torch.zeros_like(rows[live:])), "dead rows are zero"
    for expert, number in enumerate(numbers):
        if number == 0:
            assert not got[2][expert].any()


def test_neighbours_with_nan_stay_where_they_are():
    """A NaN of one expert's row spoils that row and that expert's gradient alone."""
    x, weight, grad, counts, _ = inputs([40, 3, 70], 0, torch.bfloat16)
    x[41] = float("nan")
    y, x_grad, weight_grad = run(x, weight, counts, grad, "auto")
    assert y.isnan().any(1).nonzero().flatten().tolist() == [41]
    assert not x_grad.isnan().any()
    assert [g.isnan().any().item() for g in weight_grad] == [False, True, False]


def test_new_numbers_of_rows_are_no_new_shapes(monkeypatch):
    shapes, product = set(), torch.mm

    def watched(first, second, **kwargs):
        shapes.add((*first.shape, *second.shape))
        return product(first, second, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    stream = torch.Generator().manual_seed(0)
    for _ in range(20):
        numbers = torch.randint(200, 321, (16,), generator=stream).tolist()
        x, weight, grad, counts, _ = inputs(numbers, 0, torch.bfloat16)
        run(x, weight, counts, grad, "auto")
    # 224, 256, 288, 320 rows, in three products
    assert len(shapes) == 4 * 3


def test_rounding_by_hand():
    pairs = {0: 0, 1: 32, 32: 32, 33: 64, 255: 256, 256: 256, 257: 288, 511: 512, 513: 576,
             1025: 1152, 4096: 4096, 4097: 4608}  # fmt: skip
    assert {rows: rounded(rows) for rows in pairs} == pairs
    for rows in range(1, 5000):
        assert rows <= rounded(rows) <= max(rows + 31, rows * 9 / 8)
    assert len({rounded(rows) for rows in range(1, 2**14)}) < 70


def test_only_half_precision_on_a_cpu_is_rounded():
    x, weight = torch.ones(4, 8), torch.ones(2, 16, 8)
    for dtype in (*HALVES, torch.float32, torch.float64):
        for device in ("cpu", "meta", "cuda"):
            way = way_of_groups("auto", x.to(dtype), weight.to(dtype), device=torch.device(device))
            assert (way.name == "rounded") == (dtype in HALVES and device == "cpu")
