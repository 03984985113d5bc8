"""Sorting by expert, gathering and combining: with ``slot_of`` and without, the same answers."""

import pytest
import torch
from helpers import assert_near, quick
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders.ops.permute import combine_rows, gather_rows, sort_by_expert


def random_choice(t, k, e, *, seed=0, dead=0.3):
    """[t, k] distinct experts and [t, k] bool live."""
    stream = torch.Generator().manual_seed(seed)
    expert = torch.rand(t, e, generator=stream).topk(k).indices
    return expert, torch.rand(t, k, generator=stream) > dead


@quick
@given(
    t=st.integers(0, 9),
    e=st.integers(1, 6),
    data=st.data(),
    seed=st.integers(0, 999),
    masked=st.booleans(),
)
def test_sorted_as_python_sorts(t, e, data, seed, masked):
    k = data.draw(st.integers(1, e))
    expert, live = random_choice(t, k, e, seed=seed)
    live = live if masked else torch.ones(t, k, dtype=torch.bool)
    places = [(i, c) for i in range(t) for c in range(k)]
    wanted = sorted(places, key=lambda p: int(expert[p]) if live[p] else e)  # stable
    got = sort_by_expert(expert, e, live if masked else None)
    assert got.order.tolist() == [i * k + c for i, c in wanted]
    assert got.token_index.tolist() == [i for i, _ in wanted]
    assert got.num_tokens_per_expert.tolist() == [int((expert[live] == j).sum()) for j in range(e)]
    assert got.slot_of.tolist() == [[wanted.index((i, c)) for c in range(k)] for i in range(t)]
    assert got.num_tokens_per_expert.dtype == torch.int32


class Called(TorchDispatchMode):
    """Writes down which operators run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [True, False])
def test_sorting_on_a_gpu_is_one_operator(masked):
    """A fake GPU's tensors take it; a CPU's never do, and have the same shapes and dtypes."""
    found = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), Called() as called:
            expert = torch.empty(5, 2, dtype=torch.int64, device=device)
            live = torch.empty(5, 2, dtype=torch.bool, device=device) if masked else None
            called.names.clear()
            found[device] = sort_by_expert(expert, 4, live)
        ours = [name for name in called.names if name.startswith("moe_builders")]
        assert ours == ["moe_builders.sort_by_expert.default"] * (device == "cuda")
        assert ("aten.sort.stable" in called.names) == (device == "cpu")
    for name, here, there in zip(found["cpu"]._fields, *found.values(), strict=True):
        assert (here.shape, here.dtype, here.stride()) == (there.shape, there.dtype, there.stride())
        assert there.device.type == "cuda", name


@pytest.mark.parametrize("t", [0, 6])
@pytest.mark.parametrize("masked", [True, False])
def test_the_operator_sorts_without_triton(t, masked):
    expert, live = random_choice(t, 2, 4)
    live = live if masked else None
    sort = torch.ops.moe_builders.sort_by_expert.default
    for mine, wanted in zip(sort(expert, 4, live), sort_by_expert(expert, 4, live), strict=True):
        assert torch.equal(mine, wanted)
    torch.library.opcheck(sort, (expert, 4, live))


def test_the_operator_compiles_into_one_node():
    """Whether there is Triton is not asked while it is traced."""
    expert, live = random_choice(6, 2, 4)
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op != "placeholder"])
        return graph

    compiled = torch.compile(torch.ops.moe_builders.sort_by_expert, fullgraph=True, backend=backend)
    got = compiled(expert, 4, live)
    assert torch.equal(got[0], sort_by_expert(expert, 4, live).order)
    (targets,) = graphs
    assert sum("sort" in target for target in targets) == 1


def test_gathering_copies_each_assignments_token():
    expert, live = random_choice(6, 2, 4)
    assigned = sort_by_expert(expert, 4, live)
    x = torch.randn(6, 3)
    got = gather_rows(x, assigned.token_index, assigned.slot_of)
    assert torch.equal(got, torch.stack([x[i] for i in assigned.token_index.tolist()]))


def both_ways(function, *inputs):
    """Outputs and gradients of function(slot_of) and function(None)."""
    found = []
    for with_slots in (True, False):
        leaves = [v.clone().requires_grad_() for v in inputs]
        y = function(with_slots, *leaves)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("slots", [True, False])
def test_nothing_is_added_by_atomics_on_a_gpu(slots):
    """Tensors without values go the ways of a GPU's."""
    with torch.device("meta"), Called() as called:
        x, weights = (torch.empty(shape, requires_grad=True) for shape in ((5, 3), (10,)))
        token = torch.empty(10, dtype=torch.int64)
        slot_of = torch.empty(5, 2, dtype=torch.int64) if slots else None
        rows = gather_rows(x, token, slot_of)
        combine_rows(rows, weights, token, slot_of, 5).sum().backward()
    assert x.grad.shape == x.shape
    atomics = ("index_add", "scatter_add", "scatter_reduce", "index_put", "embedding_bag")
    assert any("index_select" in name for name in called.names)
    assert not [name for name in called.names if any(word in name for word in atomics)]


@pytest.mark.parametrize("dead", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_gathering_with_slots_and_without(k, dead):
    expert, live = random_choice(7, k, 5, dead=dead)
    assigned = sort_by_expert(expert, 5, live)
    x = torch.randn(7, 4, dtype=torch.float64)
    for got, wanted in both_ways(
        lambda slots, x: gather_rows(x, assigned.token_index, assigned.slot_of if slots else None),
        x,
    ):
        assert_near(got, wanted, 1e-14)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dead", [0.0, 0.4])
@pytest.mark.parametrize("k", [1, 3])
def test_combining_with_slots_and_without(k, dead, weighted):
    expert, live = random_choice(7, k, 5, dead=dead)
    assigned = sort_by_expert(expert, 5, live)
    rows = torch.randn(7 * k, 4, dtype=torch.float64)
    weights = torch.randn(7 * k, dtype=torch.float64)

    def combine(slots, rows, *weights):
        return combine_rows(
            rows,
            weights[0] if weights else None,
            assigned.token_index,
            assigned.slot_of if slots else None,
            7,
        )

    for got, wanted in both_ways(combine, rows, *([weights] if weighted else [])):
        assert_near(got, wanted, 1e-14)
    token = combine(True, rows, *([weights] if weighted else []))[2]  # one of them by hand
    scaled = rows * weights[:, None] if weighted else rows
    assert_near(token, scaled[assigned.token_index == 2].sum(0), 1e-14)


def test_combining_gradients_by_differences():
    expert, live = random_choice(4, 2, 3)
    assigned = sort_by_expert(expert, 3, live)
    rows = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for slot_of in (assigned.slot_of, None):
        assert torch.autograd.gradcheck(
            lambda r, w, s: combine_rows(r, w, assigned.token_index, s, 4),
            (rows, weights, slot_of),
        )


def test_a_tokens_rows_are_added_first_choice_first():
    expert, _ = random_choice(50, 4, 8)
    assigned = sort_by_expert(expert, 8, None)
    rows, weights = torch.randn(200, 16), torch.randn(200)
    wanted, weighted = torch.zeros(50, 16), torch.zeros(50, 16)
    for choice in range(4):
        slots = assigned.slot_of[:, choice]
        wanted = wanted + rows[slots]
        weighted = weighted + rows[slots] * weights[slots, None]
    places = assigned.token_index, assigned.slot_of, 50
    assert torch.equal(combine_rows(rows, None, *places), wanted)  # the very same bits
    assert_near(combine_rows(rows, weights, *places), weighted, 1e-6)  # a·b + c rounds once


def test_the_same_bits_every_run():
    expert, live = random_choice(300, 4, 8)
    assigned = sort_by_expert(expert, 8, live)
    x, weights = torch.randn(300, 16), torch.randn(1200)

    def run():
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        rows = gather_rows(leaves[0], assigned.token_index, assigned.slot_of)
        args = (assigned.token_index, assigned.slot_of, 300)
        y = combine_rows(rows.sin(), leaves[1], *args)
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in leaves)]

    first = run()
    for _ in range(3):
        for got, wanted in zip(run(), first, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("with_slots", [True, False])
def test_bf16_rows_are_added_in_fp32_and_rounded_once(with_slots):
    expert, _ = random_choice(20, 4, 8)
    assigned = sort_by_expert(expert, 8, None)
    slot_of = assigned.slot_of if with_slots else None
    rows = torch.randn(80, 16).bfloat16().requires_grad_()
    weights = torch.rand(80).requires_grad_()
    got = combine_rows(rows, weights, assigned.token_index, slot_of, 20)
    exact = combine_rows(
        rows.detach().double(), weights.detach().double(), assigned.token_index, slot_of, 20
    )
    assert torch.equal(got, exact.bfloat16())
    got.sum().backward()
    assert rows.grad.dtype == torch.bfloat16
    assert weights.grad.dtype == torch.float32
