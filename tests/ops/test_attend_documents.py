"""Attention within documents against the softmax formula over a mask, and what it never makes.

Letters: t tokens · n heads · m key/value heads · u width of a head.
"""

import itertools

import pytest
import torch
from helpers import assert_near, quick
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders.errors import InputError
from moe_builders.ops.attend_documents import attend_documents
from moe_builders.ops.document_pieces import (
    LARGEST,
    SHARED,
    attend_pieces,
    attend_pieces_backward,
    pieces,
)
from moe_builders.ops.documents import documents_of, whole_rows

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
PACKINGS = {  # of 200 tokens
    "ragged": [5, 1, 30, 70, 7, 50, 1, 1, 20, 15],
    "one": [200],
    "tokens": [1] * 200,
    "edges": [SHARED - 1, 1, SHARED, 1, SHARED + 1, 200 - 3 * SHARED - 2],
    "many": [4] * 50,
}
N, M, U = 4, 2, 8


def inputs(t, dtype=FP64, sinks=False, rows=1):
    """q, k, v, perhaps sinks; as attention makes them, heads before positions."""
    shapes = [(rows, heads, t // rows, U) for heads in (N, M, M)] + [(N,)] * sinks
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(q, k, v, sinks=None, *, mask, scale):
    """Softmax over what the mask shows, the sink among it."""
    k, v = (t.repeat_interleave(N // M, 1) for t in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask[:, None], float("-inf"))
    if sinks is not None:
        sinks = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def narrowed(mask, lengths, *, window=None, chunk=None):
    place = torch.arange(mask.shape[1])
    if window is not None:
        mask = mask & (place[:, None] - place < window)
    if chunk is not None:
        run = torch.cat([torch.arange(n) for n in lengths]) // chunk
        run = run.view(mask.shape[0], -1)
        mask = mask & (run[:, :, None] == run[:, None, :])
    return mask


def compare(given, documents, mask, limit, *, scale=0.4, window=None, chunk=None):
    q, k, v, *sinks = given
    sink = sinks[0] if sinks else None
    got = attend_documents(q, k, v, documents, scale=scale, window=window, chunk=chunk, sinks=sink)
    wanted = plain(*given, mask=mask, scale=scale)
    probe = torch.randn_like(got)
    grads, wanted_grads = (torch.autograd.grad((y * probe).sum(), given) for y in (got, wanted))
    assert_near(got, wanted, limit, "out")
    for name, grad, reference in zip("qkvs", grads, wanted_grads, strict=False):
        # a query that sees one key has no gradient: there is nothing to compare sizes with
        assert (grad - reference).abs().max() <= limit * reference.abs().max().clamp(min=1), name


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("narrow", [{}, {"window": 1}, {"window": 7}, {"window": 90}, {"chunk": 16},
                                    {"window": 5, "chunk": 8}])  # fmt: skip
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_formula(packing, narrow, sinks):
    lengths = PACKINGS[packing]
    documents = documents_of(lengths)
    mask = narrowed(documents.mask(rows=1, positions=200), lengths, **narrow)
    compare(inputs(200, sinks=sinks), documents, mask, 1e-12, **narrow)
    compare(inputs(200, FP32, sinks=sinks), documents, mask, 1e-5, **narrow)


def test_a_window_smaller_than_a_long_document():
    t, window = 2 * LARGEST + 90, LARGEST + 17
    given, documents = inputs(t), documents_of([t])
    mask = narrowed(documents.mask(rows=1, positions=t), [t], window=window)
    compare(given, documents, mask, 1e-12, window=window)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_document_as_long_as_a_window_or_hardly_longer(more):
    """By itself in its piece: causal alone says all only up to the window's length."""
    t, window = 70 + more, 70
    mask = narrowed(documents_of([t]).mask(rows=1, positions=t), [t], window=window)
    compare(inputs(t), documents_of([t]), mask, 1e-12, window=window)


@quick
@given(
    rows=st.lists(st.lists(st.integers(1, 80), min_size=1, max_size=5), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 90),
    chunk=st.none() | st.integers(1, 90),
    sinks=st.booleans(),
)
def test_any_packing_of_any_rows(rows, window, chunk, sinks):
    s = max(map(sum, rows))
    rows = [[*row, s - sum(row)] if sum(row) < s else row for row in rows]
    lengths, shape = list(itertools.chain(*rows)), {"rows": len(rows), "positions": s}
    documents = documents_of(lengths)
    mask = narrowed(documents.mask(**shape), lengths, window=window, chunk=chunk)
    given = inputs(len(rows) * s, sinks=sinks, rows=len(rows))
    compare(given, documents, mask, 1e-11, window=window, chunk=chunk)


def test_every_query_is_in_one_piece_with_all_that_it_sees():
    for lengths, window in itertools.product(PACKINGS.values(), (None, 1, 7, 90)):
        ends = list(itertools.accumulate(lengths))
        found, begins = pieces(ends, window), [0, *ends]
        assert [at for piece in found for at in range(piece.begin, piece.end)] == list(range(200))
        for piece in found:
            inside = [n for n in begins if piece.begin < n < piece.end]
            start = max(n for n in begins if n <= piece.begin)
            seen = start if window is None else max(start, piece.begin - window + 1)
            assert piece.first <= seen
            assert not (piece.plain and (inside or piece.first < start or piece.first < seen))
            assert piece.end - piece.first <= max(SHARED, *lengths)


def test_tiny_documents_share_their_products():
    assert len(pieces(list(range(1, 4097)), None)) == 4096 // SHARED


def test_scale_is_by_width_where_none_is_given():
    q, k, v = inputs(20)
    got = attend_documents(q, k, v, documents_of([20]))
    assert_near(got, attend_documents(q, k, v, documents_of([20]), scale=U**-0.5), 1e-14)


def test_half_precision_is_as_near_to_fp32_as_the_mask():
    documents = documents_of(PACKINGS["ragged"])
    mask = documents.mask(rows=1, positions=200)
    narrow = [t.detach().requires_grad_() for t in inputs(200, BF16, sinks=True)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    probe = torch.randn(1, N, 200, U)

    def answers(given, attend):
        out = attend(*given)
        return [out, *torch.autograd.grad((out * probe.to(out.dtype)).sum(), given)]

    def ours(q, k, v, sinks):
        return attend_documents(q, k, v, documents, scale=0.4, sinks=sinks)

    def theirs(q, k, v, sinks):
        return plain(q, k, v, sinks, mask=mask, scale=0.4)

    wanted = answers(wide, theirs)
    for got, plainly, right in zip(
        answers(narrow, ours), answers(narrow, theirs), wanted, strict=True
    ):
        assert (got - right).norm() <= 1.5 * (plainly - right).norm() + 1e-3 * right.norm()


class Largest(TorchDispatchMode):
    """The most numbers that one tensor has, and every (…, s, s) among them."""

    def __init__(self, s):
        super().__init__()
        self.s, self.square, self.most = s, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
                if tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2] == self.s:
                    self.square.append(func)
        return out


@pytest.mark.parametrize("window", [None, 64])
def test_nothing_is_as_large_as_all_pairs(window):
    """An operator hides what it makes: so the pieces are looked at, not the operator."""
    s = 1000
    q, k, v = (torch.randn(s, heads, U) for heads in (N, M, M))
    ends = torch.tensor([300, 301, 340, 900, 1000], dtype=torch.int32)
    with Largest(s) as seen:
        out, lse = attend_pieces(q, k, v, ends, scale=0.4, window=window)
        attend_pieces_backward(out, q, k, v, out, lse, ends, scale=0.4, window=window)
    assert seen.most <= s * N * U
    assert not seen.square


def test_other_documents_reach_nothing():
    """Not even what is not finite; a short neighbour shares a piece, so both are long here."""
    q, k, v = (t.detach().float() for t in inputs(200))
    for t in (q, k, v):
        t[:, :, 100:] = float("nan")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attend_documents(*leaves, documents_of([100, 100]))
    for grad in torch.autograd.grad(out[:, :, :100].sum(), leaves):
        assert grad[:, :, :100].isfinite().all()
    assert out[:, :, :100].isfinite().all()


def test_registered_as_an_operator_should_be():
    q, k, v, sinks = [t.detach().requires_grad_() for t in inputs(20, sinks=True)]
    operator = torch.ops.moe_builders.attend_documents.default
    documents = documents_of([3, 9, 8])
    flat = [t.transpose(1, 2).flatten(0, 1).contiguous().detach() for t in (q, k, v)]
    flat = [t.requires_grad_() for t in flat]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for window, chunk, sink in ((None, None, None), (3, 4, sinks)):
        given = (*flat, documents.ends, documents.counts, 0.4, window, chunk, sink)
        torch.library.opcheck(operator, given, test_utils=checks)
    out, lse = operator(*given)
    backward = torch.ops.moe_builders.attend_documents_backward.default
    given = (out, *flat, out, lse, documents.ends, documents.counts, 0.4, 3, 4)
    torch.library.opcheck(backward, [t.detach() if isinstance(t, torch.Tensor) else t
                                     for t in given], test_utils=checks)  # fmt: skip


def test_other_documents_are_not_compiled_anew():
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    q, k, v = inputs(60)

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q, k, v, documents):
        return attend_documents(q, k, v, documents, window=9)

    for lengths in ([60], [20, 1, 39], [1] * 60, [30, 30]):
        documents = documents_of(lengths)
        wanted = attend_documents(q, k, v, documents, window=9)
        assert_near(attend(q, k, v, documents), wanted, 1e-12)
    assert counter.frame_count == 1


def test_documents_that_are_not_these_tokens():
    with pytest.raises(InputError, match="documents end at token 19, but there are 20 tokens"):
        attend_documents(*inputs(20), documents_of([10, 9]))


def test_rows_that_are_documents():
    given = inputs(60, rows=3)
    documents = whole_rows(3, 20, torch.device("cpu"))
    mask = torch.ones(3, 20, 20, dtype=torch.bool).tril()
    compare(given, documents, mask, 1e-12)
