"""Bytes that come off the disk while processes load their shards: each its own, nothing twice.

Processes are played one after the other; which boxes they hold, ``shard_box`` says.
"""

import itertools
import math

import pytest
from helpers_export import CONFIGS
from helpers_weights import load_in_boxes
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moe_builders.checkpoint import safetensors_file
from moe_builders.checkpoint.folder import TensorFolder
from moe_builders.checkpoint.stream import materialize, model_shapes
from moe_builders.hub import build_hf_model, create_hf_model, read_hf_source
from moe_builders.parallel.boxes import box_elements, shard_box
from moe_builders.weights import make_plan

BYTES = 4
LAYOUTS = {  # mesh, experts' placements, the others'
    "1": ((1,), [Shard(0)], [Shard(0)]),
    "2": ((2,), [Shard(0)], [Shard(0)]),
    "3": ((3,), [Shard(0)], [Shard(0)]),
    "4": ((4,), [Shard(0)], [Shard(0)]),
    "2 copies": ((2, 2), [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    # experts over the right axis, then each process's over the left one
    "strided": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), Shard(0)]),
    "strided, uneven": ((3, 2), [_StridedShard(0, split_factor=2), Shard(0)], [Shard(0)] * 2),
    "dim 1": ((2, 2), [Shard(1), Shard(0)], [Shard(0), Shard(0)]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, config in CONFIGS.items():
        found[name] = tmp_path_factory.mktemp(name)
        create_hf_model(found[name], config, seed=1, max_shard_bytes=150_000)
    return found


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """Of every read from any file."""
    seen, read = [], safetensors_file._read

    def noted(file, start, length, dtype):
        seen.append(length)
        return read(file, start, length, dtype)

    monkeypatch.setattr(safetensors_file, "_read", noted)
    return seen


def load_as_each(folder, layout, lengths):
    """By process: bytes read of experts and of the rest, bytes held of both; and the model."""
    sizes, experts, others = LAYOUTS[layout]
    source = read_hf_source(folder)
    model = build_hf_model(source)
    shapes = model_shapes(model)
    plan, files = make_plan(source.family.weight_map, shapes), TensorFolder(folder)
    materialize(model, "cpu")
    kinds = {name: "experts." in name for name in shapes}
    by_process = []
    for place in itertools.product(*map(range, sizes)):
        boxes = {
            name: shard_box(shape, sizes, experts if kinds[name] else others, place)
            for name, shape in shapes.items()
        }
        found = {}
        for kind in (True, False):
            names = [name for name in shapes if kinds[name] is kind]
            lengths.clear()
            pieces = [piece for piece in plan if piece.ours in names]
            # a box without elements for the rest, so that this part alone is read
            empty = {n: (slice(0, 0), *boxes[n][1:]) for n in shapes if n not in names}
            held = {n: [boxes[n]] for n in names} | {n: [box] for n, box in empty.items()}
            load_in_boxes(model, pieces, files, held)
            found[kind] = sum(lengths), BYTES * sum(box_elements(boxes[n]) for n in names)
        by_process.append(found)
    return by_process, model, shapes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_process_reads_its_share(folders, lengths, name, layout):
    by_process, model, shapes = load_as_each(folders[name], layout, lengths)
    assert not any(bool(t.isnan().any()) for t in model.state_dict().values()), "all was read"
    copies = 2 if layout == "2 copies" else 1
    total = BYTES * sum(map(math.prod, shapes.values()))
    assert sum(held for found in by_process for _, held in found.values()) == copies * total
    for found in by_process:
        (experts_read, experts_held), (read, held) = found[True], found[False]
        assert read == held
        if (name, layout) == ("gpt_oss", "dim 1"):
            # rows of ours are columns on disk: of its experts each process reads all
            assert experts_read == 2 * experts_held
        else:
            assert experts_read == experts_held


def test_more_than_the_share_would_be_seen(folders, lengths, monkeypatch):
    """The count is of what comes off the disk, not of what is kept of it."""
    read = TensorFolder.read

    def wasteful(folder, name, region):
        whole = read(folder, name, (slice(None),) * len(region))
        return whole[region].clone()

    monkeypatch.setattr(TensorFolder, "read", wasteful)
    by_process, _, _ = load_as_each(folders["qwen3_moe"], "2", lengths)
    assert all(found[False][0] > found[False][1] for found in by_process)
