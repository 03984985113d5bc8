"""Show what a config trains on, before it does: decoded rows with the trained-on part marked.

    python -m moe_builders.data.preview --config NAME [key=value ...] [--rows 3] [--validation]

No model is loaded. Rows come as the first steps take them.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from moe_builders.data.batch import Batch
from moe_builders.data.build import build_loader
from moe_builders.data.loader import Batching
from moe_builders.data.tokenizer import load_tokenizer
from moe_builders.errors import InputError
from moe_builders.losses import IGNORE_INDEX
from moe_builders.parallel.launch import launch, wants_color
from moe_builders.training.config import RecipeConfig, parse_command_line

_GREEN, _FAINT, _PLAIN = "\033[32m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class Preview:
    """What to show.

    Attributes:
        config: of the recipe.
        rows: how many of them.
        validation: dataset_val instead of dataset.
        color: mark the trained-on part by colour; False: by [[ and ]].
    """

    config: RecipeConfig
    rows: int
    validation: bool
    color: bool


def preview(wanted: Preview) -> None:
    """Write the first rows to standard output, and what they add up to.

    Raises:
        InputError: see ``build_loader``.
    """
    config, path = wanted.config, "dataset_val" if wanted.validation else "dataset"
    node = getattr(config, path)
    if node is None:
        raise InputError(f"the config has no {path} to show")
    tokenizer = load_tokenizer(config.tokenizer, config.base_model)
    loader = build_loader(
        node, tokenizer,
        Batching(batch_size=1, max_seq_len=config.max_seq_len, pad_id=tokenizer.pad_id),
        seed=config.seed, shuffle=config.shuffle, long_samples=config.long_samples,
        shuffle_window=config.shuffle_window, path=path, validation=wanted.validation,
    )  # fmt: skip
    batches = loader if wanted.validation else (step[0] for step in loader.steps(epochs=1))
    totals = dict.fromkeys(("rows", "real", "labels", "cut", "lost"), 0)
    for number, batch in enumerate(islice(batches, wanted.rows)):
        for line in row_lines(batch, tokenizer, number, color=wanted.color):
            sys.stdout.write(line + "\n")
        counts = (1, batch.num_real, batch.num_labels, batch.num_cut, batch.num_lost)
        totals = {k: v + n for (k, v), n in zip(totals.items(), counts, strict=True)}
    share = 100 * totals["labels"] / max(totals["real"], 1)
    sys.stdout.write(
        f"{totals['rows']} rows: {totals['real']} tokens, {totals['labels']} of them trained on "
        f"({share:.0f} %); {totals['cut']} samples longer than max_seq_len "
        f"({config.max_seq_len}), {totals['lost']} tokens left out\n"
    )
    for note in loader.notes:
        sys.stdout.write(f"whole {path}: {note}\n")


def row_lines(batch: Batch, tokenizer: Any, number: int, *, color: bool) -> Iterator[str]:
    """Lines that show a batch of one row.

    Args:
        batch: [1, s].
        tokenizer: with torchtune's ``decode``; without, ids are shown.
        number: of the row, for its header.
        color: see ``Preview``.
    """
    real = batch.num_real
    documents = batch.sequence_ids[0, :real].tolist()
    lengths = [len(list(group)) for _, group in groupby(documents)]
    tokens, labels = batch.tokens[0, :real].tolist(), batch.labels[0, :real].tolist()
    cut = f", {batch.num_lost} more left out" if batch.num_lost else ""
    yield _faint(f"=== row {number}: {real} tokens, {batch.num_labels} trained on, "
                 f"{len(lengths)} documents{cut}", color)  # fmt: skip
    start = 0
    for which, length in enumerate(lengths):
        own = slice(start, start + length)
        if len(lengths) > 1:
            yield _faint(f"--- document {which}: {length} tokens", color)
        yield _marked(tokens[own], labels[own], tokenizer, color=color)
        start += length


def _marked(tokens: Sequence[int], labels: Sequence[int], tokenizer: Any, *, color: bool) -> str:
    """A document's text; a token is trained on where the one before it has a label."""
    trained = [False, *(label != IGNORE_INDEX for label in labels[:-1])]
    before, after = (_GREEN, _PLAIN) if color else ("[[", "]]")
    text, shown, at = _decode(tokenizer, tokens), "", 0
    for is_trained, group in groupby(range(len(tokens)), key=trained.__getitem__):
        end = max(group) + 1
        # a piece by itself could decode to something else (a space at its start, half a letter)
        until = len(text) if end == len(tokens) else len(_decode(tokenizer, tokens[:end]))
        piece = text[at:until].replace("\033", "\\x1b")
        shown += before + piece + after if is_trained else piece
        at = until
    return shown


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    if not hasattr(tokenizer, "decode"):
        return "".join(f"{token} " for token in tokens)
    try:
        return tokenizer.decode(tokens, skip_special_tokens=False)
    except TypeError:  # one of a user's own need not know the word
        return tokenizer.decode(tokens)


def _faint(line: str, color: bool) -> str:
    return f"{_FAINT}{line}{_PLAIN}" if color else line


def parse(argv: Sequence[str] | None = None) -> Preview:
    """The command line; what is not of the preview is the recipe's.

    Raises:
        InputError: see ``parse_command_line``; fewer than 1 row.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moe_builders.data.preview", allow_abbrev=False,
        usage="%(prog)s --config NAME [key=value ...] [--rows 3] [--validation]",
        description="Show the rows that a config trains on; the recipe's arguments are the same.",
    )  # fmt: skip
    parser.add_argument("--rows", default="3", help="how many")
    parser.add_argument("--validation", action="store_true", help="dataset_val's rows")
    known, rest = parser.parse_known_args(argv)
    if not known.rows.isdecimal() or int(known.rows) < 1:
        raise InputError(f"--rows is {known.rows!r}, but must be a number of at least 1")
    config = parse_command_line(rest)
    return Preview(config, int(known.rows), known.validation, wants_color(sys.stdout))


if __name__ == "__main__":
    sys.exit(launch(preview, parse))
