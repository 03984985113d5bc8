"""A config's ``dataset`` as samples for the loader: torchtune's builders, checked at the start."""

import copy
from collections.abc import Mapping
from typing import Any

from datasets.exceptions import DatasetsError
from torch.utils.data import ConcatDataset

from moe_builders.data.packing import PackedDataset, ShiftedDataset, read_sample
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, first_line, instantiate, signature_of
from moe_builders.losses import IGNORE_INDEX

_LOOKED_AT = 100  # rows in which at least one label must be
_PACKING = ("packed", "split_across_pack")


def build_dataset(
    node: Any,
    tokenizer: HFTokenizer,
    *,
    max_seq_len: int,
    path: str = "dataset",
    show: bool = False,
) -> PackedDataset | ShiftedDataset:
    """Build the data set (or the concatenation of a list of them) that a config describes.

    Args:
        node: {"_component_": torchtune builder, ...}; ``packed`` and ``split_across_pack`` are
            taken out and done by our own packing, which keeps documents apart for the routers too.
            Left out they are what the builder's signature says (text_completion_dataset: split),
            else false.
        tokenizer: the builder gets a copy with a max_seq_len of its own: samples are cut at
            max_seq_len unless they are split across rows.
        max_seq_len: longest row.
        path: where in the config, for messages.
        show: draw a progress bar while rows are packed.

    Raises:
        InputError: missing file or column, no samples, nothing to train on, or sets that disagree
            about packing.
    """
    nodes = node if isinstance(node, list) else [node]
    if not nodes or not all(isinstance(n, Mapping) for n in nodes):
        raise InputError(f"{path} must be a component ({{_component_: ...}}) or a list of them")
    paths = [path] if len(nodes) == 1 else [f"{path}[{i}]" for i in range(len(nodes))]
    packing = {_packing(n, path=p) for n, p in zip(nodes, paths, strict=True)}
    if len(packing) > 1:
        raise InputError(f"{path}: all data sets of a list must agree on packed, split_across_pack")
    packed, split = packing.pop()
    tokenizer = copy.copy(tokenizer)
    tokenizer.max_seq_len = None if split else max_seq_len
    parts = [_build_one(n, tokenizer, p) for n, p in zip(nodes, paths, strict=True)]
    dataset: Any = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    if packed:
        rows = PackedDataset(
            dataset, max_seq_len=max_seq_len, split_across_pack=split, path=path, show=show
        )
    else:
        rows = ShiftedDataset(dataset, max_seq_len=max_seq_len, path=path)
    looked_at = range(min(len(rows), _LOOKED_AT))
    if all(label == IGNORE_INDEX for i in looked_at for label in list(rows[i]["labels"])):
        raise InputError(
            f"{path}: no token of the first {len(looked_at)} rows is trained on: every label is "
            f"masked, or was cut off at max_seq_len ({max_seq_len})"
        )
    return rows


def _packing(node: Mapping[str, Any], *, path: str) -> tuple[bool, bool]:
    """(packed, split across rows) of one data set."""
    values = []
    signature = signature_of(component_of(node, path=path))
    known = {} if signature is None else signature.parameters
    for key in _PACKING:
        value = node.get(key, known[key].default if key in known else False)
        if not isinstance(value, bool):
            raise InputError(f"{path}.{key} is {value!r}, but must be true or false")
        values.append(value)
    packed, split = values
    return packed, packed and split


def _build_one(node: Mapping[str, Any], tokenizer: HFTokenizer, path: str) -> Any:
    dataset: Any = None
    size = 0
    plain = {key: value for key, value in node.items() if key not in _PACKING}
    try:
        dataset = instantiate(plain, tokenizer, path=path)
        size = len(dataset)
    except StopIteration:  # what a file without a byte leads to in datasets' json builder
        pass
    except InputError as error:
        if "corresponds to no data" not in str(error):  # and one without a line, or an empty slice
            raise
    except (DatasetsError, OSError, ValueError, TypeError, KeyError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # datasets' own errors say only that there was one
            cause = cause.__cause__
        where = f" from {node['data_files']}" if "data_files" in node else ""
        raise InputError(f"{path} cannot be built{where}: {first_line(cause)}") from error
    if size == 0:
        where = f" in {node['data_files']}" if "data_files" in node else ""
        raise InputError(f"{path} holds no samples{where}")
    read_sample(dataset, 0, path)
    return dataset
