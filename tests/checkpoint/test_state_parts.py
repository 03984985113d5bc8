"""Quantised states on other processes: which box each part is, whole blocks to the bit."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from moe_builders.checkpoint.state_parts import Entry, StoredParts

KINDS = {"8-bit": OptimState8bit, "4-bit": OptimState4bit, "fp32": None}
SHAPE, BLOCK = (8, 4, 64), 64


def _processes(sizes, placements, act):
    """What each process of a mesh gets; they are all played by this one, one after another."""
    found = []
    for rank in range(math.prod(sizes)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(sizes))
        try:
            mesh = init_device_mesh("cpu", sizes)
            found.append(act(mesh, placements))
        finally:
            dist.destroy_process_group()
    return found


def _sharded(values, mesh, placements):
    """(this process's DTensor of a whole tensor, its slices)."""
    shape, offset = compute_local_shape_and_global_offset(values.shape, mesh, placements)
    where = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    local = values[where].contiguous()
    stride = values.stride()
    return DTensor.from_local(local, mesh, placements, shape=values.shape, stride=stride), where


def _entry(values, mesh, placements, kind, *, alone=False, block=BLOCK):
    parameter, where = _sharded(values, mesh, placements)
    local = parameter.to_local()
    if kind is not None:
        state = kind.zeros(local.shape, signed=True, block_size=block)
        local = state.copy_(local)
    if alone:
        return Entry("optimizer.w.exp_avg", local, parameter), where
    value = DTensor.from_local(
        local, mesh, placements, shape=values.shape, stride=values.stride(), run_check=False
    )
    return Entry("optimizer.w.exp_avg", value, parameter), where


def _values():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def _saved(values, sizes, placements, kind, **options):
    """All tensors of a checkpoint, and the values in it."""
    stored, whole = {}, torch.zeros_like(values)

    def act(mesh, placements):
        entry, where = _entry(values, mesh, placements, kind, **options)
        local = entry.local
        whole[where] = local if kind is None else local.dequantize()
        for name, tensor in entry.tensors().items():
            stored[name] = values if isinstance(tensor, DTensor) else tensor.clone()

    _processes(sizes, placements, act)
    return stored, whole


def _resumed(stored, sizes, placements, kind, **options):
    """(values of all processes' parts, whether any was rounded)."""
    whole, shapes = torch.zeros(SHAPE), {n: (tuple(t.shape), t.dtype) for n, t in stored.items()}

    def act(mesh, placements):
        entry, where = _entry(torch.zeros(SHAPE), mesh, placements, kind, **options)

        def read(tensors):
            for name, tensor in tensors.items():
                if isinstance(tensor, DTensor):
                    tensor.to_local().copy_(stored[name][where])
                else:
                    tensor.copy_(stored[name])

        parts = StoredParts(shapes)
        assert parts.can_refill(entry)
        rounded = parts.refill(entry, read)
        local = entry.local
        whole[where] = local if kind is None else local.dequantize()
        return rounded

    return whole, any(_processes(sizes, placements, act))


def test_a_name_says_the_whole_box_and_rows_alone_as_ever():
    def names(sizes, placements):
        def act(mesh, placements):
            entry, _ = _entry(_values(), mesh, placements, OptimState8bit)
            (name,) = [name for name in entry.tensors() if ".codes" in name]
            return name.removeprefix("optimizer.w.exp_avg.codes")

        return _processes(sizes, placements, act)

    assert names((2,), [Shard(0)]) == ["[0:4]", "[4:8]"]
    assert names((1,), [Shard(0)]) == ["[0:8]"]
    assert names((2,), [Replicate()]) == ["[0:8]"] * 2
    assert names((2,), [Shard(1)]) == ["[0:8,0:2]", "[0:8,2:4]"]
    assert names((2, 2), [Shard(1), Shard(0)]) == [
        "[0:4,0:2]", "[4:8,0:2]", "[0:4,2:4]", "[4:8,2:4]"
    ]  # fmt: skip
    # experts over ep, then each process's rows once more
    assert names((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]) == [
        "[0:2]", "[4:6]", "[2:4]", "[6:8]"
    ]  # fmt: skip
    assert names((2,), [Shard(2)]) == ["[0:8,0:4,0:32]", "[0:8,0:4,32:64]"]


@pytest.mark.parametrize("kind", ["8-bit", "4-bit"])
@pytest.mark.parametrize("new", [(1,), (2,), (4,), (3,)])
@pytest.mark.parametrize("old", [(1,), (2,), (4,), (3,)])
def test_whole_blocks_move_to_the_bit(old, new, kind):
    """Rows are 256 values, four blocks: any split by rows keeps blocks whole."""
    stored, saved = _saved(_values(), old, [Shard(0)], KINDS[kind])
    found, rounded = _resumed(stored, new, [Shard(0)], KINDS[kind])
    assert torch.equal(found, saved)
    assert not rounded


def test_experts_over_other_processes_move_to_the_bit():
    over_both = [_StridedShard(0, split_factor=2), Shard(0)]
    stored, saved = _saved(_values(), (2, 2), over_both, OptimState8bit)
    for sizes, placements in (((1,), [Shard(0)]), ((4,), [Shard(0)]), ((2,), [Shard(0)])):
        found, rounded = _resumed(stored, sizes, placements, OptimState8bit)
        assert torch.equal(found, saved)
        assert not rounded


SPLITS = {
    "rows to columns": ((2,), [Shard(0)], (2,), [Shard(1)]),
    "columns to rows": ((2,), [Shard(2)], (4,), [Shard(0)]),
    "a grid to one": ((2, 2), [Shard(1), Shard(0)], (1,), [Shard(0)]),
    "experts to columns of experts": (
        (2, 2),
        [_StridedShard(0, split_factor=2), Shard(0)],
        (2, 2),
        [Shard(1), Shard(0)],
    ),
    "copies of halves to a grid": ((2, 2), [Replicate(), Shard(1)], (2, 2), [Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("kind", ["8-bit", "4-bit"])
@pytest.mark.parametrize("split", SPLITS)
def test_other_blocks_are_rounded_and_said(split, kind):
    old, old_placements, new, new_placements = SPLITS[split]
    stored, saved = _saved(_values(), old, old_placements, KINDS[kind])
    found, rounded = _resumed(stored, new, new_placements, KINDS[kind])
    assert rounded
    assert not torch.equal(found, saved)
    step = {"8-bit": 0.02, "4-bit": 0.2}[kind]  # of the largest value in a block
    assert (found - saved).abs().max() <= step * saved.abs().max()
    again, _ = _resumed(stored, old, old_placements, None)
    assert torch.equal(again, saved), "as fp32 each value is what it was"


@pytest.mark.parametrize("kind", ["8-bit", "4-bit"])
def test_blocks_of_another_size_are_rounded(kind):
    stored, saved = _saved(_values(), (2,), [Shard(0)], KINDS[kind])
    found, rounded = _resumed(stored, (1,), [Shard(0)], KINDS[kind], block=BLOCK // 2)
    assert rounded
    assert (found - saved).abs().max() <= 0.2 * saved.abs().max()


@pytest.mark.parametrize("kind", ["8-bit", "4-bit"])
def test_fp32_becomes_quantised_and_back(kind):
    values = _values()
    stored, _ = _saved(values, (2,), [Shard(0)], None)
    assert list(stored) == ["optimizer.w.exp_avg"]
    found, rounded = _resumed(stored, (4,), [Shard(0)], KINDS[kind])
    assert rounded
    _, wanted = _saved(values, (4,), [Shard(0)], KINDS[kind])
    assert torch.equal(found, wanted), "quantised as the optimizer does it"


@pytest.mark.parametrize(("old", "new"), [((1,), (3,)), ((3,), (2,)), ((4,), (1,))])
def test_a_process_own_plain_tensors_are_shared_out_anew(old, new):
    values = _values()
    stored, _ = _saved(values, old, [Shard(0)], None, alone=True)
    assert len(stored) == old[0]
    for alone in (True, False):
        found, rounded = _resumed(stored, new, [Shard(0)], None, alone=alone)
        assert torch.equal(found, values)
        assert not rounded


def test_what_cannot_be_put_together():
    stored, _ = _saved(_values(), (2,), [Shard(0)], OptimState8bit)
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in stored.items()}
    gap = {n: s for n, s in shapes.items() if "[4:8]" not in n}
    no_map = {n: s for n, s in shapes.items() if "qmap" not in n}
    larger = {n.replace("[4:8]", "[5:9]"): s for n, s in shapes.items()}
    other = {"optimizer.w.exp_avg[0:8]": (SHAPE, torch.bfloat16)}

    def act(mesh, placements):
        quantised, _ = _entry(_values(), mesh, placements, OptimState8bit)
        plain, _ = _entry(_values(), mesh, placements, None)
        assert StoredParts(shapes).can_refill(quantised)
        assert StoredParts(shapes).can_refill(plain)
        for kind in (gap, no_map, larger, {}):
            assert not StoredParts(kind).can_refill(quantised)
        assert not StoredParts(other).can_refill(plain), "of another dtype"

    _processes((1,), [Shard(0)], act)
