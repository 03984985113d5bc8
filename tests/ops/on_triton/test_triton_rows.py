"""Rows copied, added up, added to, multiplied and blanked: kernels against their twins in fp64."""

import inspect

import pytest
import torch
from helpers import assert_near, quick
from helpers_triton import DEVICES, kernels_run, poisoned
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.ops import row_ops as plain
from moe_builders.ops.permute import sort_by_expert
from moe_builders.ops.triton import row_ops as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 256, 264, 515]  # of a run of columns: a part, all, and a bit more


def some(t, k, d, dtype, device, *, weighted=True):
    """[t, d] tokens, [a, d] rows, where they stand, [a] weights or None."""
    assigned = sort_by_expert(torch.randint(0, 5, (t, k)), 5, None)
    where = assigned.token_index.to(device), assigned.slot_of.to(device)
    x, rows = (torch.randn(n, d).to(dtype).to(device) for n in (t, t * k))
    return x, rows, *where, torch.randn(t * k).to(device) if weighted else None


def wide(value):
    return None if value is None else value.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_taking_is_exact_but_for_one_rounding(device, dtype, d, weighted):
    x, _, token_index, _, weights = some(19, 3, d, dtype, device, weighted=weighted)
    got = kernels.take_rows(x, token_index, weights)
    # a product of two fp32 is exact in fp64; of half precision and fp32 rounded to fp32 first
    exact = plain.take_rows(x if weights is None else x.float(), token_index, weights).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighing_is_exact_but_for_one_rounding(device, dtype):
    for a, d in ((19, 264), (3, 7), (0, 4), (4, 0)):
        rows, weights = torch.randn(a, d).to(dtype).to(device), torch.randn(a).to(device)
        got = kernels.weigh_rows(rows, weights)
        assert torch.equal(got, (rows.float() * weights[:, None]).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_slots(device, dtype, d, weighted):
    _, rows, _, slot_of, weights = some(13, 3, d, dtype, device, weighted=weighted)
    got = kernels.sum_slots(rows, slot_of, weights)
    exact = plain.sum_slots(rows.double(), slot_of, wide(weights))
    twin = plain.sum_slots(rows, slot_of, weights)
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert_near(got.double(), exact, 1e-6)
    else:  # added in fp32: rounded to half precision once, as the twin
        assert (got.double() - exact).abs().max() <= 1.01 * (twin.double() - exact).abs().max()
    if weights is None:  # nothing but additions, in a fixed order, and one rounding
        first, second, third = rows.float()[slot_of].unbind(1)
        assert torch.equal(got, (first + second + third).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_a_tokens_first_choice_is_added_first(device):
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], device=device)
    order = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3], [1, 3, 0, 2]], device=device)
    assert kernels.sum_slots(rows, order).flatten().tolist() == [1.0, 2.0, 0.0]


@quick
@given(
    t=st.integers(0, 40),
    k=st.integers(1, 4),
    d=st.integers(0, 40),
    narrow=st.booleans(),
    weighted=st.booleans(),
)
def test_any_shape(t, k, d, narrow, weighted):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, rows, token_index, slot_of, weights = some(t, k, d, torch.float32, device, weighted=weighted)
    if narrow:
        token_index, slot_of = token_index.int(), slot_of.int()
    with kernels_run(), poisoned():
        taken = kernels.take_rows(x, token_index, weights)
        assert_near(taken, plain.take_rows(x, token_index, weights), 1e-6)
        summed = kernels.sum_slots(rows, slot_of, weights)
        assert_near(summed, plain.sum_slots(rows, slot_of, weights), 1e-6)
        products = kernels.row_products(rows, taken)
        assert_near(products, plain.row_products(rows, taken), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_other_layouts(device):
    x, rows, token_index, slot_of, weights = some(12, 2, 10, torch.float32, device)
    x, rows = (v.t().contiguous().t() for v in (x, rows))
    slot_of = slot_of.t().contiguous().t()
    spread = torch.stack((weights, weights), 1)[:, 0]
    taken = kernels.take_rows(x, token_index, spread)
    assert torch.equal(taken, plain.take_rows(x, token_index, weights))
    summed = kernels.sum_slots(rows, slot_of, spread)
    assert_near(summed, plain.sum_slots(rows, slot_of, weights), 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_rows(device, dtype, d):
    left, right = (torch.randn(21, d).to(dtype).to(device) for _ in range(2))
    got = kernels.row_products(left, right)
    assert got.dtype == torch.float32
    assert_near(got.double(), plain.row_products(left.double(), right.double()), 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("live", [0, 1, 29, 30])
@pytest.mark.parametrize("d", [3, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tail_is_blanked_and_nothing_else_touched(device, dtype, d, live, monkeypatch):
    monkeypatch.setattr("moe_builders.ops.triton.rows._TAILS", 8)  # more rows than blocks
    rows = torch.randn(30, d).to(dtype).to(device)
    rows[live:] = float("nan")
    before = rows[:live].clone()
    number = torch.tensor(live, device=device, dtype=torch.int32)
    assert kernels.zero_tail_(rows, number) is rows
    assert torch.equal(rows[:live], before)
    assert not rows[live:].any()
    assert not rows.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_tail_of_rows_that_stand_apart_and_of_single_numbers(device):
    number = torch.tensor([1, 2], device=device).sum()  # int64, as a sum of counts
    held = torch.full((7, 8), float("nan"), device=device)
    kernels.zero_tail_(held[:, :5], number)
    assert held.isnan().sum() == 3 * 8 + 4 * 3
    single = torch.full((7,), float("nan"), device=device)
    kernels.zero_tail_(single, number)
    assert single.isnan().tolist() == [True] * 3 + [False] * 4
    assert kernels.zero_tail_(single[:0], number).numel() == 0


def sorted_rows(counts, dead, o, dtype, device, *, weighted):
    """[a, o] rows, [e, o] values, [e] counts, [a] weights, NaN for dead rows, or None."""
    live, e = sum(counts), len(counts)
    rows, values = (torch.randn(n, o).to(dtype).to(device) for n in (live + dead, e))
    weights = torch.randn(live + dead).to(device) if weighted else None
    if weights is not None:
        weights[live:] = float("nan")
    return rows, values, torch.tensor(counts, device=device), weights


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("o", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_is_exact_but_for_one_rounding(device, dtype, o, weighted):
    counts = [3, 0, 1, 9, 0]
    given_ = sorted_rows(counts, 4, o, dtype, device, weighted=weighted)
    rows, values, number, weights = given_
    expert = torch.tensor([0, 0, 0, 2, *[3] * 9], device=device)
    exact = values.double()[expert] * (1 if weights is None else weights[:13, None].double())
    exact += rows[:13].double()
    for module in (kernels, plain):
        got = rows.clone()
        assert module.add_expert_rows_(got, values, number, weights) is got
        assert torch.equal(got[13:], rows[13:])
        if weights is None and dtype != torch.float32:
            assert torch.equal(got[:13], exact.float().to(dtype))
        else:
            limit = torch.finfo(dtype).eps / 2
            assert ((got[:13] - exact).abs() <= 1.01 * limit * exact.abs() + 1e-6).all()


@quick
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    dead=st.integers(0, 20),
    o=st.integers(1, 40),
    weighted=st.booleans(),
    narrow=st.booleans(),
)
def test_adding_to_any_rows(counts, dead, o, weighted, narrow):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given_ = sorted_rows(counts, dead, o, torch.float32, device, weighted=weighted)
    rows, values, number, weights = given_
    wanted = plain.add_expert_rows_(rows.double(), values.double(), number, wide(weights))
    with kernels_run(), poisoned():
        number = number.int() if narrow else number
        got = kernels.add_expert_rows_(rows.clone(), values, number, weights)
    assert torch.equal(got[sum(counts) :], rows[sum(counts) :])
    assert_near(got[: sum(counts)].double(), wanted[: sum(counts)], 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_adding_with_more_experts_than_are_compared_at_once(device):
    counts = torch.randint(0, 3, (300,)).tolist()
    rows, values, number, _ = sorted_rows(counts, 3, 4, torch.float32, device, weighted=False)
    expert = torch.arange(300, device=device).repeat_interleave(number)
    got = kernels.add_expert_rows_(rows.clone(), values, number)
    assert torch.equal(got[:-3], rows[:-3] + values[expert])


@pytest.mark.parametrize("device", DEVICES)
def test_adding_to_rows_that_stand_apart(device):
    given_ = sorted_rows([2, 3], 1, 8, torch.float32, device, weighted=False)
    rows, values, number, _ = given_
    values = values.t().contiguous().t()
    wanted = plain.add_expert_rows_(rows.clone()[:, :5], values[:, :5], number)
    got = kernels.add_expert_rows_(rows[:, :5], values[:, :5], number)
    assert torch.equal(got, wanted)
    assert rows[:5, 5:].isfinite().all()
    assert kernels.add_expert_rows_(rows[:0], values, number * 0).numel() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_run(device):
    x, rows, token_index, slot_of, weights = some(50, 4, 300, torch.bfloat16, device)

    def run():
        taken = kernels.take_rows(x, token_index, weights)
        return taken, kernels.sum_slots(rows, slot_of, weights), kernels.row_products(rows, taken)

    first = run()
    for mine, before in zip(run(), first, strict=True):
        assert torch.equal(mine, before)


def test_the_module_replaces_the_plain_one():
    functions = {
        name: function
        for name, function in vars(plain).items()
        if inspect.isfunction(function) and function.__module__ == plain.__name__
    }
    for name in [name for name in functions if not name.startswith("_")]:
        mine = inspect.signature(getattr(kernels, name))
        assert mine == inspect.signature(functions[name]), name
