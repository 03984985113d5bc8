"""A run, and the same run gone on with from each of its checkpoints: what differs at the end."""

import dataclasses
import json
from pathlib import Path

import moe_full_finetune as recipe
import torch
from helpers_data import text_node, write_jsonl, write_tokenizer
from helpers_train import RaggedDataset

from moe_builders.checkpoint.run_checkpoints import read_checkpoint
from moe_builders.parallel.dcp import stored_tensors
from moe_builders.parallel.sharding import local_shard
from moe_builders.parallel.world import open_world

MODEL = {"_component_": "moe_builders.families.qwen3_moe.qwen3_moe", "vocab_size": 400,
         "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
         "num_experts": 8, "experts_per_token": 2, "expert_hidden_dim": 32,
         "max_seq_len": 128}  # fmt: skip
TIMES = ("tokens_per_second", "mfu", "peak_rss_gib", "peak_memory_gib", "slowest_rank",
         "slowest_lag_seconds")  # fmt: skip
WORDS = "the user asks an assistant and system answers in words of two four def return hello you"


def write_data(folder):
    """A tokenizer and two sets of ragged texts."""
    write_tokenizer(folder / "tokenizer")
    stream = torch.Generator().manual_seed(0)
    for name, count in (("a", 60), ("b", 25)):
        rows = []
        for number in range(count):
            length = int(torch.randint(2, 40, (), generator=stream))
            picked = torch.randint(0, 16, (length,), generator=stream).tolist()
            words = WORDS.split()
            rows.append({"text": f"{name}{number} " + " ".join(words[i] for i in picked)})
        write_jsonl(folder / f"{name}.jsonl", rows)


def data_keys(kind, folder):
    """Configuration keys of one kind of data."""

    def node(name, **more):
        return text_node(folder / f"{name}.jsonl", column="text", packed=True, **more)

    kinds = {
        "packed": {"dataset": node("a")},
        "streamed": {"dataset": node("a", streaming=True), "shuffle_window": 16},
        "mixed": {"dataset": [node("a", weight=2), node("b", weight=1)]},
        "mixed streams": {"dataset": [node("a", weight=2, streaming=True), node("b", weight=1)],
                          "shuffle_window": 16},
    }  # fmt: skip
    return kinds[kind] | {
        "model": MODEL, "max_seq_len": 48, "batch_size": 2,
        "tokenizer": {"_component_": "moe_builders.data.tokenizer.HFTokenizer",
                      "path": str(folder / "tokenizer")},
    }  # fmt: skip


def differences_after_resuming(cfg, stops):
    """Run straight with a checkpoint at each step, then from each of ``stops`` to the end.

    Returns:
        {stop: what is not byte-equal at the end}; {} everywhere is what is wanted.
    """
    with torch.compiler.set_stance("force_eager"):  # torchao compiles each shape: seconds
        return _differences(cfg, stops)


def _differences(cfg, stops):
    straight = dataclasses.replace(cfg, checkpoint_every_n_steps=1, keep_last=None)
    trained = recipe.main(straight)
    last = len(trained.history)
    folder = Path(cfg.output_dir) / "checkpoints"
    whole = everything_in(folder / f"step_{last:08d}")
    found = {}
    for stop in stops:
        torch.manual_seed(1234 + stop)  # nothing may depend on what this process did before
        again = dataclasses.replace(
            straight, output_dir=f"{cfg.output_dir}_from_{stop}",
            resume=str(folder / f"step_{stop:08d}"), checkpoint_every_n_steps=last,
        )  # fmt: skip
        resumed = recipe.main(again)
        other = everything_in(Path(again.output_dir) / f"checkpoints/step_{last:08d}")
        found[stop] = [key for key in whole | other if not _same(whole.get(key), other.get(key))]
        found[stop] += [] if _timeless(resumed.history) == _timeless(trained.history) else ["main"]
        found[stop] += [] if _files(again) == _files(straight) else ["exported model"]
    return found


def everything_in(folder):
    """All that a checkpoint holds, but for times and names of folders."""
    checkpoint = read_checkpoint(folder)
    tensors = {n: torch.zeros(s, dtype=d) for n, (s, d) in stored_tensors(folder).items()}
    with open_world(device="cpu"):
        checkpoint.read(tensors)
    facts = {k: checkpoint.facts[k] for k in ("step", "loader", "numbers")} | checkpoint.record()
    facts["history"] = _timeless(facts["history"])
    ranks = {p.name: json.loads(p.read_text()) for p in sorted(folder.glob("rank_*.json"))}
    return tensors | facts | ranks


def _timeless(history):
    return [{k: v for k, v in values.items() if k not in TIMES} for values in history]


def _files(cfg):
    return {p.name: p.read_bytes() for p in (Path(cfg.output_dir) / "model").glob("*.safetensors")}


def _same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


class Spoiler(RaggedDataset):
    """As soon as training has begun, a file stands where checkpoints are to be written."""

    def __init__(self, tokenizer, folder):
        super().__init__(tokenizer)
        self.folder = Path(folder)

    def __getitem__(self, index):
        if self.folder.parent.is_dir() and not self.folder.exists():
            self.folder.write_text("in the way")
        return super().__getitem__(index)


class OwnMomentum(torch.optim.Optimizer):
    """What users write: counts in a plain number, and keeps local tensors."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                own, grad = local_shard(parameter).tensor, local_shard(parameter.grad).tensor
                if not state:
                    state["step"], state["momentum"] = 0, torch.zeros_like(own)
                state["step"] += 1
                state["momentum"].mul_(0.9).add_(grad)
                own.sub_(group["lr"] / state["step"] ** 0.5 * state["momentum"])
