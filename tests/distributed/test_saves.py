"""Saves by two processes: in the background, on full disks, with damage, one of them killed."""

import json
import multiprocessing
import uuid

import pytest
from helpers_saves import die_while_writing
from helpers_train import on_ranks

from moe_builders.checkpoint.run_checkpoints import RunCheckpoints


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    names = ("full_disk_on_one", "bytes_both_ways", "damage_on_each")
    cases = {name: (f"helpers_saves.{name}", str(folder / name)) for name in names}
    return on_ranks(2, cases, folder)


def test_a_full_disk_of_one_process_is_told_by_both_in_the_same_words(answers):
    first, second = answers["full_disk_on_one"]
    assert first == second
    foreground, there, *others = first
    assert "step_00000002 cannot be written: process 1: " in foreground
    assert "File too large" in foreground
    assert "step_00000001 is the last: make room" in foreground
    assert others == [foreground, there] * 2, "at the next save, and at the end"
    assert there == ["step_00000001"], "nothing half written is left"


def test_the_bytes_do_not_depend_on_how_it_was_saved(answers):
    foreground, background = answers["bytes_both_ways"]
    assert len(foreground) == 7  # two parts, table, record, facts, one of each process
    assert foreground == background


def test_damage_that_one_process_finds_is_known_to_both(answers):
    first, second = answers["damage_on_each"]
    assert first == second
    assert first == (1, [("step_00000003", "__1_0.distcp does not fit its checksum"),
                         ("step_00000002", "__0_0.distcp does not fit its checksum")])  # fmt: skip


def test_a_process_killed_inside_a_save_ends_the_other_and_spoils_nothing(tmp_path):
    forks = multiprocessing.get_context("forkserver")
    answer = tmp_path / "answer"
    meeting = f"file://{tmp_path}/{uuid.uuid4().hex}"
    folder = tmp_path / "checkpoints"
    processes = [
        forks.Process(target=die_while_writing, args=(rank, meeting, str(folder), str(answer)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, -9]
    name, seconds = json.loads(answer.read_text())
    assert name not in ("InputError", "AssertionError"), "it is not a full disk"
    assert seconds < 60, "no waiting for one that is gone"
    checkpoints = RunCheckpoints(folder, world=None, keep_last=None)
    assert checkpoints.survey() == [(folder / "step_00000001", None)]
