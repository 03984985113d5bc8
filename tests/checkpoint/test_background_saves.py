"""A save in the background: the values of the moment, the bytes and sentences of any other save."""

import errno
import os
import threading

import pytest
import torch

from moe_builders.checkpoint import saving
from moe_builders.checkpoint.run_checkpoints import RunCheckpoints
from moe_builders.checkpoint.saving import Saver
from moe_builders.errors import InputError


@pytest.fixture
def make(tmp_path, world):
    made = []

    def one(name="checkpoints", *, background=True, keep_last=2):
        made.append(RunCheckpoints(tmp_path / name, world=world, keep_last=keep_last,
                                   background=background))  # fmt: skip
        return made[-1].__enter__()

    yield one
    for each in made:
        each.__exit__(RuntimeError, None, None)  # waits, whatever happened


@pytest.fixture
def gate(monkeypatch):
    """Holds every writing thread until it is opened."""
    opened, real = threading.Event(), Saver.write

    def write(self, contents, channel):
        assert opened.wait(20)
        real(self, contents, channel)

    monkeypatch.setattr(Saver, "write", write)
    yield opened
    opened.set()


def _tensors(value):
    sharded = torch.full((6, 2), float(value))[:3]  # a view: more is stored than is seen
    return {"a.b": sharded, "half": torch.full((4,), value, dtype=torch.bfloat16)}


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_are_those_of_a_save_in_the_foreground(make):
    arguments = (5, _tensors(5), {"note": 1}, {"mine": 2}, {"shown": [3]})
    foreground = make("a", background=False).save(*arguments)
    checkpoints = make("b")
    background = checkpoints.save(*arguments)
    assert checkpoints.in_flight == background
    assert checkpoints.wait() == background
    assert checkpoints.in_flight is None
    assert checkpoints.wait() is None
    assert _bytes(foreground) == _bytes(background)
    assert len(_bytes(background)) == 5


def test_what_changes_afterwards_is_not_saved(make, gate):
    checkpoints = make()
    tensors, facts, own, record = _tensors(1), {"at": [1]}, {"mine": [1]}, {"shown": [1]}
    folder = checkpoints.save(1, tensors, facts, own, record)
    assert not folder.exists()
    for tensor in tensors.values():
        tensor.fill_(7)
    for each in (*facts.values(), *own.values(), *record.values()):
        each.append(7)
    gate.set()
    checkpoints.wait()
    found = checkpoints.newest()
    back = _tensors(0)
    found.read(back)
    assert all(torch.equal(back[name], value) for name, value in _tensors(1).items())
    assert (found.facts["at"], found.rank_facts(0)) == ([1], {"mine": [1]})
    assert found.record() == {"shown": [1]}


def test_a_name_comes_without_anybody_waiting_for_it_and_old_ones_go(make):
    checkpoints = make(keep_last=1)
    for step in (1, 2):
        checkpoints.save(step, _tensors(step), {}, {})
        checkpoints._in_flight[1]._thread.join(20)
        assert [path.name for path, _ in checkpoints.survey()] == [f"step_0000000{step}"]


def test_a_save_waits_for_the_one_before(make, gate):
    checkpoints = make()
    first = checkpoints.save(1, _tensors(1), {}, {})
    threading.Timer(0.2, gate.set).start()
    second = checkpoints.save(2, _tensors(2), {}, {})
    assert first.is_dir(), "complete before the second was begun"
    checkpoints.wait()
    assert second.is_dir()
    assert checkpoints.save(2, _tensors(3), {}, {}) == second
    assert checkpoints.in_flight is None, "one that this run has saved is left alone"


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["save", "wait", "end"])
def test_a_failure_is_told_in_the_same_words_at_the_next_call(make, monkeypatch, at):
    sentences = []
    for background in (False, True):
        checkpoints = make(f"{background}/checkpoints", background=background)
        checkpoints.save(1, _tensors(1), {}, {})
        checkpoints.wait()
        with monkeypatch.context() as broken:
            broken.setattr(saving, "_write_text", _full)
            with pytest.raises(InputError) as caught:  # noqa: PT012 what raises differs
                checkpoints.save(2, _tensors(2), {}, {})
                assert background
                if at == "save":
                    checkpoints.save(3, _tensors(3), {}, {})
                elif at == "wait":
                    checkpoints.wait()
                else:
                    checkpoints.__exit__(None, None, None)
        sentences.append(str(caught.value).replace(f"{background}/", ""))
        assert checkpoints.in_flight is None
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]
        checkpoints.save(2, _tensors(2), {}, {})
        checkpoints.wait()
        assert checkpoints.newest().step == 2
    assert "step_00000002 cannot be written: [Errno 28] No space left on device" in sentences[0]
    assert "step_00000001 is the last" in sentences[0]
    assert sentences[0] == sentences[1]


def test_an_error_of_the_run_lets_the_save_in_flight_be_completed(make, gate):
    checkpoints = make()
    folder = checkpoints.save(1, _tensors(1), {}, {})
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(ZeroDivisionError), checkpoints:
        raise ZeroDivisionError
    assert folder.is_dir()


def test_an_error_of_the_run_is_told_before_that_of_the_save(make, monkeypatch):
    checkpoints = make()
    monkeypatch.setattr(saving, "_write_text", _full)
    with pytest.raises(ZeroDivisionError), checkpoints:  # noqa: PT012
        checkpoints.save(1, _tensors(1), {}, {})
        raise ZeroDivisionError


def test_ctrl_c_at_once_does_not_wait(make, gate):
    checkpoints = make()
    checkpoints.save(1, _tensors(1), {}, {})
    with pytest.raises(KeyboardInterrupt), checkpoints:
        raise KeyboardInterrupt
    assert checkpoints.in_flight is not None
    gate.set()
    checkpoints.wait()


def test_ctrl_c_while_the_end_waits_leaves_the_thread_its_group(make, gate, monkeypatch):
    checkpoints = make()
    folder = checkpoints.save(1, _tensors(1), {}, {})

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as pressed:
        pressed.setattr(saving.Background, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.__exit__(None, None, None)
    assert checkpoints._channel.group is not None
    gate.set()
    assert checkpoints.wait() == folder
