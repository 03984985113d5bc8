"""Model folders: written file by file by one process or many, shown whole or not at all."""

import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_threads import together
from safetensors.torch import load_file

from moe_builders.checkpoint.folder import INDEX_NAME, SINGLE_NAME, TensorFolder
from moe_builders.checkpoint.writing import (
    publish,
    raise_alone,
    split_into_files,
    write_tensors,
)
from moe_builders.errors import InputError


def names_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


FILES = {"m-1.safetensors": ["b", "a"], "m-2.safetensors": ["c"]}


@pytest.mark.parametrize("with_index", [True, False])
def test_write_tensors(tmp_path, with_index):
    calls = []

    def tensors_of(wanted: Sequence[list[str]]) -> dict[str, torch.Tensor]:
        (names,) = wanted
        calls.append((names, sorted(p.name for p in tmp_path.iterdir())))
        return {name: torch.full((3,), ord(name), dtype=torch.float16) for name in names}

    write_tensors(tmp_path, FILES, tensors_of, with_index=with_index)
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


def as_in(world: Any) -> dict[str, Any]:
    return {"rank": world.rank, "size": world.size, "agree": world.agree}


FIVE = {f"m-{n}.safetensors": [f"t{n}"] for n in range(5)}


def test_files_are_dealt_out_in_rounds(tmp_path):
    """Five files over three processes: three at a time, then two, and the third has none."""
    asked = {rank: [] for rank in range(3)}

    def write(world: Any) -> None:
        def tensors_of(wanted: Sequence[list[str]]) -> dict[str, torch.Tensor]:
            asked[world.rank].append((wanted, len(list(tmp_path.iterdir()))))
            return {name: torch.tensor([world.rank]) for name in wanted[world.rank]}

        write_tensors(tmp_path, FIVE, tensors_of, with_index=True, **as_in(world))

    assert together(3, write) == [None] * 3
    first, second = [["t0"], ["t1"], ["t2"]], [["t3"], ["t4"], []]
    for calls in asked.values():
        assert [wanted for wanted, _ in calls] == [first, second]
        assert calls[1][1] >= 3  # the first round is written before the second is asked for
    folder = TensorFolder(tmp_path)
    writers = [int(folder.read(f"t{n}", (slice(None),))) for n in range(5)]
    assert writers == [0, 1, 2, 0, 1]
    assert json.loads((tmp_path / INDEX_NAME).read_text())["metadata"] == {"total_size": 40}


def test_what_one_process_cannot_do_stops_all(tmp_path):
    """A file in the second round that its process cannot read; a folder that only one sees."""

    def unreadable(world: Any) -> None:
        def tensors_of(wanted: Sequence[list[str]]) -> dict[str, torch.Tensor]:
            if wanted[world.rank] == ["t4"]:
                raise InputError("t4 is damaged")
            return {name: torch.zeros(1) for name in wanted[world.rank]}

        with publish(tmp_path / "out", rank=world.rank, agree=world.agree) as out:
            write_tensors(out, FIVE, tensors_of, with_index=True, **as_in(world))

    assert together(3, unreadable) == ["t4 is damaged"] * 3
    assert names_in(tmp_path) == []

    def not_shared(world: Any) -> None:
        def tensors_of(wanted: Sequence[list[str]]) -> dict[str, torch.Tensor]:
            return {name: torch.zeros(1) for name in wanted[world.rank]}

        (tmp_path / f"disk{world.rank}").mkdir()
        out = tmp_path / f"disk{world.rank}"
        write_tensors(out, FIVE, tensors_of, with_index=True, **as_in(world))

    sentences = together(3, not_shared)
    assert len(set(sentences)) == 1
    assert (
        "m-1.safetensors was written by process 1, but is not there for process 0" in sentences[0]
    )
    assert not list(tmp_path.glob("disk*/*.index.json"))


def test_a_file_that_cannot_be_written_by_the_second_process(tmp_path):
    (tmp_path / "m-1.safetensors").mkdir()

    def write(world: Any) -> None:
        write_tensors(tmp_path, FIVE, lambda names: {n: torch.zeros(1) for n in names[world.rank]},
                      with_index=False, **as_in(world))  # fmt: skip

    sentences = together(2, write)
    assert len(set(sentences)) == 1
    assert "m-1.safetensors cannot be written" in sentences[0]
    assert names_in(tmp_path) == ["m-0.safetensors", "m-1.safetensors"]


def test_one_files_tensors_are_gone_before_the_next(tmp_path):
    alive = []

    def tensors_of(wanted: Sequence[list[str]]) -> dict[str, torch.Tensor]:
        assert not any(tensor() is not None for tensor in alive)
        tensors = {name: torch.zeros(3) for name in wanted[0]}
        alive.extend(map(weakref.ref, tensors.values()))
        return tensors

    write_tensors(tmp_path, FILES, tensors_of, with_index=False)
    assert len(alive) == 3


def test_tensors_that_one_process_cannot_read_stop_all(tmp_path):
    """The others wait in ``agree`` for the one that reads."""
    heard = []

    def tensors_of(wanted: Sequence[list[str]]) -> dict[str, torch.Tensor]:
        raise InputError("the source is gone")

    def agree(error: InputError | None) -> None:
        heard.append(str(error))
        raise_alone(error)

    with pytest.raises(InputError, match="the source is gone"):
        write_tensors(tmp_path, FILES, tensors_of, with_index=True, agree=agree)
    assert heard == ["the source is gone"]
    assert not list(tmp_path.iterdir())


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


def test_only_the_first_process_makes_and_moves_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()  # the first process may be at work in it
    with publish(tmp_path / "out", rank=1) as folder:
        assert folder == tmp_path / ".out.partial"
    assert names_in(tmp_path) == [".out.partial", "out"]
    with pytest.raises(KeyError), publish(tmp_path / "out", rank=1):
        raise KeyError
    assert names_in(tmp_path) == [".out.partial", "out"]


@pytest.mark.parametrize("broken", [0, 1])
def test_publish_shows_nothing_if_any_process_fails(tmp_path, broken):
    def write(world: Any) -> None:
        with publish(tmp_path / "out", rank=world.rank, agree=world.agree) as folder:
            (folder / f"{world.rank}.safetensors").write_text("")
            if world.rank == broken:
                raise OSError(28, "No space left on device")

    sentence = f"{tmp_path / 'out'} cannot be written: [Errno 28] No space left on device"
    assert together(2, write) == [sentence] * 2
    assert names_in(tmp_path) == []


def test_publish_replaces_models_only(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")

    def write(world: Any) -> None:
        with publish(tmp_path / "home", rank=world.rank, agree=world.agree):
            pass

    for size in (1, 2):
        sentences = together(size, write)
        assert all("holds other files and no model" in sentence for sentence in sentences)
    assert names_in(tmp_path) == ["home"]
    assert names_in(tmp_path / "home") == ["thesis.txt"]


def test_publish_refuses_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/a/b"):
        with pytest.raises(InputError, match="is a file"), publish(path):
            pass


def test_who_may_read_the_folder_may_read_its_files(tmp_path):
    for mode in (0o755, 0o700, 0o775):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        write_tensors(folder, {SINGLE_NAME: ["a"]}, lambda names: {"a": torch.ones(1)},
                      with_index=False)  # fmt: skip
        assert (folder / SINGLE_NAME).stat().st_mode & 0o777 == mode & 0o666
