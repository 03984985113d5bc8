"""Safetensors folders: what is in them, slices of tensors, where one may be made."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moe_builders.checkpoint.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    Entry,
    TensorFolder,
    check_output_folder,
)
from moe_builders.errors import InputError


def test_entries_come_from_the_headers_alone(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.tensor(1)}, tmp_path / "x.safetensors")
    save_file({"c": torch.zeros(0, 4).bfloat16()}, tmp_path / "y.safetensors", {"format": "pt"})
    weight_map = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "z.safetensors").write_bytes(b"not in the index: never opened")
    folder = TensorFolder(tmp_path)
    assert folder.has_index
    assert folder.entries == {
        "a": Entry("x.safetensors", "F32", (2, 3)),
        "b": Entry("x.safetensors", "I64", ()),
        "c": Entry("y.safetensors", "BF16", (0, 4)),
    }
    assert folder.read("c", (slice(None), slice(1, 3))).shape == (0, 2)
    assert folder.read("a", (slice(1, 2), slice(None))).shape == (1, 3)
    assert folder.read("b", ()).item() == 1


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
        torch.bool, torch.float8_e4m3fn,
    ],
)  # fmt: skip
def test_slices_of_every_type(tmp_path, dtype):
    tensor = torch.arange(60).view(3, 4, 5).to(dtype)
    save_file({"t": tensor}, tmp_path / SINGLE_NAME)
    folder = TensorFolder(tmp_path)
    assert not folder.has_index
    for region in (
        (slice(None), slice(None), slice(None)),
        (slice(1, 3), slice(2, 3), slice(0, 5)),
        (slice(0, 1), slice(0, 4), slice(3, 5)),
    ):
        found = folder.read("t", region)
        assert found.dtype == dtype
        assert torch.equal(found.float(), tensor[region].float())


def test_a_file_that_vanishes_is_named(tmp_path):
    save_file({"t": torch.zeros(2)}, tmp_path / SINGLE_NAME)
    folder = TensorFolder(tmp_path)
    (tmp_path / SINGLE_NAME).unlink()
    with pytest.raises(InputError, match=rf"{SINGLE_NAME} cannot be read"):
        folder.read("t", (slice(None),))


def test_not_a_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        TensorFolder(tmp_path / "nowhere")


def test_an_index_of_the_single_file(tmp_path):
    """Some programs write one."""
    save_file({"t": torch.arange(2)}, tmp_path / SINGLE_NAME)
    index = {"metadata": {}, "weight_map": {"t": SINGLE_NAME}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    folder = TensorFolder(tmp_path)
    assert folder.has_index
    assert folder.entries == {"t": Entry(SINGLE_NAME, "I64", (2,))}
    assert folder.read("t", (slice(None),)).tolist() == [0, 1]


def test_a_tensor_in_two_files(tmp_path):
    for n in (1, 2):
        save_file(
            {"t": torch.full((2,), n), f"u{n}": torch.zeros(1)}, tmp_path / f"{n}.safetensors"
        )
    weight_map = {"t": "1.safetensors", "u1": "1.safetensors", "u2": "2.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"holds t twice, in 1\.safetensors and in 2\.safetensors"):
        TensorFolder(tmp_path)


def test_check_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for fine in (tmp_path, tmp_path / "folder", tmp_path / "folder" / "a" / "b", "a/b", "."):
        check_output_folder(fine)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    for path in ("file", "file/a", "file/a/b", tmp_path / "file"):
        with pytest.raises(InputError, match=r"file is a file, .* choose another output path"):
            check_output_folder(path)
