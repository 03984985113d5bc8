"""A config's ``dataset`` as samples for the loader: torchtune's builders, checked at the start."""

from collections.abc import Mapping
from typing import Any

from datasets.exceptions import DatasetsError
from torch.utils.data import ConcatDataset

from moe_builders.data.packing import PackedDataset, ShiftedDataset
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError
from moe_builders.instantiate import instantiate


def build_dataset(
    node: Any, tokenizer: HFTokenizer, *, max_seq_len: int, path: str = "dataset"
) -> PackedDataset | ShiftedDataset:
    """Build the data set (or the concatenation of a list of them) that a config describes.

    Args:
        node: {"_component_": torchtune builder, ...}; ``packed`` and ``split_across_pack`` are
            taken out and done by our own packing, which keeps documents apart for the routers too.
        tokenizer: given to the builder; its max_seq_len is set here: samples are cut at
            max_seq_len unless they are split across rows.
        max_seq_len: longest row.
        path: where in the config, for messages.

    Raises:
        InputError: missing file or column, no samples, or sets that disagree about packing.
    """
    nodes = node if isinstance(node, list) else [node]
    if not nodes or not all(isinstance(n, Mapping) for n in nodes):
        raise InputError(f"{path} must be a component ({{_component_: ...}}) or a list of them")
    packing = [(bool(n.get("packed")), bool(n.get("split_across_pack", False))) for n in nodes]
    if len(set(packing)) > 1:
        raise InputError(f"{path}: all data sets of a list must agree on packed, "
                         "split_across_pack")  # fmt: skip
    packed, split = packing[0]
    tokenizer.max_seq_len = None if packed and split else max_seq_len
    parts = [_build_one(n, tokenizer, path if len(nodes) == 1 else f"{path}[{i}]")
             for i, n in enumerate(nodes)]  # fmt: skip
    dataset: Any = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    if packed:
        return PackedDataset(dataset, max_seq_len=max_seq_len, split_across_pack=split)
    return ShiftedDataset(dataset, max_seq_len=max_seq_len)


def _build_one(node: Mapping[str, Any], tokenizer: HFTokenizer, path: str) -> Any:
    plain = {k: v for k, v in node.items() if k not in ("packed", "split_across_pack")}
    try:
        dataset = instantiate(plain, tokenizer, path=path)
        size = len(dataset)
    except InputError:
        raise
    except (DatasetsError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be built: {_first_line(error)}") from error
    if size == 0:
        raise InputError(f"{path} holds no samples")
    try:
        sample = dataset[0]
    except (KeyError, IndexError) as error:
        columns = getattr(getattr(dataset, "_data", None), "column_names", None)
        there = f"; it has {', '.join(columns)}" if columns else ""
        raise InputError(f"{path} has no column {_first_line(error)}{there}") from error
    except ValueError as error:
        raise InputError(f"{path}: the first sample is not usable: {_first_line(error)}") from error
    if not {"tokens", "labels"} <= set(sample):
        raise InputError(f"{path}: samples must hold 'tokens' and 'labels', got {sorted(sample)}")
    return dataset


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
