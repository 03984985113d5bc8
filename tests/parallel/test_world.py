"""Who takes part, without spawning anybody; and how a mistake leaves the program."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_builders.errors import InputError
from moe_builders.parallel.launch import launch
from moe_builders.parallel.plan import MeshShape
from moe_builders.parallel.world import open_world


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not dist.is_initialized(), "each test leaves as it came"


@pytest.fixture
def fake_group():
    """Processes that only look like it: collectives do nothing."""

    def join(rank, size):
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    yield join
    dist.destroy_process_group()


def test_one_process_without_a_launcher():
    with open_world(device="cpu") as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert world.device == torch.device("cpu")
        assert (world.mesh.mesh_dim_names, tuple(world.mesh.shape)) == (("dp_shard",), (1,))
        value = torch.tensor([1.0, 2.0])
        assert world.sum(value) is value
        world.barrier()
        assert world.send(value).tolist() == [1.0, 2.0]
        assert value.tolist() == [1.0, 2.0]
    with open_world(device="cpu") as again:
        assert again.size == 1


def test_a_world_size_left_over_from_something_else(monkeypatch):
    """Schedulers export WORLD_SIZE also to programs that nobody launched as ranks."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    with open_world(device="cpu") as world:
        assert world.size == 1


def test_an_error_inside_leaves_the_group():
    with pytest.raises(RuntimeError, match="inside"), open_world(device="cpu"):
        raise RuntimeError("inside")


@pytest.mark.parametrize(
    ("rank", "axes", "names", "shape"),
    [
        (0, {}, ("dp_shard",), (4,)),
        (3, {"dp_shard": 4}, ("dp_shard",), (4,)),
        (1, {"dp_replicate": 2}, ("dp_replicate", "dp_shard"), (2, 2)),
        (2, {"dp_replicate": 4, "dp_shard": 1}, ("dp_replicate", "dp_shard"), (4, 1)),
    ],
)
def test_meshes_of_a_group_that_is_there_already(fake_group, rank, axes, names, shape):
    fake_group(rank, 4)
    with open_world(device="cpu", **axes) as world:
        assert (world.rank, world.size, world.is_first) == (rank, 4, rank == 0)
        assert (world.mesh.mesh_dim_names, tuple(world.mesh.shape)) == (names, shape)
        assert tuple(world.mesh.get_coordinate()) == divmod(rank, shape[-1])[2 - len(shape) :]
        replicas, shards = (1, *shape)[-2:]
        assert world.shape == MeshShape(replicas, shards, 1)
    assert dist.is_initialized(), "who joined it leaves it"


def test_a_mesh_of_its_own_for_experts(fake_group):
    fake_group(5, 8)
    with open_world(device="cpu", dp_replicate=2, ep=2) as world:
        assert world.shape == MeshShape(dp_replicate=2, dp_shard=2, ep=2)
        assert tuple(world.mesh.shape) == (2, 4)
        assert world.expert_mesh is not None
        assert world.expert_mesh.mesh_dim_names == ("dp_replicate", "dp_shard", "ep")
        assert tuple(world.expert_mesh.get_coordinate()) == (1, 0, 1), "ep is innermost"
        assert world.expert_mesh["ep"].mesh.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("size", "axes", "message"),
    [
        (3, {"dp_replicate": 2},
         r"dp_replicate is 2, but must divide the number of processes \(3\)"),
        (4, {"dp_replicate": 0}, "dp_replicate is 0, but must divide"),
        (4, {"dp_replicate": -2}, "dp_replicate is -2, but must divide"),
        (4, {"dp_shard": 2}, r"dp_replicate \(1\) × dp_shard \(2\) is not the number of processes "
                             r"\(4\): set dp_shard to 4 or -1, or launch 2"),
        (4, {"dp_replicate": 2, "dp_shard": 4}, "set dp_shard to 2 or -1, or launch 8"),
        (4, {"dp_shard": 0}, r"dp_shard is 0, but must be -1 \(all processes that remain\) or 4"),
        (4, {"dp_replicate": 2, "dp_shard": -2}, r"dp_shard is -2, but must be -1 .* or 2$"),
        (1, {"dp_replicate": 2}, r"must divide the number of processes \(1\)"),
        (4, {"ep": 3},
         r"^ep is 3, but must divide the number of processes \(4\): choose 1, 2 or 4$"),
        (4, {"ep": 0}, "^ep is 0, but must divide the number of processes"),
        (8, {"ep": 2, "dp_replicate": 3},
         r"^dp_replicate is 3, but must divide the 4 that ep \(2\) leaves of 8 processes: choose "
         "1, 2 or 4$"),
        (8, {"ep": 2, "dp_shard": 3},
         r"dp_replicate \(1\) × dp_shard \(3\) × ep \(2\) is not the number of processes \(8\): "
         "set dp_shard to 4 or -1, or launch 6"),
    ],
)  # fmt: skip
def test_axes_that_do_not_fit_are_refused_before_anybody_waits(monkeypatch, size, axes, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(InputError, match=message) as caught, open_world(device="cpu", **axes):
        pass
    assert "\n" not in str(caught.value)


def test_devices(monkeypatch):
    with (
        pytest.raises(InputError, match="'tpu' is not one of auto, cpu, cuda"),
        open_world(device="tpu"),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(InputError, match="torch finds none here: set device=cpu"),
        open_world(device="cuda"),
    ):
        pass
    with open_world(device="auto") as world:
        assert world.device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(InputError, match=r"process 2 .* only 2: launch --nproc_per_node 2"),
        open_world(device="cuda"),
    ):
        pass


def refuse(message):
    def main(_):
        raise InputError(message)

    return main


@pytest.mark.parametrize(
    ("rank", "wanted"), [(None, "error: wrong\n"), ("0", "error: wrong\n"),
                         ("3", "[rank 3] error: wrong\n")]
)  # fmt: skip
def test_a_mistake_is_a_sentence_and_exit_code_2(capsys, monkeypatch, rank, wanted):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert launch(refuse("wrong"), lambda: None) == 2
    assert capsys.readouterr() == ("", wanted)


def test_a_sentence_stays_in_one_line(capsys):
    launch(refuse("wrong,\n  and what to do\n"), lambda: None)
    assert capsys.readouterr().err == "error: wrong, and what to do\n"


def test_mistakes_in_the_command_line_and_success(capsys, monkeypatch):
    def parse():
        raise InputError("no such key")

    assert launch(refuse("not reached"), parse) == 2
    seen = []
    assert launch(seen.append, lambda: 3) == 0
    assert seen == [3]
    assert capsys.readouterr() == ("", "error: no such key\n")
    monkeypatch.setenv("RANK", "1")
    assert launch(refuse("not reached"), parse) == 2
    assert capsys.readouterr() == ("", ""), "the same on all processes: one says it"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        launch(lambda _: 1 / 0, lambda: None)


def test_a_warning_of_the_configuration_is_one_line():
    def parse():  # what Python prints of a warning; pytest takes the warnings themselves away
        shown.append(warnings.formatwarning("an old name", FutureWarning, "code.py", 3, "line"))

    shown, before = [], warnings.formatwarning
    assert launch(lambda config: parse(), parse) == 0
    assert shown[0] == "warning: an old name\n"
    assert shown[0] != shown[1] == before("an old name", FutureWarning, "code.py", 3, "line")


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("3", 0)])
def test_only_the_first_process_warns_of_the_configuration(monkeypatch, recwarn, rank, times):
    def parse():
        warnings.warn("an old name", FutureWarning, stacklevel=1)

    monkeypatch.setenv("RANK", rank)
    warnings.simplefilter("always")
    assert launch(lambda config: None, parse) == 0
    assert len(recwarn) == times
