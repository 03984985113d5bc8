"""The padded product against a loop over experts: any counts, any dead rows, nothing in vain."""

import pytest
import torch
from helpers import assert_near, quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.ops.grouped_mm import _grouped_mm, _grouped_mm_weight_grad
from moe_builders.ops.padded_mm import padded_mm, padded_weight_grad

IN, OUT = 5, 7
NAN = float("nan")


def made(counts, dead, dtype=torch.float64):
    a = sum(counts) + dead
    x, grad = torch.randn(a, IN, dtype=dtype), torch.randn(a, OUT, dtype=dtype)
    x[sum(counts) :] = NAN
    grad[sum(counts) :] = NAN
    weight = torch.randn(len(counts), OUT, IN, dtype=dtype)
    return x, grad, weight, torch.tensor(counts, dtype=torch.int32)


def by_hand(x, grad, weight, counts):
    y, weight_grad = x.new_zeros(x.shape[0], OUT), torch.zeros_like(weight)
    start = 0
    for expert, rows in enumerate(counts):
        for row in range(start, start + rows):
            y[row] = weight[expert] @ x[row]
            weight_grad[expert] += torch.outer(grad[row], x[row])
        start += rows
    return y, weight_grad


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 4))
def test_any_counts(counts, dead):
    x, grad, weight, number = made(counts, dead)
    y, weight_grad = padded_mm(x, weight, number), padded_weight_grad(grad, x, number)
    wanted_y, wanted_grad = by_hand(x, grad, weight, counts)
    assert_near(y, wanted_y, 1e-12)
    assert_near(weight_grad, wanted_grad, 1e-12)
    assert not y[sum(counts) :].any()
    assert not weight_grad[number == 0].any()


def test_what_stands_in_for_missing_rows_reaches_nobody():
    x, grad, weight, number = made([1, 3, 0], 1)
    x[0], grad[0], weight[2] = NAN, NAN, NAN  # the stand-in is the first row; expert 2 is idle
    y, weight_grad = padded_mm(x, weight, number), padded_weight_grad(grad, x, number)
    assert y.isnan().any(1).tolist() == [True, False, False, False, False]
    assert weight_grad.isnan().flatten(1).any(1).tolist() == [True, False, False]


def test_equal_numbers_of_rows_are_not_copied(monkeypatch):
    x, grad, weight, number = made([3, 3, 3], 2)
    products, product = [], torch.bmm

    def watched(first, second, **out):
        products.append((first, second))
        return product(first, second, **out)

    monkeypatch.setattr(torch, "bmm", watched)
    monkeypatch.setattr("moe_builders.ops.padded_mm._find_places", None)
    y, weight_grad = padded_mm(x, weight, number), padded_weight_grad(grad, x, number)
    (rows, _), (left, right) = products
    assert rows.data_ptr() == right.data_ptr() == x.data_ptr()
    assert left.data_ptr() == grad.data_ptr()
    wanted = by_hand(x, grad, weight, [3, 3, 3])
    assert_near(y, wanted[0], 1e-12)
    assert_near(weight_grad, wanted[1], 1e-12)


def test_one_product_whatever_the_counts(monkeypatch):
    calls, product = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: calls.append(1) or product(*a, **k))
    monkeypatch.setattr(torch, "mm", None)
    x, grad, weight, number = made([4, 0, 2, 1], 3)
    _grouped_mm(x, weight, number, "bmm")
    assert len(calls) == 1
    _grouped_mm_weight_grad(grad, x, number, "bmm")
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_what_they_promise_the_compiler(dtype):
    x, _, weight, number = made([4, 0, 2, 1], 3, dtype)
    args = (x.nan_to_num().requires_grad_(), weight.requires_grad_(), number, "bmm")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_grouped_mm, args, test_utils=checks)
