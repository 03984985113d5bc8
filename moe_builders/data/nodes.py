"""What a config says of each data set besides its component: packing, weight, streaming."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError

from moe_builders.data.repairs import broken_line, builder_of, unknown_argument
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError
from moe_builders.instantiate import component_of, first_line, instantiate, signature_of

_PACKING = ("packed", "split_across_pack")
OURS = (*_PACKING, "weight")  # taken out before the component is built


@dataclass(frozen=True)
class SetNode:
    """One data set of a config.

    Attributes:
        component: its node without what is ours.
        path: where in the config it stands, for messages.
        packed: several documents a row.
        split: a packed document goes on in the next row wherever one ends.
        weight: its share of a mixture; None: no mixture.
        streaming: read on the way, never as a whole.
    """

    component: dict[str, Any]
    path: str
    packed: bool
    split: bool
    weight: float | None
    streaming: bool

    @property
    def files(self) -> str:
        """What it is read from, for messages; perhaps nothing."""
        return str(self.component.get("data_files", ""))


def read_nodes(node: Any, *, path: str, validation: bool = False) -> list[SetNode]:
    """The sets of a config's component, or list of components.

    Left out, ``packed`` and ``split_across_pack`` are what the builder's signature says
    (text_completion_dataset: split), else false.

    Args:
        node: as the config has it.
        path: where.
        validation: each sample is to be taken exactly once, so there is no mixing.

    Raises:
        InputError: no such node, sets that disagree about packing, or weights that are no
            positive numbers or not everywhere.
    """
    nodes = node if isinstance(node, list) else [node]
    if not nodes or not all(isinstance(n, Mapping) for n in nodes):
        raise InputError(f"{path} must be a component ({{_component_: ...}}) or a list of them")
    paths = [path] if len(nodes) == 1 else [f"{path}[{i}]" for i in range(len(nodes))]
    sets = [_read(n, p) for n, p in zip(nodes, paths, strict=True)]
    if len({(one.packed, one.split) for one in sets}) > 1:
        raise InputError(f"{path}: all data sets of a list must agree on packed, split_across_pack")
    without = [one.path for one in sets if one.weight is None]
    if validation and len(without) < len(sets):
        raise InputError(
            f"{path} has a weight, but validation takes every sample exactly once: leave it out"
        )
    if without and len(without) < len(sets):
        raise InputError(
            f"{without[0]} has no weight, but others of the list have: give one to all"
        )
    if len(sets) > 1 and without and any(s.streaming for s in sets) and not validation:
        raise InputError(
            f"{path}: a list with a stream in it needs a weight in each of its sets (or name all "
            "files in one data_files)"
        )
    return sets


def _read(node: Mapping[str, Any], path: str) -> SetNode:
    packed, split = (_switch(node, key, path) for key in _PACKING)
    streaming = node.get("streaming", False)
    if not isinstance(streaming, bool):
        raise InputError(f"{path}.streaming is {streaming!r}, but must be true or false")
    weight = node.get("weight")
    if "weight" in node and not _above_zero(weight):
        raise InputError(f"{path}.weight is {weight!r}, but must be a number above 0")
    component = {key: value for key, value in node.items() if key not in OURS}
    return SetNode(component, path, packed, packed and split, weight, streaming)


def _above_zero(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _switch(node: Mapping[str, Any], key: str, path: str) -> bool:
    signature = signature_of(component_of(node, path=path))
    known = {} if signature is None else signature.parameters
    value = node.get(key, known[key].default if key in known else False)
    if not isinstance(value, bool):
        raise InputError(f"{path}.{key} is {value!r}, but must be true or false")
    return value


def build_component(one: SetNode, tokenizer: HFTokenizer) -> Any:
    """The component of a set; None where its files hold nothing at all.

    Raises:
        InputError: it cannot be built, in one sentence.
    """
    _check_source(one)
    try:
        return instantiate(one.component, tokenizer, path=one.path)
    except StopIteration:  # what a file without a byte leads to in datasets' json builder
        return None
    except InputError as error:
        if "corresponds to no data" in str(error):  # and one without a line, or an empty slice
            return None
        raise _with_remedy(error, one) from error
    except ConnectionError as error:
        source = one.component.get("source")
        raise InputError(
            f"{one.path}.source is {source!r}, which is neither a folder here nor can it be "
            f"fetched from the hub: {first_line(error)}: download it where there is a network "
            f"(hf download {source} --repo-type dataset --local-dir FOLDER) and set source to the "
            "folder"
        ) from error
    except (DatasetsError, OSError, ValueError, TypeError, KeyError) as error:
        where = f" from {one.files}" if one.files else ""
        cause = unknown_argument(str(error), one.component)
        if cause is None and isinstance(error, DatasetsError):
            cause = broken_line(one.component)
        cause = cause or cause_of(error)
        raise InputError(f"{one.path} cannot be built{where}: {cause}") from error


def _check_source(one: SetNode) -> None:
    """A kind of file, or a file itself, where the name of datasets' reader must be."""
    source = one.component.get("source")
    kind = builder_of(source)
    if kind is None:
        return
    file = f" and data_files to {source}" if Path(str(source)).is_file() else ""
    raise InputError(
        f"{one.path}.source is {source!r}, but must be how to read the files (json, text, csv, "
        f"parquet), a folder or a name of the hub: set source to {kind}{file}"
    )


def no_samples(path: str, files: str) -> InputError:
    """The error of a set in which nothing is."""
    return InputError(f"{path} holds no samples{f' in {files}' if files else ''}")


def cause_of(error: BaseException) -> str:
    """What lies under an error of datasets, whose own says only that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _with_remedy(error: InputError, one: SetNode) -> InputError:
    split = str(one.component.get("split", ""))
    unknown = unknown_argument(str(error), one.component)
    if unknown is not None:
        return InputError(f"{one.path} cannot be built: {unknown}")
    if one.streaming and "Bad split" in str(error) and "[" in split:
        return InputError(
            f"{one.path}.split is {split!r}, but a stream has no length to take a part of: name "
            "the whole split, or set streaming to false"
        )
    if "unknown key" in str(error) and f"{one.path}.streaming" in str(error):
        return InputError(
            f"{one.path}.streaming is for builders that hand it on to datasets.load_dataset (such "
            "as torchtune.datasets.text_completion_dataset, chat_dataset, instruct_dataset), not "
            f"for {one.component['_component_']}"
        )
    return error
