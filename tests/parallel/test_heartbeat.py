"""A process that is gone ends the others soon, and one sentence says which it was."""

import re
import threading
import time

import pytest
import torch.distributed as dist
from helpers_cluster import Fate, Job, meet

from moe_builders.parallel.heartbeat import Heartbeat, LostProcess
from moe_builders.parallel.launch import launch

FATES = {
    "killed": Fate(2, "kill"), "failed": Fate(1, "raise"), "first": Fate(0, "kill"),
    "calm": Fate(0, "nothing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All at once: each takes the seconds of silence that make a process count as gone."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {name: Job(3, "small_run", fate, folder=folder) for name, fate in FATES.items()}
    jobs["stopped"] = Job(2, "small_run", Fate(1, "stop"), 0.2, folder=folder)
    jobs["store"] = Job(3, "small_run", Fate(0, "kill"), folder=folder, own_store=True)
    jobs["timeouts"] = Job(2, "timeouts", 7.0, folder=folder)
    for where in ("mesh", "channel"):
        jobs[where] = Job(4, "killed_at_a_meeting", 1, where, folder=folder)
    jobs["alone"] = Job(2, "alone_of_two", 0.05, folder=folder)
    yield jobs
    for job in jobs.values():
        job.end()


def _sentence(job, rank):
    (line,) = [line for line in job.said(rank).splitlines() if "error: " in line]
    assert "Traceback" not in job.said(rank)
    return line


def test_a_killed_process_ends_the_others_and_is_named_once(jobs):
    job = jobs["killed"]
    assert job.codes() == [129, 129, -9]
    said = re.sub(r"host \S+,|\d\d:\d\d:\d\d|step \d|its start", "…", _sentence(job, 0))
    assert said == (
        f"[rank 0] error: rank 2 (… process {job.by_rank[2].pid}) has stopped answering: its last "
        "sign of life came at … in … (killed, out of memory, or its machine is gone); the others "
        "cannot go on without it: the same command goes on from the last checkpoint"
    )
    assert job.said(1) == "", "one process of a machine says it"


def test_an_error_of_one_process_is_told_by_the_others(jobs):
    job = jobs["failed"]
    assert job.codes() == [129, 1, 129]
    assert "rank 1 (host" in _sentence(job, 0)
    assert "in step 3 with ZeroDivisionError: by hand; the others cannot" in _sentence(job, 0)
    assert "Traceback" in job.said(1), "where it happened it keeps its place in the code"


def test_the_first_process_may_be_the_one(jobs):
    job = jobs["first"]
    assert job.codes() == [-9, 129, 129]
    assert "rank 0 (host" in _sentence(job, 1)
    assert job.said(2) == ""


def test_a_process_that_hangs_is_named_when_the_timeout_is_over(jobs):
    job = jobs["stopped"]
    job.by_rank[0].join(120)
    job.kill(1)
    assert job.codes(5) == [129, -9]
    assert "rank 1 (host" in _sentence(job, 0)


def test_where_the_processes_met_may_be_what_is_gone(jobs):
    job = jobs["store"]
    assert job.codes() == [-9, 129, 129]
    said = job.said(1) + job.said(2)
    assert "the process of rank 0 is gone: where the processes met (127.0.0.1:" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("where", ["mesh", "channel"])
def test_a_process_that_is_killed_as_a_group_is_made(jobs, where):
    assert jobs[where].codes(120) == [129, -9, 129, 129]  # the timeout is ten minutes
    assert "rank 1 (host" in _sentence(jobs[where], 0)


def test_nobody_says_anything_of_a_run_that_ends(jobs):
    assert jobs["calm"].codes() == [0, 0, 0]
    assert [jobs["calm"].said(rank) for rank in range(3)] == ["", "", ""]


def test_every_group_waits_as_long_as_the_config_says(jobs):
    assert jobs["timeouts"].codes() == [0, 0]
    assert jobs["timeouts"].said(0) == "[420.0, 420.0, 420.0, 420.0]\n"


def test_processes_that_do_not_meet(jobs):
    assert jobs["alone"].codes() == [0, 0]
    sentence = jobs["alone"].said(0).splitlines()[-1]
    assert sentence.startswith("the 2 processes did not meet at 127.0.0.1:")
    assert "within timeout_minutes (0.05): " in sentence
    assert sentence.endswith("; look at the output of those that are missing")


@pytest.fixture
def pair():
    """Two processes' signs in one store, given and missed in milliseconds."""
    store = dist.HashStore()
    times = {"size": 2, "beat_seconds": 0.01, "silent_seconds": 0.3}
    beats = [Heartbeat(store, rank=rank, **times) for rank in range(2)]
    yield beats
    for beat in beats:
        beat.leave()
    assert not [t for t in threading.enumerate() if t.name == "heartbeat"]


def test_all_that_live_are_not_lost(pair):
    assert pair[0].lost() is None


def test_who_falls_silent_is_lost(pair):
    pair[1].doing = "step 17"
    pair[1]._ended.wait(0.1)
    pair[1]._ended.set()
    lost = pair[0].lost()
    assert "rank 1 (host" in str(lost)
    assert "in step 17 (killed" in str(lost)
    assert lost.to_say


def test_who_gave_up_because_of_another_is_not_blamed(pair):
    pair[1].leave("gave up")
    assert pair[0].lost() is None


def test_an_error_is_worth_more_than_silence(pair):
    pair[1].leave("error: no such file")
    lost = pair[0].lost()
    assert "with error: no such file; the others" in str(lost)


def test_who_left_early_is_said(pair):
    pair[1].leave()
    assert "left at" in str(pair[0].lost())
    assert "as if the run had ended" in str(pair[0].lost())


def test_a_process_that_never_came(pair):
    pair[0].size = 3
    assert str(pair[0].lost()).startswith("rank 2 never gave a sign of life; the others")


def test_what_is_done_at_a_meeting_comes_back(pair):
    assert pair[0].meet(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError, match="by hand"):
        pair[0].meet(lambda: meet("raise"))


def test_a_meeting_waits_for_who_is_slow_but_not_for_who_is_gone(pair):
    pair[1]._ended.wait(0.1)
    assert pair[0].meet(lambda: time.sleep(1.0) or "came") == "came"
    pair[1]._ended.set()
    for_ever = threading.Event()
    with pytest.raises(LostProcess, match=r"rank 1 .* has stopped answering"):
        pair[0].meet(for_ever.wait)
    for_ever.set()


def test_a_meeting_waits_for_who_was_held_up(pair):
    """Gone for some of the verdicts, and there again."""
    verdicts = ([LostProcess("gone")] * 3 + [None]) * 2
    came = threading.Event()

    def lost():
        if verdicts:
            return verdicts.pop(0)
        return came.set()

    pair[0].lost, pair[0].silent_seconds = lost, 0.01
    assert pair[0].meet(lambda: came.wait(10)) is True


@pytest.mark.parametrize(("to_say", "wanted"), [(True, "[rank 0] error: gone\n"), (False, "")])
def test_exit_code_and_sentence(capsys, monkeypatch, to_say, wanted):
    monkeypatch.delenv("RANK", raising=False)

    def main(_):
        raise LostProcess("gone", to_say=to_say)

    assert launch(main, lambda: None) == 129
    assert capsys.readouterr() == ("", wanted)
