"""The GPU's way: how torch's kernel is called, by a stand-in that checks and computes in a loop.

Letters: t tokens · n heads · m key/value heads · u width of a head · x documents.
"""

import functools

import pytest
import torch
from helpers import assert_near

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.data.batch import collate
from moe_builders.ops import attend_documents as operator
from moe_builders.ops import document_kernels as kernels
from moe_builders.ops.document_pieces import attend_pieces, attend_pieces_backward
from moe_builders.ops.documents import documents_of

BF16 = torch.bfloat16


def checked(q, k, v, begins, max_q, scale):
    """What torch's own checks ask of a call for rows of many lengths."""
    t, n, u = q.shape
    assert k.shape == v.shape == (t, k.shape[1], u)
    assert n % k.shape[1] == 0
    assert u % 8 == 0
    assert u <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert begins.dtype == torch.int32
    assert begins.is_contiguous()
    assert begins[0] == 0
    assert begins[-1] == t
    lengths = begins.diff()
    assert (lengths >= 0).all()
    assert lengths.max() <= max_q
    assert isinstance(max_q, int)
    assert isinstance(scale, float)


def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size):
    """torch 2.11's ``varlen_attn``."""
    checked(q, k, v, cu_seq_q, max_q, scale)
    assert cu_seq_k is cu_seq_q
    assert (max_k, return_aux.lse) == (max_q, True)
    left, right = window_size
    assert right == 0
    window = None if left == -1 else left + 1
    return attend_pieces(q, k, v, cu_seq_q[1:], scale=scale, window=window)


def varlen_2_12(*args, enable_gqa=False, **kwargs):
    """From 2.12 on unequal numbers of heads are refused without a word."""
    assert enable_gqa or args[0].shape[1] == args[1].shape[1]
    return varlen(*args, **kwargs)


def flash_backward(
    grad, q, k, v, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, dropout, is_causal, rng_state,
    unused, *, scale, window_size_left, window_size_right,
):  # fmt: skip
    checked(q, k, v, cu_seq_q, max_q, scale)
    assert cu_seq_k is cu_seq_q
    assert max_k == max_q
    assert grad.is_contiguous()
    assert out.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    assert (dropout, window_size_right, unused.numel()) == (0.0, 0, 0)
    assert is_causal is (window_size_left == -1)
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.uint64)
    window = None if is_causal else window_size_left + 1
    return attend_pieces_backward(grad, q, k, v, out, lse, cu_seq_q[1:], scale=scale, window=window)


@pytest.fixture(params=["2.11", "2.12"])
def stand_in(request, monkeypatch):
    """The operator takes its GPU way on a CPU; the calls of each function."""
    calls = []

    def counted(function, name):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    forward = varlen if request.param == "2.11" else varlen_2_12
    monkeypatch.setattr(kernels, "ASKS", request.param == "2.12")
    monkeypatch.setattr(kernels, "varlen_attn", counted(forward, "forward"))
    monkeypatch.setattr(kernels, "flash_backward", counted(flash_backward, "backward"))

    def by_kernel(way):
        def call(*args, scale, window):
            longest = int(args[-1].diff(prepend=args[-1].new_zeros(1)).max())
            return way(*args, longest=longest, scale=scale, window=window)

        return call

    monkeypatch.setattr(operator, "attend_pieces", by_kernel(kernels.attend_kernel))
    monkeypatch.setattr(
        operator, "attend_pieces_backward", by_kernel(kernels.attend_kernel_backward)
    )
    return calls


NARROW = [{}, {"window": 5}, {"chunk": 8}, {"sinks": True}, {"window": 5, "sinks": True}]


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_calls_are_as_torch_wants_them(narrow, heads, stand_in, monkeypatch):
    given = [torch.randn(2, n, 40, 8, dtype=torch.float64) for n in (*heads, heads[1])]
    leaves = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in given]
    options = dict(narrow)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads[0], dtype=torch.float64, requires_grad=True)
        leaves.append(options["sinks"])
    documents = documents_of([7, 33, 1, 1, 30, 8])

    def answers():
        out = operator.attend_documents(*leaves[:3], documents, **options)
        return out, *torch.autograd.grad((out * torch.arange(8.0)).sum(), leaves)

    got = answers()
    assert stand_in == ["forward", "backward"]
    monkeypatch.setattr(operator, "attend_pieces", attend_pieces)
    monkeypatch.setattr(operator, "attend_pieces_backward", attend_pieces_backward)
    for found, wanted in zip(got, answers(), strict=True):
        assert_near(found, wanted, 1e-12)
    assert len(stand_in) == 2


def test_who_is_asked():
    assert kernels.takes_heads(BF16, 128)
    assert kernels.takes_heads(torch.float16, 256)
    assert not kernels.takes_heads(torch.float32, 128)
    assert not kernels.takes_heads(BF16, 36)
    assert not kernels.takes_heads(BF16, 264)
    assert not kernels.has_document_kernel(torch.zeros(1, 8, dtype=BF16)), "on a CPU"
    for device, takes in (("cpu", True), ("meta", False)):
        assert operator.can_attend_documents(torch.zeros(1, 8, device=device)) is takes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("width", [64, 128, 192])
def test_on_a_gpu_as_on_the_host(width, narrow):
    torch.manual_seed(0)
    given = [torch.randn(2, n, 300, width, dtype=BF16) for n in (4, 2, 2)]
    sinks = torch.randn(4) if narrow.get("sinks") else None
    options = {key: value for key, value in narrow.items() if key != "sinks"}
    documents, probe = documents_of([170, 130, 1, 1, 98, 200]), torch.randn(2, 4, 300, width)

    def answers(device, dtype):
        leaves = [t.to(device, dtype).requires_grad_() for t in given]
        if sinks is not None:
            leaves.append(sinks.to(device).requires_grad_())
        moved = documents.changed(lambda t: t.to(device))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            out = operator.attend_documents(
                *leaves[:3], moved, sinks=leaves[3] if sinks is not None else None, **options
            )
            loss = (out.float() * probe.to(device, non_blocking=True)).sum()
            return [t.detach() for t in (out, *torch.autograd.grad(loss, leaves))]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for got, wanted in zip(answers("cuda", BF16), answers("cpu", torch.float32), strict=True):
        assert_near(got.cpu().float(), wanted, 3e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_on_a_gpu_other_documents_are_not_compiled_anew():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    attention = GroupedQueryAttention(embed_dim=128, num_heads=2, num_kv_heads=1, head_dim=64)
    attention = attention.to("cuda", BF16)
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    x = torch.randn(1, 60, 128, dtype=BF16, device="cuda", requires_grad=True)
    to_gpu = functools.partial(torch.Tensor.to, device="cuda")
    for lengths in ([60], [20, 1, 39], [1] * 60):
        row = {"tokens": range(60), "labels": range(60), "lengths": lengths}
        batch = collate([row], pad_id=0, packed=True)
        documents = batch.documents.changed(to_gpu)
        got, wanted = (f(x, mask=documents) for f in (compiled, attention))
        got.float().sum().backward()
        assert_near(got, wanted, 2e-2)
    assert counter.frame_count == 1
