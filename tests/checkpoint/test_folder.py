"""Safetensors folders: reading slices, writing file by file, and appearing whole or not at all."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_builders.checkpoint.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    Entry,
    TensorFolder,
    check_output_folder,
    publish,
    raise_alone,
    split_into_files,
    write_tensors,
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


FILES = {"m-1.safetensors": ["b", "a"], "m-2.safetensors": ["c"]}


@pytest.mark.parametrize("with_index", [True, False])
def test_write_tensors(tmp_path, with_index):
    calls = []

    def tensors_of(names: list[str]) -> dict[str, torch.Tensor]:
        calls.append((names, sorted(p.name for p in tmp_path.iterdir())))
        return {name: torch.full((3,), ord(name), dtype=torch.float16) for name in names}

    write_tensors(tmp_path, FILES, tensors_of, with_index=with_index, write=True)
    # the second file's tensors were asked for when the first file was written
    assert calls == [(["b", "a"], []), (["c"], ["m-1.safetensors"])]
    assert {k: v.tolist() for k, v in load_file(tmp_path / "m-1.safetensors").items()} == {
        "a": [97] * 3,
        "b": [98] * 3,
    }
    assert (tmp_path / INDEX_NAME).exists() == with_index
    if with_index:
        assert json.loads((tmp_path / INDEX_NAME).read_text()) == {
            "metadata": {"total_size": 18},
            "weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"},
        }
        assert set(TensorFolder(tmp_path).entries) == {"a", "b", "c"}


def test_a_process_that_does_not_write_still_takes_part(tmp_path):
    calls = []
    write_tensors(
        tmp_path,
        FILES,
        lambda names: calls.append(names) or {},
        with_index=True,
        write=False,
    )
    assert calls == list(FILES.values())
    assert not list(tmp_path.iterdir())


def test_one_files_tensors_are_gone_before_the_next(tmp_path):
    alive = []

    def tensors_of(names: list[str]) -> dict[str, torch.Tensor]:
        assert not any(tensor() is not None for tensor in alive)
        tensors = {name: torch.zeros(3) for name in names}
        alive.extend(map(weakref.ref, tensors.values()))
        return tensors

    write_tensors(tmp_path, FILES, tensors_of, with_index=False, write=True)
    assert len(alive) == 3


def test_tensors_that_one_process_cannot_read_stop_all(tmp_path):
    """The others wait in ``agree`` for the one that reads."""
    heard = []

    def tensors_of(names: list[str]) -> dict[str, torch.Tensor]:
        raise InputError("the source is gone")

    def agree(error: InputError | None) -> None:
        heard.append(str(error))
        raise_alone(error)

    with pytest.raises(InputError, match="the source is gone"):
        write_tensors(tmp_path, FILES, tensors_of, with_index=True, write=True, agree=agree)
    assert heard == ["the source is gone"]
    assert not list(tmp_path.iterdir())


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


def test_how_tensors_are_divided_into_files():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 0, "f": 7}
    assert split_into_files(sizes, 7) == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d", "e"],
        "model-00004-of-00004.safetensors": ["f"],
    }
    assert split_into_files(sizes, 24) == {SINGLE_NAME: list(sizes)}
    assert split_into_files({}, 1) == {SINGLE_NAME: []}


def names_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_publish_shows_a_folder_only_when_complete(tmp_path):
    out = tmp_path / "new" / "out"
    for content in ("first", "second"):
        with publish(out) as folder:
            assert folder.parent == out.parent  # the same file system: the move is atomic
            assert out.exists() == (content == "second")
            (folder / f"{content}.safetensors").write_text("")
        assert names_in(out) == [f"{content}.safetensors"]
        assert names_in(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_publish_that_fails_leaves_what_was_there(tmp_path, error):
    def fail() -> None:
        with publish(tmp_path / "out") as folder:
            (folder / "half.safetensors").write_text("")
            raise error

    with pytest.raises(error):
        fail()
    assert names_in(tmp_path) == []
    with publish(tmp_path / "out") as folder:
        (folder / "whole.safetensors").write_text("")
    with pytest.raises(error):
        fail()
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["whole.safetensors"]


def test_publish_after_a_kill(tmp_path, monkeypatch):
    """Killed while writing: the half folder is removed. Killed between the moves: old returns."""
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("")
    with publish(tmp_path / "out") as folder:
        (folder / "first.safetensors").write_text("")
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["first.safetensors"]

    moves, replace = [], os.replace

    def killed_at_second(source, target) -> None:
        moves.append(target)
        if len(moves) == 2:
            raise SystemExit
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_second)
        with pytest.raises(SystemExit), publish(tmp_path / "out") as folder:
            (folder / "second.safetensors").write_text("")
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyError), publish(tmp_path / "out"):  # and now the disk is full
        raise KeyError
    assert names_in(tmp_path / "out") == ["first.safetensors"]


def test_publish_where_one_stands_and_through_links(tmp_path, monkeypatch):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with publish(tmp_path / "out") as folder:
        (folder / "a.safetensors").write_text("")
    assert (tmp_path / "out").is_symlink()
    assert names_in(tmp_path / "disk") == ["out"]
    assert names_in(tmp_path / "out") == ["a.safetensors"]
    monkeypatch.chdir(tmp_path / "disk" / "out")
    with publish(".") as folder:
        (folder / "b.safetensors").write_text("")
    assert names_in(tmp_path / "out") == ["b.safetensors"]


def test_publish_without_writing_touches_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()  # the writing process may be at work in it
    with publish(tmp_path / "out", write=False):
        pass
    assert names_in(tmp_path) == [".out.partial", "out"]


def test_publish_replaces_models_only(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    for write in (True, False):
        with (
            pytest.raises(InputError, match="holds other files and no model"),
            publish(tmp_path / "home", write=write),
        ):
            pass
    assert names_in(tmp_path) == ["home"]
    assert names_in(tmp_path / "home") == ["thesis.txt"]


def test_check_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for fine in (tmp_path, tmp_path / "folder", tmp_path / "folder" / "a" / "b", "a/b", "."):
        check_output_folder(fine)
    assert names_in(tmp_path) == ["file", "folder"]
    for path in ("file", "file/a", "file/a/b", tmp_path / "file"):
        with pytest.raises(InputError, match=r"file is a file, .* choose another output path"):
            check_output_folder(path)
        with pytest.raises(InputError, match="is a file"), publish(path):
            pass
