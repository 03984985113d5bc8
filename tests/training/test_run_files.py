"""metrics.jsonl and environment.json: what is written, and what a resumed run does with it."""

import json
import subprocess
import sys

import pytest
import torch

from moe_builders.errors import InputError
from moe_builders.training.run_files import MetricsFile, describe_environment, start_run_folder

CPU = torch.device("cpu")


def test_lines_are_appended_and_cut_at_a_step(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(3)  # nothing there yet
    assert not file.path.exists()
    file.append({"step": 0, "kind": "validation", "val_loss": 4.0})
    for step in range(1, 6):
        file.append({"step": step, "loss": 1.0 / step})
    file.append({"step": 3, "kind": "validation", "load": [[1, 2]]})
    before = file.read()
    file.truncate_after(3)
    assert file.read() == [line for line in before if line["step"] <= 3]
    assert [line["step"] for line in file.read()] == [0, 1, 2, 3, 3]
    file.append({"step": 4, "loss": 9.0})
    assert file.read()[-1] == {"step": 4, "loss": 9.0}
    file.truncate_after(-1)
    assert file.read() == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_that_json_lacks_become_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    text = file.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": None}  # fmt: skip


def test_a_half_written_line_is_dropped(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    with file.path.open("a") as handle:
        handle.write('{"step": 2, "lo')
    file.truncate_after(2)
    file.append({"step": 2})
    assert file.read() == [{"step": 1}, {"step": 2}]


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1})


def test_environment_names_what_a_run_was_made_with():
    found = describe_environment(device=CPU, num_processes=3)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for package in ("moe-builders", "torchtune", "torchao", "datasets"):
        assert found["versions"][package], package
    assert found["num_processes"] == 3
    assert found["command"] == sys.argv
    assert found["started"].endswith("+00:00")
    assert found["cuda"] is None
    json.dumps(found)


def test_the_commit_is_that_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert describe_environment(device=CPU, num_processes=1)["git_commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = describe_environment(device=CPU, num_processes=1)
    assert (found["git_commit"], found["git_dirty"]) == (head.stdout.strip(), False)
    (tmp_path / "a").write_text("2")
    assert describe_environment(device=CPU, num_processes=1)["git_dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert describe_environment(device=CPU, num_processes=1)["git_commit"] is None


def test_each_start_is_kept_and_a_new_run_begins_anew(tmp_path):
    folder = tmp_path / "deep" / "run"
    path, metrics = folder / "environment.json", MetricsFile(folder / "metrics.jsonl")
    start_run_folder(folder, device=CPU, num_processes=1, step=3)
    metrics.append({"step": 1})
    start_run_folder(folder, device=CPU, num_processes=2, step=3)
    assert [start["num_processes"] for start in json.loads(path.read_text())] == [1, 2]
    assert metrics.read() == [{"step": 1}]
    start_run_folder(folder, device=CPU, num_processes=4, step=0)
    assert [start["num_processes"] for start in json.loads(path.read_text())] == [4]
    assert metrics.read() == []
    path.write_text("[{")
    with pytest.raises(InputError, match=r"environment\.json is not valid JSON: move it away"):
        start_run_folder(folder, device=CPU, num_processes=1, step=3)
