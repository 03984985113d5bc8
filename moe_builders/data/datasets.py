"""A config's ``dataset`` as sized rows: torchtune's builders, checked at the start."""

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import ConcatDataset

from moe_builders.data.documents import is_torchtune, read_sample, roles_of
from moe_builders.data.nodes import SetNode, build_component, no_samples, read_nodes
from moe_builders.data.order import largest_remainder
from moe_builders.data.packing import Row
from moe_builders.data.rows import MixedDataset, PackedDataset, ShiftedDataset
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError
from moe_builders.losses import IGNORE_INDEX

Rows = PackedDataset | ShiftedDataset | MixedDataset

LOOKED_AT = 100  # rows in which at least one label must be


def build_dataset(
    node: Any,
    tokenizer: HFTokenizer,
    *,
    max_seq_len: int,
    long_samples: str = "truncate",
    path: str = "dataset",
    validation: bool = False,
    show: bool = False,
) -> Rows:
    """Build the rows of the data set (or list of them) that a config describes.

    Args:
        node: {"_component_": torchtune builder, ...}, or a list of them: one after the other, or
            mixed where each has a ``weight``. ``packed`` and ``split_across_pack`` are done by our
            own packing, which keeps documents apart for the routers too.
        tokenizer: the builder gets a copy that never cuts: what is too long is cut here.
        max_seq_len: longest row.
        long_samples: what happens to longer samples: "truncate", "split" or "refuse".
        path: where in the config, for messages.
        validation: every sample exactly once: weights are refused.
        show: draw a progress bar while rows are packed.

    Raises:
        InputError: missing file or column, no samples, nothing to train on, or sets that disagree
            about packing or weights.
    """
    sets = read_nodes(node, path=path, validation=validation)
    cutting: dict[str, Any] = {"max_seq_len": max_seq_len, "long_samples": long_samples}
    if len(sets) > 1 and sets[0].weight is not None:
        parts = [build_set(one, tokenizer, show=show, **cutting) for one in sets]
        mixed = MixedDataset(parts, [one.weight or 0 for one in sets])
        _check_shares(mixed, path)
        return mixed
    tokenizer = without_limit(tokenizer, max_seq_len)
    raw = [_build_one(one, tokenizer) for one in sets]
    samples = raw[0] if len(raw) == 1 else ConcatDataset(raw)
    rows = _rows_of(samples, sets[0], path=path, show=show, **cutting)
    check_labels(_all(rows), raw, path=path, max_seq_len=max_seq_len)
    return rows


def build_set(
    one: SetNode, tokenizer: HFTokenizer, *, max_seq_len: int, long_samples: str, show: bool
) -> PackedDataset | ShiftedDataset:
    """The rows of one set by itself; see ``build_dataset``."""
    samples = _build_one(one, without_limit(tokenizer, max_seq_len))
    rows = _rows_of(
        samples, one, path=one.path, max_seq_len=max_seq_len, long_samples=long_samples, show=show
    )
    if not len(rows):
        raise no_samples(one.path, one.files)
    check_labels(_all(rows), [samples], path=one.path, max_seq_len=max_seq_len)
    return rows


def _rows_of(samples: Any, one: SetNode, **options: Any) -> PackedDataset | ShiftedDataset:
    if one.packed:
        return PackedDataset(samples, split_across_pack=one.split, **options)
    return ShiftedDataset(samples, **options)


def _all(rows: PackedDataset | ShiftedDataset) -> Iterator[Row]:
    return (rows[i] for i in range(len(rows)))


def without_limit(tokenizer: HFTokenizer, max_seq_len: int) -> HFTokenizer:
    """A copy whose samples come whole, so that it is seen which are too long.

    Raises:
        InputError: the tokenizer has a smaller limit of its own, as in torchtune's configs.
    """
    own = getattr(tokenizer, "max_seq_len", None)
    if own is not None and own < max_seq_len:
        raise InputError(
            f"tokenizer.max_seq_len is {own}, but samples are cut at max_seq_len ({max_seq_len}): "
            "set max_seq_len to what you want, and leave the tokenizer's out"
        )
    tokenizer = copy.copy(tokenizer)
    tokenizer.max_seq_len = None
    return tokenizer


def check_labels(rows: Iterable[Row], raw: list[Any], *, path: str, max_seq_len: int) -> None:
    """Refuse data of which nothing would be trained on.

    Raises:
        InputError: no label in the first rows; the likely cause is named.
    """
    seen = 0
    for row in islice(rows, LOOKED_AT):
        if any(label != IGNORE_INDEX for label in list(row["labels"])):
            return
        seen += 1
    roles: set[str] = set()
    for dataset in filter(is_torchtune, raw):
        for sample in islice(iter(dataset._data), LOOKED_AT):
            roles |= roles_of(dataset, sample)
    if roles and "assistant" not in roles:
        cause = (
            f"nobody speaks as 'assistant' in these chats, only {', '.join(sorted(roles))}: rename "
            "the roles to system, user, assistant"
        )
    else:
        cause = f"every label is masked, or was cut off at max_seq_len ({max_seq_len})"
    raise InputError(f"{path}: no token of the first {seen} rows is trained on: {cause}")


def _check_shares(rows: MixedDataset, path: str) -> None:
    shares = largest_remainder(rows.weights, len(rows))
    for i, (part, share) in enumerate(zip(rows.parts, shares, strict=True)):
        if not share:
            raise InputError(
                f"{path}[{i}].weight ({rows.weights[i]}) gives it none of the {len(rows)} rows of "
                f"an epoch, though it has {len(part)}: raise the weight, or leave the set out"
            )


def _build_one(one: SetNode, tokenizer: HFTokenizer) -> Any:
    dataset = build_component(one, tokenizer)
    if dataset is None or len(dataset) == 0:
        raise no_samples(one.path, one.files)
    read_sample(dataset, 0, one.path)
    return dataset
