"""Ways of keeping experts evenly used, compared: the same small model, data, seed and budget.

    python examples/python_stdlib/prepare.py --out out/python_stdlib
    python benchmarks/balance.py
    python benchmarks/balance.py --steps 2 --only none sinkhorn     # does it run?

Each way trains a decoder with random weights on the source of Python's standard library through
the recipe; nothing but router and balancing differs. Results are saved after each way, the table
is printed last, the picture holds held-out loss and imbalance over the steps.

README.md beside this file says how to read what comes out.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, circumstances, save
from omegaconf import OmegaConf

sys.path.append(str(ROOT / "recipes"))

import moe_full_finetune as recipe

from moe_builders.training.config import check_config

ROUTERS = "moe_builders.routers"


def aux(scope: str) -> dict[str, Any]:
    """The Switch balancing loss, counted over a scope."""
    return {"router_losses": {"load_balancing_coef": 0.01, "load_balancing_scope": scope}}


WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "loss, sequence": aux("sequence"),
    "loss, micro": aux("micro"),
    "loss, global": aux("global"),
    "bias, sign rule": {
        "model": {"expert_bias": True}, "expert_bias": {"update_rate": 0.01}},
    "bias, quantile": {
        "model": {"expert_bias": True, "score_function": "sigmoid"},
        "expert_bias": {"update_rate": 0.2, "rule": "quantile"}},
    "sinkhorn": {"router": {"_component_": f"{ROUTERS}.SinkhornRouter"}},
    "thresholds, capacity": {
        "router": {"_component_": f"{ROUTERS}.ThresholdRouter"},
        "router_losses": {"load_balancing_coef": 0.01, "load_balancing_form": "st_moe"}},
    "expert choice, EMA": {
        "router": {"_component_": f"{ROUTERS}.ExpertChoiceTopKRouter", "capacity_factor": 2.0,
                   "inference": "threshold_ema", "ema_decay": 0.9}},
}  # fmt: skip
SHOWN = {  # of a run's end: the last validation, and the last steps' mean
    "val_loss": "held out [nats per token]", "val_max_violation": "max_violation there",
    "max_violation": "max_violation in training", "drop_rate": "dropped",
    "dead_experts": "dead experts",
}  # fmt: skip
KEPT = ("step", "loss", "balance", *SHOWN)


def run_config(data: Path, output: Path, args: argparse.Namespace, way: str) -> Any:
    """The recipe's configuration of one way; all of them share everything that ``WAYS`` is not."""
    texts = {
        "_component_": "torchtune.datasets.text_completion_dataset", "source": "json",
        "column": "text", "split": "train", "packed": True, "split_across_pack": True,
    }  # fmt: skip
    common = {
        "output_dir": str(output),
        "model": {
            "_component_": "moe_builders.generic.moe_transformer", "vocab_size": 4096,
            "embed_dim": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "num_experts": 16,
            "experts_per_token": 2, "expert_hidden_dim": 128, "max_seq_len": 512,
        },
        "tokenizer": {
            "_component_": "moe_builders.data.tokenizer.HFTokenizer", "path": str(data / "base")},
        "dataset": texts | {"data_files": str(data / "train.jsonl")},
        "dataset_val": texts | {"data_files": str(data / "heldout.jsonl"), "split": "train[:12]"},
        "max_seq_len": 256, "batch_size": args.rows, "gradient_accumulation_steps": 2,
        "max_steps": args.steps, "seed": args.seed, "run_val_every_n_steps": args.every,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2.0e-3, "weight_decay": 0.01},
        "lr_scheduler": {
            "_component_": "torchtune.training.get_cosine_schedule_with_warmup",
            "num_warmup_steps": min(20, args.steps - 1)},
        "router_losses": {"z_coef": 0.001},
        "device": "cpu",
    }  # fmt: skip
    return check_config(OmegaConf.merge(common, WAYS[way]))  # pyright: ignore


def measure(way: str, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one way; its curves."""
    with tempfile.TemporaryDirectory() as folder:
        trained = recipe.main(run_config(data, Path(folder) / "run", args, way))
    curves = {"history": trained.history, "validations": trained.validations}
    return {
        name: [{key: round(v[key], 5) for key in KEPT if key in v} for v in values]
        for name, values in curves.items()
    }


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The end of a run: the last validation, and the mean of the last tenth of the steps."""
    last = found["history"][-max(1, len(found["history"]) // 10) :]
    end = found["validations"][-1]
    return {
        name: end[name] if name in end else statistics.fmean(step[name] for step in last)
        for name in SHOWN
    }


def table(results: dict[str, Any]) -> str:
    """Markdown, a row a way."""
    lines = ["| way | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for way, found in results.items():
        values = summary(found)
        lines.append(f"| {way} | " + " | ".join(f"{values[name]:.3f}" for name in SHOWN) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Held-out loss, and the worst layer's imbalance in training, over the steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # pyright: ignore
    for colour, (way, found) in zip(colours, results.items(), strict=False):
        steps = [v["step"] for v in found["validations"]]
        left.plot(steps, [v["val_loss"] for v in found["validations"]], label=way, color=colour)
        imbalance = [step["max_violation"] for step in found["history"]]
        width = max(1, len(imbalance) // 20)
        smooth = [statistics.fmean(imbalance[max(0, n - width) : n + 1])
                  for n in range(len(imbalance))]  # fmt: skip
        right.plot(range(1, len(smooth) + 1), smooth, color=colour)
    left.set(title="held out", xlabel="step", ylabel="nats per token", ylim=(None, 7.2))
    right.set(title="training: worst layer's max_violation", xlabel="step",
              ylabel="max load / mean load − 1 (0 = balanced), running mean")  # fmt: skip
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train every way, save as it goes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--data", type=Path, default=Path("out/python_stdlib"))
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=25, help="steps between validations")
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens, twice a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/balance_cpu.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/balance.png")
    args = parser.parse_args(argv)
    if not (args.data / "train.jsonl").is_file():
        sys.exit(f"{args.data} holds no train.jsonl: run examples/python_stdlib/prepare.py "
                 f"--out {args.data} first")  # fmt: skip
    torch.set_num_threads(args.threads)
    where = circumstances(torch.device("cpu"), args.threads)
    results: dict[str, Any] = {}
    for way in args.only:
        results[way] = measure(way, args.data, args)
        plain = {key: str(value) for key, value in vars(args).items()}
        ends = {name: summary(found) for name, found in results.items()}
        save({"where": where, "arguments": plain, "ends": ends, "runs": results}, args.out)
    draw(results, args.picture)
    print(table(results))


if __name__ == "__main__":
    main()
