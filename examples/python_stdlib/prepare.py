"""Make data, tokenizer, a random base model and n-gram baselines from Python's own library.

    python examples/python_stdlib/prepare.py --out out/python_stdlib

Needs no network: the text is the source of the standard library of the Python that runs this.
"""

import argparse
import hashlib
import json
import platform
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moe_builders.hub import create_hf_model

Tokens = Sequence[Tensor]  # one [n] of ids a document
Document = dict[str, str]  # {"path": relative to the library, "text": ...}

EOS, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Not the library itself, or not written by hand: tests would be most of the text, code pages and
# topics.py are generated tables, and _sysconfigdata, config-* and sitecustomize differ by machine.
SKIPPED_PARTS = frozenset({
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "turtledemo",
    "pydoc_data", "encodings", "sitecustomize.py", "usercustomize.py",
})  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELD_OUT_PERCENT = 5
MANIFEST = "manifest.json"


def read_library(root: Path) -> list[Document]:
    """Every module of a library in the order of its path, without empty and non-utf-8 files."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    documents = []
    for name in sorted(paths):
        parts = name.split("/")
        if SKIPPED_PARTS.intersection(parts) or name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = paths[name].read_text(encoding="utf-8")  # newlines become \n on any system
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append({"text": text, "path": name})
    if not documents:  # some installations keep their library in a zip file
        raise SystemExit(
            f"no Python source in {root}: run this with a Python that has its library as files"
        )
    return documents


def is_held_out(path: str) -> bool:
    """The split, by a hash of the path alone: the same file, the same side, on any machine."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def first_bytes(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """The first documents that fit into max_bytes; always one, even if it does not fit."""
    taken, size = [], 0
    for document in documents:
        size += len(document["text"].encode())
        if taken and size > max_bytes:
            break
        taken.append(document)
    return taken


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any text survives a round trip.

    Raises:
        SystemExit: a vocabulary that cannot hold the bytes and the special tokens.
    """
    special = [EOS, PAD, IM_START, IM_END]
    if vocab_size < 256 + len(special):
        raise SystemExit(f"--vocab-size is {vocab_size}, but {256 + len(special)} is the least")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[Tensor]:
    """Each document's token ids with the end-of-text token behind, [n] int64."""
    encodings = tokenizer.encode_batch_fast([document["text"] for document in documents])
    eos = tokenizer.token_to_id(EOS)
    return [torch.tensor([*encoding.ids, eos]) for encoding in encodings]


def ngram_nats(train: Tokens, held_out: Tokens, *, vocab_size: int) -> list[dict[str, float]]:
    """Negative log-likelihood of each held-out document under a unigram and a bigram table.

    The first token of a document is not predicted, here as in a language model.

    * unigram: add-one smoothed counts, p1(w) = (c(w) + 1) / (N + V);
    * bigram: Witten-Bell interpolation, p2(w|v) = (c(v w) + T(v) · p1(w)) / (c(v) + T(v)) with T(v)
      the number of different tokens seen after v; p1 after a token never seen. It takes its
      mixing weight from the train counts, so nothing is fitted on held-out text.
    """
    before, after = _neighbours(train)
    unigram = (torch.bincount(after, minlength=vocab_size).double() + 1) / (len(after) + vocab_size)
    # counts of pairs as a sorted list: a table of V² would not fit for a large vocabulary
    pairs, counts = torch.unique(before * vocab_size + after, return_counts=True)
    followers = torch.bincount(before, minlength=vocab_size)  # [v], c(v)
    kinds = torch.bincount(pairs // vocab_size, minlength=vocab_size)  # [v], T(v)

    before, after = _neighbours(held_out)
    wanted = before * vocab_size + after
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    count = torch.where(pairs[place] == wanted, counts[place], 0)
    p1 = unigram[after]
    p2 = (count + kinds[before] * p1) / (followers[before] + kinds[before])
    p2 = torch.where(followers[before] > 0, p2, p1)
    lengths = [len(document) - 1 for document in held_out]
    parts = zip(p1.log().split(lengths), p2.log().split(lengths), strict=True)
    return [{"unigram_nats": -float(a.sum()), "bigram_nats": -float(b.sum())} for a, b in parts]


def _neighbours(documents: Tokens) -> tuple[Tensor, Tensor]:
    """All pairs of neighbouring tokens within documents: the first ones, the second ones."""
    return (
        torch.cat([document[:-1] for document in documents]),
        torch.cat([document[1:] for document in documents]),
    )


def ngram_report(
    train: Tokens, held_out: Tokens, documents: Sequence[Document], *, vocab_size: int
) -> dict[str, Any]:
    """What ngrams.json holds; by document too, so that a part of the text can be compared."""
    nats_of = ngram_nats(train, held_out, vocab_size=vocab_size)
    rows: list[dict[str, Any]] = []
    for document, ids, nats in zip(documents, held_out, nats_of, strict=True):
        size = len(document["text"].encode())
        rows.append({"path": document["path"], "tokens": len(ids) - 1, "bytes": size, **nats})
    tokens, size = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    losses = {}
    for name in ("unigram", "bigram"):
        nats = sum(row[f"{name}_nats"] for row in rows)
        losses[name] = {"nats_per_token": nats / tokens, "nats_per_byte": nats / size}
    return {"tokens": tokens, "bytes": size, **losses, "documents": rows}


def base_config(*, vocab_size: int) -> dict[str, Any]:
    """config.json of a small Qwen3-MoE in the spelling of the released files.

    7.6 M parameters at 4096 tokens, of which 4.1 M work on each token.
    """
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "torch_dtype": "float32", "vocab_size": vocab_size, "max_position_embeddings": 2048,
        "hidden_size": 256, "num_hidden_layers": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
        "attention_bias": False, "attention_dropout": 0.0,
        "rope_theta": 10000.0, "rope_scaling": None,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
        "norm_topk_prob": True, "output_router_logits": False, "router_aux_loss_coef": 0.001,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
        "intermediate_size": 768,  # of dense layers; there are none
        "sliding_window": None, "use_sliding_window": False,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
        "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
    }  # fmt: skip


def write_base(folder: Path, tokenizer: Tokenizer, *, vocab_size: int, seed: int) -> None:
    """A model folder as the hub has them: tokenizer, generation settings, config, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = base_config(vocab_size=vocab_size)
    special_ids = [tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)]
    assert special_ids == [config["eos_token_id"], config["pad_token_id"]]
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": config["max_position_embeddings"],
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })  # fmt: skip
    _write_json(folder / "generation_config.json", {
        "do_sample": True, "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"], "temperature": 0.7, "top_k": 20,
    })  # fmt: skip
    create_hf_model(folder, config, seed=seed)


def is_intact(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether an earlier run with the same arguments finished and its files are unchanged."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return manifest["arguments"] == arguments and all(
            _digest(out / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def prepare(
    out: Path, *, vocab_size: int = 4096, seed: int = 0, max_bytes: int | None = None
) -> bool:
    """Write everything into ``out``; see the module's docstring.

    Returns:
        False if it was all there already.
    """
    arguments = {
        "vocab_size": vocab_size, "seed": seed, "max_bytes": max_bytes,
        "python": platform.python_version(), "script": _digest(Path(__file__)),
    }  # fmt: skip
    if is_intact(out, arguments):
        print(f"{out} is complete already, nothing to do")
        return False
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # written last: a broken run is never taken for done

    library = read_library(Path(sysconfig.get_path("stdlib")))
    train = [document for document in library if not is_held_out(document["path"])]
    held_out = [document for document in library if is_held_out(document["path"])]
    if max_bytes is not None:
        train = first_bytes(train, max_bytes)
        held_out = first_bytes(held_out, max_bytes * HELD_OUT_PERCENT // 100)
    for name, documents in (("train.jsonl", train), ("heldout.jsonl", held_out)):
        lines = (json.dumps(document) + "\n" for document in documents)
        (out / name).write_text("".join(lines), encoding="utf-8", newline="\n")
        size = sum(len(document["text"].encode()) for document in documents)
        print(f"{out / name}: {len(documents)} modules, {size / 1e6:.2f} MB")

    tokenizer = train_tokenizer((d["text"] for d in train), vocab_size=vocab_size)
    write_base(out / "base", tokenizer, vocab_size=vocab_size, seed=seed)
    print(f"{out / 'base'}: random Qwen3-MoE, tokenizer with {tokenizer.get_vocab_size()} tokens")

    ngrams = ngram_report(
        encode(tokenizer, train), encode(tokenizer, held_out), held_out, vocab_size=vocab_size
    )
    _write_json(out / "ngrams.json", ngrams)
    unigram, bigram = (ngrams[name]["nats_per_token"] for name in ("unigram", "bigram"))
    print(
        f"{out / 'ngrams.json'}: {ngrams['tokens']} held-out tokens, "
        f"unigram {unigram:.3f} nats/token, bigram {bigram:.3f}"
    )
    files = [out / name for name in ("train.jsonl", "heldout.jsonl", "ngrams.json")]
    files += sorted((out / "base").iterdir())
    digests = {path.relative_to(out).as_posix(): _digest(path) for path in files}
    _write_json(out / MANIFEST, {"arguments": arguments, "files": digests})
    print(f"done in {time.perf_counter() - start:.1f} s")
    return True


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the base model's weights")
    parser.add_argument("--max-bytes", type=int, help="stop reading early, for quick tests")
    options = vars(parser.parse_args())
    prepare(options.pop("out"), **options)


if __name__ == "__main__":
    main()
