"""Each start of one torchrun meets at a place of its own; several must be told to make one."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from moe_builders.errors import InputError
from moe_builders.parallel.meeting import launched_as, meeting_place

SECOND = timedelta(seconds=1)


@pytest.fixture
def launched(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                 "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    del store


def test_a_start_does_not_see_what_an_earlier_one_wrote(launched):
    first = meeting_place(1, 2, SECOND)
    assert (first["rank"], first["world_size"]) == (1, 2)
    first["store"].set("address", "gone")
    assert meeting_place(0, 2, SECOND)["store"].get("address") == b"gone", "one start, one place"
    launched.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not meeting_place(1, 2, SECOND)["store"].check(["address"])


def test_several_torchruns_that_would_meet_in_the_old_place_are_refused(launched):
    launched.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"max_restarts is 3.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        meeting_place(0, 2, SECOND)
    launched.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert meeting_place(0, 2, SECOND) == {}, "torch's own"


def test_where_torchrun_makes_a_new_store_each_time_torch_finds_it(launched):
    launched.setenv("GROUP_WORLD_SIZE", "2")
    launched.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert meeting_place(0, 2, SECOND) == {}


@pytest.mark.parametrize(
    ("rank", "size"), [("0", None), ("abc", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("", "1")]
)
def test_variables_that_are_no_rank_of_a_launch(monkeypatch, rank, size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=f"RANK='{rank}' and WORLD_SIZE='{size or ''}'.*unset"):
        launched_as()


def test_ranks_of_a_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("RANK", raising=False)
    assert launched_as() is None, "WORLD_SIZE alone is left over from something else"
    monkeypatch.setenv("RANK", "7")
    assert launched_as() == (7, 8)


@pytest.mark.parametrize(("host", "port"), [("", "29500"), ("node1", "abc"), ("node1", "65536")])
def test_nobody_said_where_to_meet(monkeypatch, host, port):
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(
        InputError, match=f"MASTER_ADDR='{host}' and MASTER_PORT='{port}'.*torchrun"
    ):
        meeting_place(1, 2, SECOND)
