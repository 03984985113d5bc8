"""One output folder for all processes, or a sentence on each; processes are played by threads."""

import uuid
from types import SimpleNamespace

import pytest
from helpers_threads import together

from moe_builders.parallel import shared_folder
from moe_builders.parallel.shared_folder import check_shared_folder


def names_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("there", [True, False])
def test_the_same_folder_passes_and_is_left_as_it_was(tmp_path, there):
    if there:
        (tmp_path / "runs/out").mkdir(parents=True)
    before = names_in(tmp_path)

    def check(world):
        check_shared_folder(tmp_path / "runs/out", world, patience=5)

    assert together(3, check) == [None] * 3
    assert names_in(tmp_path) == before


def test_disks_of_their_own_are_refused_on_all(tmp_path):
    for rank in range(3):
        (tmp_path / f"disk{rank}").mkdir()

    def check(world):  # under what would be the same name, the third has another disk
        disk = tmp_path / ("disk1" if world.rank == 2 else "disk0")
        check_shared_folder(disk / "out", world, patience=0)

    sentences = together(3, check)
    assert all("is another folder for process 2 (on " in sentence for sentence in sentences)
    assert all(s.endswith("choose one on a file system that all machines share") for s in sentences)
    assert names_in(tmp_path) == ["disk0", "disk1", "disk2"]


def test_what_an_earlier_run_left_fools_nobody(tmp_path, monkeypatch):
    """Even under the very name: its content would have to be the same as well."""
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex="now"))
    for rank, content in enumerate(["", "before"]):
        (tmp_path / f"disk{rank}").mkdir()
        (tmp_path / f"disk{rank}/.moe_builders_then").write_text("then")
        if content:
            (tmp_path / f"disk{rank}/.moe_builders_now").write_text(content)

    def check(world):
        check_shared_folder(tmp_path / f"disk{world.rank}", world, patience=0)

    assert all("is another folder for process 1" in sentence for sentence in together(2, check))


def test_every_run_has_a_name_of_its_own(tmp_path, monkeypatch):
    seen = []
    look = shared_folder._appears

    def noted(path, name, token, patience):
        seen.append(name)
        return look(path, name, token, patience)

    monkeypatch.setattr(shared_folder, "_appears", noted)
    for _ in range(2):
        together(2, lambda world: check_shared_folder(tmp_path, world, patience=5))
    assert len(seen) == 4
    assert len(set(seen)) == 2


def test_a_file_that_shows_late_is_waited_for(tmp_path, monkeypatch):
    """And the folder may show late, too, as caches of network file systems have it."""
    monkeypatch.setattr(shared_folder, "_PAUSE", 0.01)
    nearest, looks = shared_folder._nearest, []
    (tmp_path / "out").mkdir()
    (tmp_path / "late").symlink_to(tmp_path / "out")

    def late(path):
        if path.name == "late":
            looks.append(path)
            return nearest(path if len(looks) > 6 else tmp_path)
        return nearest(path)

    monkeypatch.setattr(shared_folder, "_nearest", late)

    def check(world):
        path = tmp_path / ("out" if world.is_first else "late")
        check_shared_folder(path, world, patience=5)

    assert together(2, check) == [None] * 2
    assert len(looks) > 6


def test_a_folder_that_the_first_process_cannot_write(tmp_path):
    def check(world):
        path = "/proc/run" if world.is_first else tmp_path
        check_shared_folder(path, world, patience=0)

    sentences = together(2, check)
    assert all("cannot be written (" in sentence for sentence in sentences)


def test_one_process_need_not_look(tmp_path):
    check_shared_folder(tmp_path, SimpleNamespace(size=1))
