"""Slices by plain reads: the bytes that slicing gives, and no mapped file in memory."""

import io
import json
import re
import struct
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_builders.checkpoint import safetensors_file
from moe_builders.checkpoint.folder import SINGLE_NAME, TensorFolder
from moe_builders.checkpoint.safetensors_file import read_header, read_region
from moe_builders.errors import InputError

MIB = 2**20


def sides(size):
    """Every slice of a dim of this size, the empty ones too."""
    ends = range(size + 1)
    return [slice(None), *(slice(a, b) for a, b in product(ends, ends) if a <= b)]


@pytest.mark.parametrize("chunk", [1, 24, 2**24])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1,), (3, 4), (4, 1, 2), (2, 3, 2), (1, 1, 3)])
def test_every_region_of_small_tensors(tmp_path, monkeypatch, shape, chunk):
    monkeypatch.setattr(safetensors_file, "_CHUNK", chunk)
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    path = tmp_path / "x.safetensors"
    save_file({"before": torch.ones(3), "t": tensor, "zafter": torch.ones(2)}, path)
    place = read_header(path)["t"]
    with io.FileIO(path) as file:
        for region in product(*map(sides, shape)):
            assert torch.equal(read_region(file, place, region), tensor[region]), region


@pytest.mark.parametrize(
    "region",
    [
        (slice(1, 3), slice(None)), (slice(1, 3), slice(0, 1)),
        (slice(2, 3), slice(1, 3), slice(None)), (slice(2, 3), slice(1, 3), slice(0, 1)),
    ],
)  # fmt: skip
def test_no_more_than_the_rows_is_read(tmp_path, region):
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.zeros(4, 100, 8)[(0,) * (3 - len(region))].contiguous()}, path)
    asked = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            asked.append(len(buffer))
            return super().readinto(buffer)

    with Counting(path) as file:
        read_region(file, read_header(path)["t"], region)
    assert sum(asked) == 2 * 8 * 4


def test_reads_that_come_in_parts(tmp_path):
    """The system gives at most 2 GiB at once."""
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.arange(100)}, path)

    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    with Slow(path) as file:
        found = read_region(file, read_header(path)["t"], (slice(3, 90),))
    assert found.tolist() == list(range(3, 90))


def test_a_file_that_became_shorter(tmp_path):
    save_file({"t": torch.arange(100)}, tmp_path / SINGLE_NAME)
    folder = TensorFolder(tmp_path)
    with (tmp_path / SINGLE_NAME).open("r+b") as file:
        file.truncate(200)
    with pytest.raises(InputError, match=r"model.safetensors cannot be read: it ends \d+ bytes ea"):
        folder.read("t", (slice(None),))


def test_a_type_that_torch_lacks(tmp_path):
    header = json.dumps({"t": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    content = struct.pack("<Q", len(header)) + header + b"ab"
    (tmp_path / SINGLE_NAME).write_bytes(content)
    folder = TensorFolder(tmp_path)
    with pytest.raises(InputError, match="cannot be read: its type F4 is not known"):
        folder.read("t", (slice(None),))


@pytest.mark.parametrize("offsets", [[-8, 0], [-4, 8], [0, 4], [4, 8]])
def test_a_header_whose_offsets_do_not_fit(tmp_path, offsets):
    entries = {
        "t": {"dtype": "F32", "shape": [2], "data_offsets": offsets},
        "u": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    header = json.dumps(entries).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(InputError, match=r"damaged and cannot be read: its header gives t, F32 "):
        TensorFolder(tmp_path)


def status(kind):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", text)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's peak: Linux")
def test_what_was_read_does_not_stay_resident(tmp_path):
    """A mapped file would: 128 MiB of it here."""
    save_file(
        {f"t{n}": torch.full((8 * MIB,), n).byte() for n in range(16)}, tmp_path / SINGLE_NAME
    )
    folder = TensorFolder(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for number in range(16):
        assert folder.read(f"t{number}", (slice(None),))[-1] == number
    assert status("VmHWM") - before < 64 * MIB
