"""Loading into shards: each process reads its own bytes and no others.

The processes of a mesh are played one after the other with torch's fake process group: loading
needs no communication.
"""

import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers_weights import Recorder
from hf_helpers import assert_equal_tensors, write_hf_folder
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_builders import hub
from moe_builders.checkpoint import quantized, stream
from moe_builders.hub import build_hf_model, load_hf_model, load_hf_weights, read_hf_source
from moe_builders.parallel.sharding import shard_model
from moe_builders.parallel.world import World, open_world

BF16_BYTES = 2
NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    return write_hf_folder(path, dtype=torch.bfloat16, shard_size="100KB", mlp_only_layers=[0])


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    monkeypatch.setattr(Recorder, "reads", [], raising=False)
    monkeypatch.setattr(quantized, "TensorFolder", Recorder)
    return Recorder.reads


@contextmanager
def play(rank: int, shape: tuple[int, ...]) -> Iterator[World]:
    """This process as one of many, which are not there."""
    size = math.prod(shape)
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        names = ("dp_replicate", "dp_shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        yield World(rank, size, torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # or the next process is taken for this one


def load_sharded(folder: Path, world: World, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The local shards, loaded as a recipe does it."""
    source = read_hf_source(folder)
    model = build_hf_model(source, dtype=dtype)
    shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
    load_hf_weights(model, source)
    state = model.state_dict()
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    return {name: tensor.to_local().clone() for name, tensor in state.items()}


# 3 divides neither the 8 experts nor the widths; of 11 processes some hold no expert at all
@pytest.mark.parametrize("size", [1, 2, 3, 4, 11])
def test_each_process_reads_what_it_holds(folder, reads, size):
    whole = load_hf_model(folder, dtype=torch.float32)[0].state_dict()
    total = sum(tensor.numel() for tensor in whole.values())
    shards = []
    reads.clear()
    for rank in range(size):
        start = len(reads)
        with play(rank, (size,)) as world:
            shards.append(load_sharded(folder, world))
        held = sum(tensor.numel() for tensor in shards[-1].values())
        assert sum(size for _, size in reads[start:]) == held * BF16_BYTES
        assert held <= sum(math.ceil(len(t) / size) * t[0].numel() for t in whole.values())
    assert sum(size for _, size in reads) == total * BF16_BYTES  # nothing twice
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([shard[name] for shard in shards]), tensor), name


def test_an_expert_is_read_only_where_it_lives(folder, reads):
    with play(1, (4,)) as world:
        load_sharded(folder, world)
    experts = {name.split(".")[5] for name, _ in reads if ".experts." in name}
    assert experts == {"2", "3"}


def test_copies_of_the_model_read_the_same(folder, reads):
    found = []
    for rank in (1, 3):  # of 2 copies over 2 processes each: the second half, twice
        reads.clear()
        with play(rank, (2, 2)) as world:
            found.append((load_sharded(folder, world), list(reads)))
    (first, first_reads), (second, second_reads) = found
    assert first_reads == second_reads
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_more_than_one_tensor_is_in_memory(folder, reads):
    """On the way into the model: an expert's matrix at a time, never a layer's, never a file's."""
    model, _ = load_hf_model(folder)
    vocabulary = model.tok_embeddings.weight.numel() * BF16_BYTES
    assert max(size for _, size in reads) == vocabulary
    experts = [size for name, size in reads if ".experts." in name]
    assert set(experts) == {64 * 32 * BF16_BYTES}
    assert len(experts) == 2 * NUM_EXPERTS * 3  # layers 1 and 2


def test_one_process_sharded_saves_what_it_loaded(folder, tmp_path):
    with open_world(device="cpu") as world:
        source = read_hf_source(folder)
        model = build_hf_model(source, dtype=torch.float32)
        shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
        load_hf_weights(model, source)
        tokens = torch.arange(12)[None]
        plain = load_hf_model(folder, dtype=torch.float32)[0]
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=1e-6)
        hub.save_hf_model(model, tmp_path / "out", source=source)
    assert_equal_tensors(folder, tmp_path / "out")


@pytest.mark.parametrize("size", [1, 3])
def test_large_tensors_come_in_parts(folder, reads, size, monkeypatch):
    """No more rows than fit at once; still nothing twice, and the same values."""
    monkeypatch.setattr(stream, "_AT_ONCE", 700)
    test_each_process_reads_what_it_holds(folder, reads, size)
    assert max(size for name, size in reads if "embed_tokens" in name) <= 700 * BF16_BYTES
    assert max(size for name, size in reads if "q_proj" in name) <= 700 * BF16_BYTES


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("show", "quick", "error_stream", "seen"),
    [
        (True, 0, Terminal, True), (False, 0, Terminal, False), (True, 0, io.StringIO, False),
        (True, 60, Terminal, False),
    ],
)  # fmt: skip
def test_the_bar_is_for_terminals_that_wait(
    folder, monkeypatch, capsys, show, quick, error_stream, seen
):
    monkeypatch.setattr(stream, "_QUICK", quick)
    monkeypatch.setattr("sys.stderr", error_stream())
    source = read_hf_source(folder)
    load_hf_weights(build_hf_model(source), source, show=show)
    said = sys.stderr.getvalue()
    assert ("loading" in said) is seen
    assert bool(said) is seen
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_nan_is_found(dtype):
    tensor = torch.full((1000, 33), -float("inf"), dtype=dtype)
    assert not stream._has_nan(tensor)
    for place in ((0, 0), (999, 32), (500, 7)):
        spoiled = tensor.clone()
        spoiled[place] = float("nan")
        assert stream._has_nan(spoiled)
    assert not stream._has_nan(torch.empty(0, 3, dtype=dtype))
    assert not stream._has_nan(torch.zeros(3, dtype=torch.int64))
