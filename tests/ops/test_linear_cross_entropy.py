"""The fused loss against one written out by hand, and what it promises: memory, NaN, compiled."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, quick
from helpers_memory import largest_allocation
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moe_builders.errors import InputError
from moe_builders.ops.linear_cross_entropy import (
    IGNORE_INDEX,
    chunk_size,
    linear_cross_entropy_sum,
)

WHAT = ("loss", "h", "weight", "bias")


def inputs(t=13, d=6, v=29, *, bias=True, dtype=torch.float64, seed=0, ignored=0.3):
    stream = torch.Generator().manual_seed(seed)
    h = torch.randn(t, d, generator=stream, dtype=dtype)
    weight = torch.randn(v, d, generator=stream, dtype=dtype)
    b = torch.randn(v, generator=stream, dtype=dtype) if bias else None
    labels = torch.randint(0, v, (t,), generator=stream)
    labels[torch.rand(t, generator=stream) < ignored] = IGNORE_INDEX
    return h, weight, b, labels


def by_hand(h, weight, bias, labels, *, scale=1.0):
    """A token and a word at a time."""
    total = torch.zeros((), dtype=h.dtype)
    for x, label in zip(h, labels.tolist(), strict=True):
        if label == IGNORE_INDEX:
            continue
        logits = [
            scale * ((w * x).sum() + (0 if bias is None else bias[j])) for j, w in enumerate(weight)
        ]
        total = total + sum(logit.exp() for logit in logits).log() - logits[label]
    return total


def plain(h, weight, bias, labels, *, scale=1.0):
    """Whole logits in the model's dtype, then in fp32."""
    logits = F.linear(h, weight, bias)
    logits = logits if scale == 1.0 else logits * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def value_and_gradients(loss_of, h, weight, bias, labels, *, factor=None, **more):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (h, weight, bias)]
    loss = loss_of(*leaves, labels, **more)
    (loss if factor is None else loss * factor).backward()
    return [loss.detach(), *[None if leaf is None else leaf.grad for leaf in leaves]]


def assert_all_near(got, wanted, limit):
    for value, other, what in zip(got, wanted, WHAT, strict=True):
        assert (value is None) == (other is None), what
        if value is not None:
            assert_near(value, other, limit, what)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, None])
def test_value_and_gradients_by_hand(chunk, bias, scale):
    given_ = inputs(bias=bias)
    wanted = value_and_gradients(by_hand, *given_, scale=scale, factor=0.7)
    got = value_and_gradients(
        linear_cross_entropy_sum, *given_, scale=scale, chunk=chunk, factor=0.7
    )
    assert_all_near(got, wanted, 1e-12)


@quick
@given(
    t=st.integers(0, 40), d=st.integers(1, 9), v=st.integers(1, 50), chunk=st.integers(1, 41),
    ignored=st.sampled_from([0.0, 0.5, 1.0]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_chunk(t, d, v, chunk, ignored, bias, seed):
    given_ = inputs(t, d, v, bias=bias, ignored=ignored, seed=seed)
    wanted = value_and_gradients(plain, *given_, scale=1.5)
    got = value_and_gradients(linear_cross_entropy_sum, *given_, scale=1.5, chunk=chunk)
    assert_all_near(got, wanted, 1e-10)


def test_gradcheck():
    h, weight, bias, labels = inputs(7, 3, 5)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    torch.autograd.gradcheck(
        lambda *t: linear_cross_entropy_sum(*t, labels, scale=0.8, chunk=3), leaves
    )


def test_the_operator_is_registered_well():
    h, weight, bias, labels = inputs(7, 3, 5)
    for divisor, wanted in ((None, (True, True, True)), (torch.tensor(3), (False, True, False))):
        arguments = (h, weight, bias, labels, divisor, 0.8, 3, *wanted)
        torch.library.opcheck(torch.ops.moe_builders.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("chunk", [50, 200, None])
def test_fp32_is_as_near_to_fp64_as_whole_logits_are(chunk):
    given_ = inputs(200, 32, 300, dtype=torch.float32)
    wide = [None if t is None else t.double() if t.is_floating_point() else t for t in given_]
    wanted = value_and_gradients(plain, *wide)
    got = value_and_gradients(linear_cross_entropy_sum, *given_, chunk=chunk)
    assert_all_near([g.double() for g in got], wanted, 2e-6)


@pytest.mark.parametrize("chunk", [8, 64, 100, 256])
def test_bf16_is_about_as_near_to_fp64_as_whole_logits_are(chunk):
    """With the divisor inside, the distance a root mean square.

    A CPU's product of each chunk is rounded to bf16 before it is added: a fifth more in the
    weight's gradient of 32 chunks; their sum in bf16 would be three times as far.
    """
    given_ = inputs(256, 32, 20, dtype=torch.bfloat16)
    given_[1].mul_(0.1)  # all words are likely: every token adds to every row of the weight's
    wide = [t.double() if t.is_floating_point() else t for t in given_]
    wanted = value_and_gradients(plain, *wide, factor=1 / 300)
    usual = value_and_gradients(plain, *given_, factor=1 / 300)
    got = value_and_gradients(
        linear_cross_entropy_sum, *given_, chunk=chunk, divisor=torch.tensor(300)
    )
    assert_near(got[0] * 300, usual[0], 1e-6)
    for value, other, exact, what in zip(got[1:], usual[1:], wanted[1:], WHAT[1:], strict=True):
        assert value.dtype == torch.bfloat16
        limit = 1.25 if what == "weight" and chunk < 256 else 1.1
        assert distance(value, exact) <= limit * distance(other, exact), what


def distance(value, exact):
    return float((value.double() - exact).norm())


def test_a_divisor_is_the_same_as_dividing():
    given_ = inputs()
    wanted = value_and_gradients(linear_cross_entropy_sum, *given_, factor=1 / 7)
    got = value_and_gradients(
        linear_cross_entropy_sum, *given_, divisor=torch.tensor(7), chunk=5, scale=1.0
    )
    assert_near(got[0], wanted[0] / 7, 1e-14)
    assert_all_near([wanted[0], *got[1:]], wanted, 1e-14)
    got = value_and_gradients(
        linear_cross_entropy_sum, *given_, divisor=torch.tensor(7), factor=3.5
    )
    assert_all_near([wanted[0], *got[1:]], [wanted[0], *[3.5 * g for g in wanted[1:]]], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_has_no_label_reaches_nothing(dtype):
    h, weight, bias, labels = inputs(dtype=dtype)
    poisoned = h.clone()
    poisoned[labels == IGNORE_INDEX] = torch.tensor([math.nan, math.inf] * 3, dtype=dtype)
    wanted = value_and_gradients(linear_cross_entropy_sum, h, weight, bias, labels, chunk=4)
    got = value_and_gradients(linear_cross_entropy_sum, poisoned, weight, bias, labels, chunk=4)
    for value, other in zip(got, wanted, strict=True):
        assert torch.equal(value, other)
    assert got[1][labels == IGNORE_INDEX].eq(0).all()


def test_no_labels_at_all():
    h, weight, bias, labels = inputs(ignored=1.0)
    got = value_and_gradients(linear_cross_entropy_sum, h, weight, bias, labels, chunk=4)
    assert all(value.eq(0).all() for value in got)


def test_a_certain_and_an_impossible_label():
    """A loss of 0, and one whose softmax is 0 in fp32."""
    weight = torch.tensor([[40.0], [0.0], [-200.0]])
    h = torch.ones(1, 1)
    for label in range(3):
        labels = torch.tensor([label])
        wanted = value_and_gradients(plain, h.double(), weight.double(), None, labels)
        got = value_and_gradients(linear_cross_entropy_sum, h, weight, None, labels)
        for value, exact in zip(got[:3], wanted[:3], strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-38)


def test_only_what_is_asked_for_is_computed():
    h, weight, bias, labels = inputs(12, 6, 20)
    one = 2 * 12 * 6 * 20
    for wants, products in (((), 1), ((0,), 2), ((1,), 2), ((0, 1, 2), 3)):
        leaves = [t.clone().requires_grad_(n in wants) for n, t in enumerate((h, weight, bias))]
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy_sum(*leaves, labels, chunk=5)
        assert counter.get_total_flops() == products * one
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            loss = linear_cross_entropy_sum(*leaves, labels, chunk=5)
        assert counter.get_total_flops() == one
        assert not loss.requires_grad
        assert_near(loss, plain(h, weight, bias, labels), 1e-12)


def test_backward_twice():
    h, weight, bias, labels = inputs()
    weight.requires_grad_()
    loss = linear_cross_entropy_sum(h, weight, bias, labels)
    first, second = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0].clone() for _ in range(2)
    )
    loss.backward()
    assert torch.equal(first, second)
    assert torch.equal(first, weight.grad)
    weight.grad.zero_()
    assert first.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype):
    t, d, v = 600, 8, 9000  # several chunks
    h, weight, bias, labels = inputs(t, d, v, dtype=dtype)
    whole = t * v * dtype.itemsize

    def largest(loss_of):
        return largest_allocation(lambda: value_and_gradients(loss_of, h, weight, bias, labels))

    assert largest(plain) >= whole
    assert largest(linear_cross_entropy_sum) <= 4 << 20 < whole


def test_size_of_a_chunk():
    """Its logits take as many bytes as the weight in the dtype of sums, or a million numbers."""
    big = {"dim": 2048, "vocab_size": 152_000}
    assert chunk_size(**big, dtype=torch.bfloat16) == 4096
    assert chunk_size(**big, dtype=torch.float32) == 2048
    assert chunk_size(**big, dtype=torch.float64) == 2048
    assert chunk_size(dim=8, vocab_size=1000, dtype=torch.float32) == 1048
    assert chunk_size(dim=1, vocab_size=1 << 21, dtype=torch.float32) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_whole(dtype):
    given_ = inputs(dtype=dtype)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(h, weight, bias, labels):
        return linear_cross_entropy_sum(h, weight, bias, labels, chunk=4, scale=0.5) * 2

    wanted = value_and_gradients(
        lambda *t: linear_cross_entropy_sum(*t, chunk=4, scale=0.5) * 2, *given_
    )
    got = value_and_gradients(compiled, *given_)
    assert_all_near(got, wanted, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(13, 5)}, r"takes h \[t, d\] and weight \[v, d\], got \(13, 5\) and"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, r"for 13 tokens and 29 words, labels"),
        ({"bias": torch.zeros(28)}, r"and the bias \(28,\)"),
        ({"bias": torch.zeros(29)}, r"bias torch.float32: give all the same dtype"),
        ({"chunk": 0}, r"^chunk is 0 tokens, but must be at least 1"),
    ],
)
def test_what_does_not_fit(change, message):
    h, weight, bias, labels = inputs()
    arguments = {"h": h, "weight": weight, "bias": bias, "labels": labels} | change
    with pytest.raises(InputError, match=message):
        linear_cross_entropy_sum(**arguments)


def test_a_second_derivative_is_refused_not_left_out():
    h, weight, _, labels = inputs(bias=False)
    h.requires_grad_()
    loss = linear_cross_entropy_sum(2 * h, weight, None, labels)
    with pytest.raises(InputError, match="create_graph=True needs linear_cross_entropy=none"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_fake_tensors_go_through():
    with FakeTensorMode():
        h, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        linear_cross_entropy_sum(h, weight, None, torch.zeros(5, dtype=torch.int64)).backward()
    assert weight.grad.shape == (7, 4)


def test_what_arrives_in_backward_is_not_rounded_before_it_multiplies():
    h, weight, _, labels = inputs(bias=False, dtype=torch.bfloat16)
    once = value_and_gradients(linear_cross_entropy_sum, h, weight, None, labels)
    times = value_and_gradients(linear_cross_entropy_sum, h, weight, None, labels, factor=0.7003)
    for one, other in zip(once[1:3], times[1:3], strict=True):
        assert torch.equal(other, (one.float() * 0.7003).bfloat16())
