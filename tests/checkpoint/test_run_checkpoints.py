"""A checkpoint with its name is whole; whatever fails never touches the last good one."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from moe_builders.checkpoint import saving
from moe_builders.checkpoint.manifest import sealed
from moe_builders.checkpoint.run_checkpoints import RunCheckpoints, read_checkpoint
from moe_builders.errors import InputError
from moe_builders.parallel import dcp
from moe_builders.parallel.dcp import stored_tensors


@pytest.fixture
def checkpoints(tmp_path, world):
    return RunCheckpoints(tmp_path / "run" / "checkpoints", world=world, keep_last=2)


def _tensors(value):
    return {"a.b": torch.full((3, 2), float(value)), "step": torch.tensor(7.0 + value),
            "half": torch.full((4,), value, dtype=torch.bfloat16)}  # fmt: skip


def _save(checkpoints, step):
    return checkpoints.save(step, _tensors(step), {"note": f"at {step}"}, {"mine": step})


def test_what_is_saved_comes_back(checkpoints):
    folder = _save(checkpoints, 20)
    assert folder.name == "step_00000020"
    found = checkpoints.newest()
    assert (found.step, found.facts["note"], found.rank_facts(0)) == (20, "at 20", {"mine": 20})
    assert found.rank_facts(1) == {}
    assert stored_tensors(folder) == {
        "a.b": ((3, 2), torch.float32), "step": ((), torch.float32), "half": ((4,), torch.bfloat16)
    }  # fmt: skip
    back = _tensors(0)
    found.read(back)
    assert all(torch.equal(back[n], t) for n, t in _tensors(20).items())


def test_the_newest_counts_by_number_and_old_ones_go(checkpoints):
    assert checkpoints.newest() is None
    for step in (9, 10, 100):
        _save(checkpoints, step)
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step_00000010", "step_00000100"]
    assert checkpoints.newest().step == 100
    checkpoints.saver.keep_last = None
    _save(checkpoints, 101)
    assert len(checkpoints.survey()) == 3


def test_a_step_that_this_run_has_saved_is_left_alone_and_any_other_is_replaced(checkpoints, world):
    folder = _save(checkpoints, 5)
    before = (folder / "run.json").stat().st_mtime_ns
    assert checkpoints.save(5, _tensors(1), {}, {}) == folder
    assert (folder / "run.json").stat().st_mtime_ns == before
    other = RunCheckpoints(checkpoints.folder, world=world, keep_last=None)
    other.save(5, _tensors(1), {"note": "another way"}, {})
    assert other.newest().facts["note"] == "another way"
    assert not list(checkpoints.folder.glob(".*"))
    again = RunCheckpoints(checkpoints.folder, world=world, keep_last=None)
    again.start_from(5, own=True)
    again.save(5, _tensors(2), {"note": "gone on from"}, {})
    assert again.newest().facts["note"] == "another way"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "run.json").unlink(), "run.json is missing"),
        (lambda f: (f / "run.json").write_text("{"), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_text("[]"), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_text('{"format": 99}'), "its format is 99"),
        (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda f: (f / "rank_0.json").unlink(), "rank_0.json is missing"),
        (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
        (lambda f: os.truncate(f / "__0_0.distcp", 100), "__0_0.distcp has 100 bytes instead of"),
    ],
)
def test_a_damaged_one_is_passed_over_and_named(checkpoints, damage, words):
    _save(checkpoints, 1)
    folder = _save(checkpoints, 2)
    damage(folder)
    assert checkpoints.newest().step == 1
    assert words in dict(checkpoints.survey())[folder]
    with pytest.raises(InputError, match="is not a complete checkpoint") as caught:
        read_checkpoint(folder)
    assert words in str(caught.value)


def test_half_written_ones_are_never_picked_and_are_swept_up(checkpoints):
    folder = _save(checkpoints, 1)
    half = checkpoints.folder / ".step_00000002.partial"
    shutil.copytree(folder, half)
    half_gone = checkpoints.folder / ".step_00000000.removed"
    half_gone.mkdir()
    (checkpoints.folder / "notes").mkdir()
    assert checkpoints.newest().step == 1
    _save(checkpoints, 3)
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["notes", "step_00000001", "step_00000003"]


def test_starting_over_loses_nothing(checkpoints):
    assert checkpoints.start_from(0, own=False) == []
    _save(checkpoints, 4)
    (moved,) = checkpoints.start_from(0, own=False)
    assert "checkpoints.1, since this run goes another way: step_00000004" in moved
    _save(checkpoints, 5)
    checkpoints.start_from(0, own=False)
    assert checkpoints.newest() is None
    assert (
        read_checkpoint(checkpoints.folder.with_name("checkpoints.1") / "step_00000004").step == 4
    )


def test_going_back_moves_what_came_after(checkpoints):
    checkpoints.saver.keep_last = None
    for step in (2, 4, 6):
        _save(checkpoints, step)
    (moved,) = checkpoints.start_from(2, own=True)
    assert "step_00000004, step_00000006" in moved
    assert [path.name for path, _ in checkpoints.survey()] == ["step_00000002"]


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _denied(*args, **kwargs):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "some/file")


@pytest.mark.parametrize(
    ("place", "fault", "words"),
    [
        ((Path, "mkdir"), _denied, "Permission denied: 'some/file'"),
        ((Path, "mkdir"), _full, "No space left on device"),
        ((dcp.dcp.FileSystemWriter, "write_data"), _full, "No space left on device"),
        ((dcp.dcp.FileSystemWriter, "finish"), _denied, "Permission denied"),
        ((saving, "_write_text"), _full, "No space left on device"),
        ((saving, "_flush_folder"), _full, "No space left on device"),
        ((saving.os, "replace"), _denied, "Permission denied"),
        ((saving.os, "fsync"), _full, "No space left on device"),
    ],
)
def test_a_failing_save_says_so_and_keeps_the_last_good_one(
    checkpoints, monkeypatch, place, fault, words
):
    _save(checkpoints, 1)
    with monkeypatch.context() as broken:
        broken.setattr(*place, fault)
        with pytest.raises(InputError) as caught:
            _save(checkpoints, 2)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "step_00000002 cannot be written" in sentence
    assert words in sentence
    assert "step_00000001 is the last" in sentence
    found = checkpoints.newest()
    back = _tensors(0)
    found.read(back)
    assert found.step == 1
    assert torch.equal(back["a.b"], torch.full((3, 2), 1.0))
    assert _save(checkpoints, 2).name == "step_00000002"
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]


def test_a_disk_that_fills_up_while_tensors_are_written(checkpoints):
    """A real failing write, by a limit on the size of files, not a function that is replaced."""
    import resource

    _save(checkpoints, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"step_00000002 cannot be written.*File too large"):
            checkpoints.save(2, {"big": torch.zeros(100_000)}, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest().step == 1
    assert not list(checkpoints.folder.glob(".step_*"))


def test_a_file_in_the_place_of_the_folder(checkpoints):
    _save(checkpoints, 1)
    shutil.rmtree(checkpoints.folder)
    checkpoints.folder.write_text("not a folder")
    with pytest.raises(InputError, match="is a file, but a folder is to be written"):
        _save(checkpoints, 2)
    assert checkpoints.folder.read_text() == "not a folder"


def test_an_old_one_that_cannot_be_removed_is_told_and_ends_nothing(checkpoints, monkeypatch):
    for step in (1, 2):
        _save(checkpoints, step)
    with monkeypatch.context() as broken:
        broken.setattr(saving.shutil, "rmtree", _denied)
        _save(checkpoints, 3)
        _save(checkpoints, 4)
    assert checkpoints.newest().step == 4
    assert any("cannot be removed: [Errno 13] Permission denied" in n for n in checkpoints.notes)
    assert [path.name for path, _ in checkpoints.survey()] == ["step_00000004", "step_00000003"]


def test_a_file_system_that_cannot_flush_a_folder(checkpoints, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(saving.os, "fsync", fsync)
    _save(checkpoints, 1)
    assert checkpoints.newest().step == 1


def test_every_dtype_comes_back(checkpoints):
    dtypes = (torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.bool, torch.float64)
    tensors = {str(d): torch.ones(3).to(d) for d in dtypes}
    checkpoints.save(1, tensors, {}, {})
    back = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoints.newest().read(back)
    for name, tensor in tensors.items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch evil_was_here",))


def test_nothing_is_unpickled_freely(checkpoints, monkeypatch, tmp_path):
    folder = _save(checkpoints, 1)
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(InputError, match="not a checkpoint's table of contents: it names posix"):
        stored_tensors(folder)
    facts = json.loads((folder / "run.json").read_text())
    own = {key: facts.pop(key) for key in ("format", "checksum", "step", "files")}
    own["files"].pop(".metadata")
    (folder / "run.json").write_text(sealed(own["step"], own["files"], facts))
    with pytest.raises(InputError, match=r"cannot be read.*it names posix"):
        read_checkpoint(folder).read(_tensors(0))
    assert not (tmp_path / "evil_was_here").exists()
