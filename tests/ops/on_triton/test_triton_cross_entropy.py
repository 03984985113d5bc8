"""A chunk's cross-entropy and gradient: the kernel against softmax in fp64 and its twin."""

import inspect
import math

import pytest
import torch
from helpers import assert_near, quick
from helpers_triton import DEVICES, kernels_run, poisoned
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.ops import cross_entropy as plain
from moe_builders.ops import linear_cross_entropy as whole
from moe_builders.ops.cross_entropy import IGNORE_INDEX
from moe_builders.ops.triton import cross_entropy as kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = 64  # of a block, so that small vocabularies have several


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "_COLUMNS", COLUMNS)


def some(c, v, dtype, device, *, ignored=0.3, size=3.0):
    labels = torch.randint(0, v, (c,))
    labels[torch.rand(c) < ignored] = IGNORE_INDEX
    return (torch.randn(c, v) * size).to(dtype).to(device), labels.to(device)


def exact(logits, labels, factor):
    """Losses and gradients in fp64, by softmax as it is written."""
    wide, dead = logits.double(), labels == IGNORE_INDEX
    at = labels.masked_fill(dead, 0)[:, None]
    probs = wide.softmax(-1)
    losses = -wide.log_softmax(-1).gather(1, at)[:, 0]
    grads = (probs - torch.zeros_like(probs).scatter(1, at, 1.0)) * factor
    return losses.masked_fill(dead, 0), grads.masked_fill(dead[:, None], 0)


def run(function, logits, labels, factor, *, learns=True):
    logits = logits.clone()
    return function(logits, labels, factor, learns=learns), logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("v", [1, 7, COLUMNS, COLUMNS + 1, 5 * COLUMNS - 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients(device, dtype, v):
    logits, labels = some(11, v, dtype, device)
    factor = torch.tensor(0.37, device=device)
    losses, grads = run(kernel.cross_entropy_, logits, labels, factor)
    wanted, wanted_grads = exact(logits, labels, 0.37)
    assert losses.dtype == torch.float32
    assert_near(losses.double(), wanted, 1e-6)
    if dtype == torch.float32:
        assert_near(grads.double(), wanted_grads, 1e-6)
    else:  # computed in fp32 and rounded once, as the twin
        twin = run(plain.cross_entropy_, logits, labels, factor)[1]
        assert (grads - wanted_grads).norm() <= 1.001 * (twin - wanted_grads).norm()
        assert (grads != twin).float().mean() < 0.02


@quick
@given(c=st.integers(0, 6), v=st.integers(1, 200), ignored=st.sampled_from([0.0, 0.5, 1.0]),
       learns=st.booleans(), narrow=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_any_shape(c, v, ignored, learns, narrow, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    logits, labels = some(c, v, torch.float32, device, ignored=ignored)
    before = logits.clone()
    with kernels_run(), poisoned():
        given_labels = labels.int() if narrow else labels
        losses, grads = run(kernel.cross_entropy_, logits, given_labels, 2.0, learns=learns)
    wanted, wanted_grads = exact(logits, labels, 2.0)
    assert_near(losses, wanted.float(), 1e-5)
    assert_near(grads, wanted_grads.float() if learns else before, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [kernel.cross_entropy_, plain.cross_entropy_])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_label_may_hold_anything(device, function, dtype):
    logits, labels = some(9, 2 * COLUMNS + 1, dtype, device, ignored=0.0)
    wanted = run(function, logits, labels, 0.5)
    labels[::2] = IGNORE_INDEX
    logits[::2] = math.nan
    logits[2] = math.inf
    losses, grads = run(function, logits, labels, 0.5)
    assert not losses[::2].any()  # NaN is some
    assert not grads[::2].any()
    assert torch.equal(losses[1::2], wanted[0][1::2])
    assert torch.equal(grads[1::2], wanted[1][1::2])
    for learns in (True, False):
        losses, _ = run(function, logits, torch.full_like(labels, -100), 0.5, learns=learns)
        assert not losses.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [-3e38, -1e4, 0.0, 1e4, 3e38])
def test_logits_of_any_size(device, shift):
    """Relative to the largest, nothing overflows; forbidden words come before and after."""
    logits = torch.full((3, 3 * COLUMNS), -math.inf)
    logits[:, COLUMNS : COLUMNS + 5] = torch.randn(3, 5) + shift
    labels = torch.tensor([COLUMNS, COLUMNS + 4, COLUMNS + 2]).to(device)
    logits = logits.to(device)
    losses, grads = run(kernel.cross_entropy_, logits, labels, 1.0)
    wanted, wanted_grads = exact(logits, labels, 1.0)
    assert_near(losses.double(), wanted, 1e-6)
    assert_near(grads.double(), wanted_grads, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_an_almost_certain_label_keeps_its_digits(device):
    """softmax - 1 is far smaller than a step of fp32 at 1."""
    logits, labels = torch.zeros(1, 100, device=device), torch.tensor([70], device=device)
    logits[0, 70] = 40.0
    _, grads = run(kernel.cross_entropy_, logits, labels, 1.0)
    rest = 99 * math.exp(-40.0)
    assert float(grads[0, 70]) == pytest.approx(-rest / (1 + rest), rel=1e-5)
    assert float(grads[0, 3]) == pytest.approx(math.exp(-40.0), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_an_impossible_label_has_no_finite_loss(device):
    logits = torch.randn(1, 2 * COLUMNS, device=device)
    logits[0, : COLUMNS + 1] = -math.inf  # the label's and all of the first block
    labels = torch.tensor([3], device=device)
    losses, grads = run(kernel.cross_entropy_, logits, labels, 0.5)
    twin_losses, twin_grads = run(plain.cross_entropy_, logits, labels, 0.5)
    assert losses.tolist() == twin_losses.tolist() == [math.inf]
    assert_near(grads, twin_grads, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, COLUMNS + 2, 5])  # the last: the label's own
def test_what_is_not_finite_is_not_hidden(device, bad, column):
    logits, _ = some(2, 2 * COLUMNS, torch.float32, device)
    logits[1, column] = bad
    labels = torch.tensor([5, 5], device=device)
    losses, grads = run(kernel.cross_entropy_, logits, labels, 1.0)
    assert losses.isnan().tolist() == [False, True]
    assert grads[0].isfinite().all()
    assert grads[1].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label", [-1, 100, 1 << 40])
def test_a_label_that_does_not_exist_makes_its_row_nan(device, label):
    logits, _ = some(3, 100, torch.float32, device)
    labels = torch.tensor([0, label, 99], device=device)
    losses, grads = run(kernel.cross_entropy_, logits, labels, 1.0)
    assert losses.isnan().tolist() == [False, True, False]
    assert grads.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_loss_with_the_kernel(device, dtype, monkeypatch):
    """Several chunks, a bias, a scale, a divisor: as with the plain one."""
    t, d, v = 30, 8, 3 * COLUMNS + 5
    h, weight, bias = (torch.randn(s).to(dtype).to(device) for s in ((t, d), (v, d), (v,)))
    labels = some(t, v, dtype, device)[1]
    h[labels == IGNORE_INDEX] = math.nan

    def values(choice):
        monkeypatch.setattr(whole, "cross_entropy_of", choice)
        leaves = [x.clone().requires_grad_() for x in (h, weight, bias)]
        loss = whole.linear_cross_entropy_sum(
            *leaves, labels, scale=0.7, divisor=torch.tensor(20, device=device), chunk=8
        )
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    calls = []

    def kernel_(*arguments, **more):
        calls.append(arguments)
        return kernel.cross_entropy_(*arguments, **more)

    got = values(lambda _: kernel_)
    assert len(calls) == 4
    wanted = values(lambda _: plain.cross_entropy_)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_near(mine, theirs, 1e-5 if dtype == torch.float32 else 1e-2)


def test_who_is_called(monkeypatch):
    for dtype in DTYPES:
        logits = torch.empty(2, 3, dtype=dtype)
        assert plain.cross_entropy_of(logits) is plain.cross_entropy_
        with monkeypatch.context() as patch:
            patch.setattr(plain, "available", lambda _: True)
            assert plain.cross_entropy_of(logits) is kernel.cross_entropy_
            assert plain.cross_entropy_of(logits.double()) is plain.cross_entropy_
    signatures = [inspect.signature(module.cross_entropy_) for module in (plain, kernel)]
    assert signatures[0] == signatures[1]


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_run(device):
    logits, labels = some(20, 4 * COLUMNS, torch.bfloat16, device)
    first, second = (run(kernel.cross_entropy_, logits, labels, 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
