"""Compare a tuned model with its base model and with n-gram tables on held-out modules.

    python examples/python_stdlib/report.py --base out/python_stdlib/base \
        --tuned out/python_stdlib/run/model --data out/python_stdlib --out out/python_stdlib/report

Letters: b batch · s sequence · v vocabulary · e num_experts · l layers with experts.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchtune.generation import generate

from moe_builders.decoder import MoEDecoder
from moe_builders.errors import InputError
from moe_builders.hub import load_hf_model
from moe_builders.metrics import dead_experts, load_share, max_violation
from moe_builders.moe import MoE, collect_routing
from moe_builders.routing import TokenInfo

EOS = "<|endoftext|>"
# Without its line end: the tokenizer joins a line end and the indentation behind it into one token.
PROMPT = "def read_lines(path):"
WINDOW = 256


@dataclass(frozen=True)
class Document:
    """One held-out module: its tokens with the end-of-text token, and what n-grams make of it."""

    tokens: Tensor  # [n]
    num_bytes: int
    unigram_nats: float
    bigram_nats: float


@dataclass(frozen=True)
class Evaluation:
    """Loss and expert load of one pass over documents."""

    nats: float
    tokens: int
    load: dict[str, Tensor]  # layer name -> [e] assignments


def read_documents(
    data: Path, tokenizer: Tokenizer, *, max_tokens: int | None = None
) -> list[Document]:
    """The held-out modules with their n-gram losses.

    Args:
        data: what prepare.py wrote.
        tokenizer: the one of the base model.
        max_tokens: stop after the module that reaches this many predicted tokens.

    Raises:
        InputError: the n-gram losses were computed on other tokens.
    """
    ngrams = json.loads((data / "ngrams.json").read_text(encoding="utf-8"))["documents"]
    eos = tokenizer.token_to_id(EOS)
    documents: list[Document] = []
    total = 0
    with (data / "heldout.jsonl").open(encoding="utf-8") as lines:
        for line, ngram in zip(lines, ngrams, strict=True):
            if documents and max_tokens is not None and total >= max_tokens:
                break
            tokens = torch.tensor([*tokenizer.encode(json.loads(line)["text"]).ids, eos])
            if len(tokens) - 1 != ngram["tokens"]:
                raise InputError(
                    f"{data / 'ngrams.json'} counts {ngram['tokens']} tokens in {ngram['path']}, "
                    f"but this tokenizer makes {len(tokens) - 1}: {_prepare_first(data)}"
                )
            documents.append(
                Document(tokens, ngram["bytes"], ngram["unigram_nats"], ngram["bigram_nats"])
            )
            total += ngram["tokens"]
    return documents


def cut_windows(documents: Iterable[Tensor], window: int) -> list[Tensor]:
    """Pieces of window + 1 tokens that overlap by one: each token but a document's first is
    predicted exactly once, from what stands before it in its piece. Longest first."""
    pieces = [
        tokens[start : start + window + 1]
        for tokens in documents
        for start in range(0, len(tokens) - 1, window)
    ]
    return sorted(pieces, key=len, reverse=True)


def evaluate(
    model: MoEDecoder, documents: Iterable[Tensor], window: int = WINDOW, *, batch_size: int = 8
) -> Evaluation:
    """Loss and expert load over documents, each cut into windows."""
    pieces = cut_windows(documents, window)
    nats, load = 0.0, defaultdict(lambda: torch.tensor(0))
    for start in range(0, len(pieces), batch_size):
        batch = pieces[start : start + batch_size]
        rows = pad_sequence(batch, batch_first=True)  # [b, s + 1]
        inputs, targets = rows[:, :-1], rows[:, 1:]
        b, s = inputs.shape
        lengths = torch.tensor([len(piece) - 1 for piece in batch])
        real = torch.arange(s) < lengths[:, None]  # [b, s], so that padding loads no expert
        info = TokenInfo(
            mask=real.flatten(),
            sequence_ids=torch.arange(b).repeat_interleave(s),
            input_ids=inputs.flatten(),
        )
        with torch.no_grad():
            logits = model(inputs, info=info)  # [b, s, v]
        assert isinstance(logits, Tensor)
        nats += float(F.cross_entropy(logits[real], targets[real], reduction="sum"))
        for name, routing in collect_routing(model).items():
            load[name] = load[name] + routing.num_tokens_per_expert
    return Evaluation(nats, sum(len(piece) - 1 for piece in pieces), dict(load))


def held_out_loss(
    model: MoEDecoder, documents: Iterable[Tensor], window: int = WINDOW
) -> tuple[float, int]:
    """(nats, predicted tokens) over documents, each cut into windows."""
    result = evaluate(model, documents, window)
    return result.nats, result.tokens


@contextmanager
def experts_silenced(model: nn.Module) -> Iterator[None]:
    """Within, every routed expert answers zero: what is left is attention (and shared experts)."""

    def silence(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
        return torch.zeros_like(out)

    layers = [module for module in model.modules() if isinstance(module, MoE)]
    handles = [layer.experts.register_forward_hook(silence) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def complete(
    model: MoEDecoder, tokenizer: Tokenizer, prompt: str, *, max_tokens: int = 96, seed: int = 0
) -> str:
    """The prompt and a sampled continuation."""
    eos = tokenizer.token_to_id(EOS)
    assert eos is not None
    with torch.no_grad():
        tokens, _ = generate(
            model,
            torch.tensor(tokenizer.encode(prompt).ids),
            max_generated_tokens=max_tokens,
            temperature=0.7,
            top_k=20,
            stop_tokens=[eos],
            rng=torch.Generator().manual_seed(seed),
        )
    return tokenizer.decode(tokens[0].tolist())


def load_numbers(load: dict[str, Tensor]) -> dict[str, Any]:
    """Counts, worst imbalance and dead experts by layer."""
    return {
        name: {
            "assignments": counts.tolist(),
            "max_violation": float(max_violation(counts)),
            "dead_experts": int(dead_experts(counts)),
        }
        for name, counts in load.items()
    }


def build_report(
    base: MoEDecoder, tuned: MoEDecoder, tokenizer: Tokenizer, documents: Sequence[Document]
) -> dict[str, Any]:
    """All numbers of report.json."""
    texts = [document.tokens for document in documents]
    before, after = evaluate(base, texts), evaluate(tuned, texts)
    with experts_silenced(tuned):
        silent_nats, tokens = held_out_loss(tuned, texts)
    size = sum(document.num_bytes for document in documents)
    nats = {
        "unigram": sum(document.unigram_nats for document in documents),
        "bigram": sum(document.bigram_nats for document in documents),
        "base": before.nats,
        "tuned": after.nats,
        "tuned_without_experts": silent_nats,
    }
    return {
        "held_out": {"modules": len(documents), "tokens": tokens, "bytes": size, "window": WINDOW},
        "losses": {
            name: {"nats_per_token": value / tokens, "nats_per_byte": value / size}
            for name, value in nats.items()
        },
        "rise_without_experts_nats_per_token": (silent_nats - after.nats) / tokens,
        "load": {"base": load_numbers(before.load), "tuned": load_numbers(after.load)},
        "completion": {
            name: complete(model, tokenizer, PROMPT)
            for name, model in (("base", base), ("tuned", tuned))
        },
    }


def print_report(report: dict[str, Any]) -> None:
    """The numbers as tables."""
    held_out, losses = report["held_out"], report["losses"]
    print(
        f"held out: {held_out['modules']} modules, {held_out['bytes']} bytes, "
        f"{held_out['tokens']} predicted tokens; context of at most {held_out['window']}\n"
    )
    print(f"{'':24}nats/token  nats/byte")
    titles = {
        "unigram": "unigram table", "bigram": "bigram table", "base": "base, before",
        "tuned": "tuned, after", "tuned_without_experts": "tuned, experts silenced",
    }  # fmt: skip
    for name, title in titles.items():
        loss = losses[name]
        print(f"{title:24}{loss['nats_per_token']:10.3f} {loss['nats_per_byte']:10.3f}")
    rise = report["rise_without_experts_nats_per_token"]
    print(f"\nsilencing its routed experts costs the tuned model {rise:+.3f} nats per token")
    print("\nexpert load of the tuned model, % of each layer's assignments")
    for name, row in report["load"]["tuned"].items():
        shares = (100 * load_share(torch.tensor(row["assignments"]))).tolist()
        print(
            f"{name:16}" + "".join(f"{share:6.1f}" for share in shares),
            f"  max_violation {row['max_violation']:.2f}, dead experts {row['dead_experts']}",
        )
    print(f"\nthe tuned model completes {PROMPT!r}:\n\n{report['completion']['tuned']}")


def draw_load(load: dict[str, dict[str, Any]], path: Path) -> None:
    """Heat maps of the expert load of each model, layers by experts; 1 is a balanced share."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} was not drawn: pip install 'moe-builders[plots]' for heat maps")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(load), figsize=(5 * len(load), 3), squeeze=False)
    for axis, (title, layers) in zip(axes[0], load.items(), strict=True):
        counts = torch.tensor([row["assignments"] for row in layers.values()])  # [l, e]
        relative = load_share(counts) * counts.shape[1]
        image = axis.imshow(relative.numpy(), vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
        for layer, row in enumerate(relative.tolist()):
            for expert, value in enumerate(row):
                colour = "white" if abs(value - 1) > 0.7 else "black"
                axis.text(expert, layer, f"{value:.1f}", color=colour, ha="center", va="center")
        axis.set(title=f"{title}: load over mean load", xlabel="expert")
        axis.set_yticks(range(len(layers)), layers)
        figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _prepare_first(data: Path) -> str:
    return f"run prepare.py first: python examples/python_stdlib/prepare.py --out {data}"


def main() -> None:
    """Read the command line, load both models, write and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, required=True, help="model folder before training")
    parser.add_argument("--tuned", type=Path, required=True, help="model folder after training")
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--max-tokens", type=int, help="evaluate on a part, for quick tests")
    options = parser.parse_args()
    for path in (options.data / "heldout.jsonl", options.data / "ngrams.json", options.base):
        if not path.exists():
            raise SystemExit(f"{path} is missing; {_prepare_first(options.data)}")
    if not options.tuned.exists():
        raise SystemExit(f"{options.tuned} is missing; train first, as README.md beside this says")
    try:
        base, _ = load_hf_model(options.base)
        tuned, _ = load_hf_model(options.tuned)
        tokenizer = Tokenizer.from_file(str(options.base / "tokenizer.json"))
        documents = read_documents(options.data, tokenizer, max_tokens=options.max_tokens)
        report = build_report(base.eval(), tuned.eval(), tokenizer, documents)
    except InputError as error:
        raise SystemExit(str(error)) from None
    print_report(report)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2) + "\n"
    (options.out / "report.json").write_text(text, encoding="utf-8", newline="\n")
    draw_load(report["load"], options.out / "expert_load.png")
    print(f"\nwrote {', '.join(str(path) for path in sorted(options.out.iterdir()))}")


if __name__ == "__main__":
    main()
