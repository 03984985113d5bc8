"""run.json: one wrong byte anywhere is noticed; checkpoints without checksums are still read."""

import json

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.checkpoint import manifest
from moe_builders.checkpoint.manifest import damage_in_share, problem_of, sealed
from moe_builders.checkpoint.run_checkpoints import RunCheckpoints, read_checkpoint


@pytest.fixture
def checkpoints(tmp_path, world):
    return RunCheckpoints(tmp_path / "checkpoints", world=world, keep_last=None)


def _save(checkpoints, step):
    tensors = {"a.b": torch.full((3, 2), float(step)), "c": torch.arange(300) + step}
    return checkpoints.save(step, tensors, {"note": "é"}, {"mine": step}, {"shown": [step] * 9})


def _flip(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_the_manifest_lists_every_file_but_itself(checkpoints):
    folder = _save(checkpoints, 1)
    files = json.loads((folder / "run.json").read_text())["files"]
    assert sorted([*files, "run.json"]) == sorted(path.name for path in folder.iterdir())
    for name, entry in files.items():
        assert entry["bytes"] == (folder / name).stat().st_size
        assert entry["blake2b"] == manifest._digest((folder / name).read_bytes())


def test_any_flipped_bit_of_run_json_is_noticed(checkpoints):
    folder = _save(checkpoints, 1)
    path = folder / "run.json"
    size = len(path.read_bytes())
    for at in range(size):
        bit = at % 8
        _flip(path, at, bit)
        assert problem_of(folder) is not None, (at, bit)
        _flip(path, at, bit)
    assert problem_of(folder) is None


def test_any_flipped_byte_of_any_other_file_is_noticed(checkpoints, world):
    folder = _save(checkpoints, 1)
    checkpoint = read_checkpoint(folder)
    files = [path for path in sorted(folder.iterdir()) if path.name != "run.json"]
    assert len(files) == 4
    for path in files:
        size = len(path.read_bytes())
        for at in {0, size - 1, *range(0, size, max(1, size // 40))}:
            _flip(path, at, at % 8)
            assert problem_of(folder) is None, "sizes do not tell"
            assert checkpoints.damage(checkpoint) == f"{path.name} does not fit its checksum"
            _flip(path, at, at % 8)
    assert checkpoints.damage(checkpoint) is None
    files[0].unlink()
    assert "cannot be read ([Errno 2] No such file" in checkpoints.damage(checkpoint)


def test_the_newest_that_is_unharmed_is_picked(checkpoints):
    for step in (1, 2, 3):
        _save(checkpoints, step)
    folders = [path for path, _ in checkpoints.survey()]
    _flip(folders[0] / "__0_0.distcp", 700, 3)
    (folders[1] / "run.json").unlink()
    found, passed = checkpoints.newest_unharmed()
    assert found.step == 1
    assert passed == [(folders[0], "__0_0.distcp does not fit its checksum"),
                      (folders[1], "run.json is missing")]  # fmt: skip
    assert checkpoints.newest().step == 3, "which looks at sizes alone"


def test_one_without_checksums_is_still_read(checkpoints):
    folder = _save(checkpoints, 1)
    files = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "run.json"}
    facts = {"format": 1, "step": 1, "files": files, "note": "old"}
    (folder / "run.json").write_text(json.dumps(facts))
    found, passed = checkpoints.newest_unharmed()
    assert (found.step, found.has_checksums, passed) == (1, False, [])
    back = {"a.b": torch.zeros(3, 2)}
    found.read(back)
    assert torch.equal(back["a.b"], torch.ones(3, 2))
    (folder / "rank_0.json").write_text("{}")
    assert "rank_0.json has 2 bytes instead of" in problem_of(folder)


def test_a_checksum_cannot_be_left_out(checkpoints):
    folder = _save(checkpoints, 1)
    facts = json.loads((folder / "run.json").read_text())
    facts.pop("checksum")
    (folder / "run.json").write_text(json.dumps(facts))
    assert "run.json cannot be read" in problem_of(folder)


@quick
@given(sizes=st.lists(st.integers(0, 99), min_size=1, max_size=9), size=st.integers(1, 5))
def test_shares_are_every_file_once_and_even(tmp_path_factory, sizes, size):
    folder = tmp_path_factory.mktemp("shares")
    files = {f"f{n}": {"bytes": b, "blake2b": "wrong"} for n, b in enumerate(sizes)}
    facts, seen = {"format": 2, "files": files}, []
    for rank in range(size):
        share = dict(files)
        while share:  # each of the process's files is told in turn, once the ones before are gone
            for name in share:
                (folder / name).write_bytes(b"x")
            found = damage_in_share(folder, {"format": 2, "files": files}, rank=rank, size=size)
            if found is None:
                break
            name = found.split()[0]
            seen.append((rank, name))
            files = files | {name: files[name] | {"blake2b": manifest._digest(b"x")}}
            share.pop(name)
    assert sorted(name for _, name in seen) == sorted(facts["files"])
    loads = [sum(files[name]["bytes"] for r, name in seen if r == rank) for rank in range(size)]
    assert max(loads) - min(loads) <= max(sizes)


def test_the_text_is_the_same_for_the_same_facts():
    one = sealed(3, {"a": {"bytes": 1, "blake2b": "0" * 32}}, {"x": "0" * 32})
    assert one == sealed(3, {"a": {"bytes": 1, "blake2b": "0" * 32}}, {"x": "0" * 32})
    facts = json.loads(one)
    assert facts["x"] == facts["files"]["a"]["blake2b"] == "0" * 32, "only its own is filled in"
    assert facts["checksum"] != "0" * 32
