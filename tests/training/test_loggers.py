"""Loggers of a config, and what they wrote, read back with their own tools."""

import json
import struct
import sys

import moe_full_finetune as recipe
import pytest
from helpers_train import config
from torchtune.training.metric_logging import DiskLogger, StdoutLogger

from moe_builders.errors import InputError
from moe_builders.training.loggers import build_loggers
from moe_builders.training.reporting import Reporter

TUNE = "torchtune.training.metric_logging"
VAL = {"_component_": "helpers_train.RaggedDataset", "num_samples": 8, "seed": 7}


def test_loggers_of_a_config(tmp_path):
    (default,) = build_loggers(None, output_dir=str(tmp_path))
    assert isinstance(default, DiskLogger)
    default.log_dict({"loss": 1.5}, 3)
    default.close()
    (written,) = (tmp_path / "logs").iterdir()
    assert written.read_text().startswith("Step 3 | loss:1.5")
    disk = {"_component_": f"{TUNE}.DiskLogger", "log_dir": str(tmp_path / "mine"),
            "filename": "log.txt"}  # fmt: skip
    screen = {"_component_": f"{TUNE}.StdoutLogger"}
    found = build_loggers([disk, screen], output_dir="unused")
    assert [type(logger) for logger in found] == [DiskLogger, StdoutLogger]
    for logger in found:
        logger.close()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["log.txt"]
    (alone,) = build_loggers(screen, output_dir="unused")
    alone.close()


def needs_a_package():
    raise ImportError("thatlog is not there\ninstall it")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_component_": "test_loggers.needs_a_package"},
         "metric_logger needs what is not installed: thatlog is not there$"),
        ("wandb", "metric_logger needs a _component_"),
        ({"_component_": f"{TUNE}.DiskLoger"}, "did you mean 'DiskLogger'"),
        ({"_component_": f"{TUNE}.DiskLogger"}, "DiskLogger: missing a required arg.*'log_dir'"),
        ({"_component_": f"{TUNE}.DiskLogger", "log_dir": 3}, "metric_logger.log_dir is 3"),
        ([{"_component_": f"{TUNE}.StdoutLogger"}, {}],
         r"metric_logger\[1\] needs a _component_"),
    ],
)  # fmt: skip
def test_bad_loggers_are_one_sentence(node, message):
    with pytest.raises(InputError, match=message) as caught:
        build_loggers(node, output_dir="unused")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("logger", "package", "command"),
    [
        ("TensorBoardLogger", "tensorboard", "pip install tensorboard"),
        ("WandBLogger", "wandb", "pip install wandb"),
        ("CometLogger", "comet_ml", "pip install comet-ml"),
    ],
)
def test_a_missing_package_is_named_with_its_command(logger, package, command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    node = {"_component_": f"{TUNE}.{logger}", "log_dir": "unused"}
    with pytest.raises(InputError) as caught:
        build_loggers(node, output_dir="unused")
    assert str(caught.value) == (
        f"metric_logger: {logger} needs the package {package}, which is not installed: {command}"
    )
    assert capsys.readouterr().err == "", "nothing else is said"


def tensorboard_numbers(folder):
    """{name: {step: value}} of all event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: {e.step: float(e.tensor_proto.float_val[0]) for e in events.Tensors(name)}
        for name in events.Tags()["tensors"]
    }


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    node = {"_component_": f"{TUNE}.TensorBoardLogger", "log_dir": str(tmp_path / "events"),
            "organize_logs": False}  # fmt: skip
    cfg = config(tmp_path, metric_logger=node, dataset_val=VAL, max_steps=3, log_layers=True)
    trained = recipe.main(cfg)
    found = tensorboard_numbers(tmp_path / "events")
    for line in trained.history:
        for name, value in line.items():
            if name != "step":
                assert found[name][line["step"]] == pytest.approx(value, rel=1e-6), name
    assert found["val_loss"] == {
        line["step"]: pytest.approx(line["val_loss"]) for line in trained.validations
    }
    assert set(found["layers.1/max_violation"]) == {1, 2, 3}
    assert set(found["layers.0/val_load_entropy"]) == {0, 3}


def test_tensorboard_goes_on_after_a_resumed_run(tmp_path):
    node = {"_component_": f"{TUNE}.TensorBoardLogger", "log_dir": str(tmp_path),
            "organize_logs": False}  # fmt: skip
    history = []
    for first in (1, 4):
        loggers = build_loggers(node, output_dir="unused")
        made = Reporter(loggers, total=6, every=1, show=False, history=history)
        for number in range(first, first + 3):
            made.step(number, {"loss": 10.0 - number})
        made.close()
        history = made.history
    assert tensorboard_numbers(tmp_path)["loss"] == {n: 10.0 - n for n in range(1, 7)}


def wandb_numbers(folder):
    """Lines of the one offline run under a folder; its file is a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("*.wandb")
    data, at, record, lines = path.read_bytes(), 7, b"", []
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # no header fits: the block's end is filled up
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole one, or the last piece of one
            items = Record.FromString(record).history.item
            lines.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            record = b""
    return [line for line in lines if line]


def test_wandb_gets_every_number_at_its_step(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads these once a process, and another test may have started it
    node = {"_component_": f"{TUNE}.WandBLogger", "project": "moe", "log_dir": str(tmp_path)}
    trained = recipe.main(config(tmp_path, metric_logger=node, dataset_val=VAL, max_steps=3))
    wandb.teardown()
    lines = wandb_numbers(tmp_path)
    assert [line["global_step"] for line in lines] == [0, 1, 2, 3, 3]
    steps = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in steps] == [v["loss"] for v in trained.history]
    assert [line["val_loss"] for line in lines if "val_loss" in line] == [
        v["val_loss"] for v in trained.validations
    ]
