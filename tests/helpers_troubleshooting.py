"""The rows of docs/troubleshooting.md, and the real runs behind them."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import moe_full_finetune as recipe
import torch
from helpers_data import CHATML, write_jsonl, write_tokenizer
from helpers_train import HF_CONFIG
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from moe_builders.hub import create_hf_model
from moe_builders.parallel.launch import launch
from moe_builders.training.config import parse_command_line

PAGE = Path(__file__).parents[1] / "docs/troubleshooting.md"
LAUNCH = "tune run moe_full_finetune"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
SAVED = "a run that has saved checkpoints"


@dataclass(frozen=True)
class Row:
    """One row of a table: how it comes about, what is said, and the exit code."""

    number: int  # of the line in the page
    typed: str
    says: str
    code: int


def rows_of(page):
    """Every row of every table; a third column holds the exit code, which is else 2."""
    found = []
    for number, line in enumerate(page.splitlines(), start=1):
        if not line.startswith("| ") or line.startswith("| what "):
            continue
        cells = [c.strip().replace(r"\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        typed, says, code = (*cells, "2")[:3]
        assert says.startswith("`"), line
        assert says.endswith("`"), line
        found.append(Row(number, typed, says.strip("`"), int(code)))
    return found


def configs_of(page):
    """The page's configurations by the name in their first line (``# my.yaml``)."""
    blocks = re.findall(r"```yaml\n# ([\w.]+)[^\n]*\n(.*?)```", page, re.DOTALL)
    return dict(blocks)


def make_base(folder):
    """A model folder in shards, with a tokenizer and its chat template."""
    write_tokenizer(folder, template=CHATML)
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
             "num_key_value_heads": 1, "moe_intermediate_size": 16, "intermediate_size": 32,
             "num_experts": 4, "max_position_embeddings": 64}  # fmt: skip
    create_hf_model(folder, HF_CONFIG | sizes, seed=0, max_shard_bytes=100_000)


def make_place(place, base, page):
    """What the page's introduction describes: configurations, data, a model."""
    shutil.copytree(base, place / "model")
    configs = {name: dict(OmegaConf.create(text)) for name, text in configs_of(page).items()}
    for name, values in configs.items():  # one is whole, the others say what is different
        OmegaConf.save(OmegaConf.create(configs["my.yaml"] | values), place / name)
    write_jsonl(place / "texts.jsonl", [{"text": f"text number {n}"} for n in range(9)])
    write_jsonl(place / "chats.jsonl", [{"messages": CHAT}] * 9)


def come_about(row, place, monkeypatch):
    """Prepare what the row's first cell says; gives the command line."""
    config, overrides = "my.yaml", []
    holds = re.match(r"`([\w./]+)` holds `([^`]+)`", row.typed)
    last = re.search(r"(?:^|[:,] )`([^`]+)`$", row.typed)
    if holds is not None:
        _write(place / holds[1], holds[2])
        config = "chats.yaml" if "chats" in row.typed else config
    elif words := row.typed[: last.start() if last is not None else None]:
        overrides = SETUPS[words](place, monkeypatch) or []
    typed = last[1] if last is not None else ""
    if typed.startswith(LAUNCH):
        return shlex.split(typed.removeprefix(LAUNCH))
    return ["--config", config, *overrides, *shlex.split(typed)]


def run(argv, capsys):
    """(exit code, lines of the error stream, lines of the output)."""
    capsys.readouterr()
    code = launch(recipe.main, lambda: parse_command_line(argv))
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, err.splitlines(), out.splitlines()


def shown(line, place):
    """A line as the page shows it: without the machine's own folders and this run's digits."""
    return line.replace(str(place), "/my").removeprefix("error: ")


def matches(says, line):
    """Whether a line is the page's; ``…`` stands for what differs by version."""
    return re.fullmatch(".*?".join(map(re.escape, says.split("…"))), line) is not None


class Long:
    """Its last sample is longer than any row."""

    def __init__(self, tokenizer):
        self.lengths = [5] * 7 + [40]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return {"tokens": [1] * self.lengths[index], "labels": [1] * self.lengths[index]}


class Interrupted(Long):
    """Reading its third sample sends this process a signal (0: a second Ctrl-C)."""

    def __init__(self, tokenizer, number):
        self.lengths, self.number, self.read = [5] * 8, number, 0

    def __getitem__(self, index):
        self.read += 1
        if self.read == 12:
            if not self.number:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def _write(path, content):
    """Data: a first row of that kind; JSON of the model's: these fields changed; else the text."""
    if path.suffix == ".jsonl":
        old = path.read_text() if "messages" not in content and "text" in content else ""
        path.write_text(content + "\n" + (old or (content + "\n") * 8))
    elif path.name == "config.json" or path.name.startswith(("tokenizer_", "generation_")):
        old = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(old | json.loads(content)))
        if path.name.startswith("generation_"):  # read where this names none
            _write(path.with_name("tokenizer_config.json"), '{"eos_token": null}')
    else:
        path.write_text(content.replace("\\t", "\t").replace("\\n", "\n"))


def _shards(place):
    return sorted((place / "model").glob("*.safetensors"))


def _without(*names):
    """A package is not installed."""

    def setup(place, monkeypatch):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return setup


def _processes(size):
    def setup(place, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(size))

    return setup


def _cut(place, monkeypatch):
    path = _shards(place)[1]
    path.write_bytes(path.read_bytes()[:-7])


def _pointer(place, monkeypatch):
    _shards(place)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _fp8(*, explained, scales):
    """Experts as FP8 weights; their scales are for blocks of 16 rows."""

    def setup(place, monkeypatch):
        index_file = place / "model/model.safetensors.index.json"
        weight_map = {}
        for path in _shards(place):
            tensors = load_file(path)
            for name in [name for name in tensors if ".experts." in name]:
                rows = tensors[name].shape[0]
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)
                if scales:
                    tensors[f"{name}_scale_inv"] = torch.ones(rows // 16, 1)
            weight_map |= dict.fromkeys(tensors, path.name)
            save_file(tensors, path, {"format": "pt"})
        index_file.write_text(json.dumps({"weight_map": weight_map}))
        if explained:
            _write(place / "model/config.json", '{"quantization_config": {"quant_method": "fp8"}}')

    return setup


def _no_login(place, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("NETRC", str(place / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def _saved(place, monkeypatch):
    argv = ["--config", "my.yaml", "checkpoint_every_n_steps=1", "keep_last=null"]
    assert launch(recipe.main, lambda: parse_command_line(argv)) == 0
    return ["checkpoint_every_n_steps=1", "keep_last=null"]


def _damaged(place, monkeypatch):
    overrides = _saved(place, monkeypatch)
    os.truncate(place / "out/checkpoints/step_00000002/rank_0.json", 99)
    return overrides


def _changed(place, monkeypatch):
    overrides = _saved(place, monkeypatch)
    path = place / "out/checkpoints/step_00000002/rank_0.json"
    data = bytearray(path.read_bytes())
    data[99] ^= 1
    path.write_bytes(data)
    return overrides


def _signal(number):
    def setup(place, monkeypatch):
        node = f"{{_component_: helpers_troubleshooting.Interrupted, number: {int(number)}}}"
        return [f"dataset={node}", "epochs=9"]

    return setup


SETUPS = {
    "the first process of three": _processes(3),
    "`RANK` set by hand": lambda place, patch: patch.setenv("RANK", "0"),
    "without a GPU": lambda place, patch: patch.setattr(torch.cuda, "is_available", lambda: False),
    "a weight file that a download left half done": _cut,
    "a weight file that git-lfs has not fetched": _pointer,
    "FP8 weights, and no `quantization_config`": _fp8(explained=False, scales=True),
    "FP8 weights without their scales": _fp8(explained=True, scales=False),
    "FP8 weights with scales of other blocks": _fp8(explained=True, scales=True),
    "a weight file is not there": lambda place, patch: _shards(place)[1].unlink(),
    "no `config.json` in the model's folder":
        lambda place, patch: (place / "model/config.json").unlink(),
    "no `tokenizer.json` in the model's folder":
        lambda place, patch: (place / "model/tokenizer.json").unlink(),
    "no chat template, and chats": lambda place, patch: (
        _write(place / "model/tokenizer_config.json", '{"chat_template": null}'),
        shutil.copy(place / "chats.yaml", place / "my.yaml"))[2:],
    "bitsandbytes is not installed": _without("bitsandbytes"),
    "liger-kernel is not installed": _without("liger_kernel"),
    "tensorboard is not installed": _without("tensorboard"),
    "nobody has logged in": _no_login,
    "a folder `code` that no run has written": lambda place, patch: (
        (place / "code/model").mkdir(parents=True),
        (place / "code/model/mine.py").write_text("mine"))[2:],
    SAVED: _saved,
    "the newest checkpoint is damaged": _damaged,
    "a byte of the newest checkpoint has changed": _changed,
    "an own data set of 7 short samples and a long one": lambda place, patch: [
        "dataset={_component_: helpers_troubleshooting.Long}", "shuffle=false"],
    "Ctrl-C": _signal(signal.SIGINT),
    "SIGTERM, as a cluster sends it": _signal(signal.SIGTERM),
    "a second Ctrl-C": _signal(0),
}  # fmt: skip
