"""What is behind an error of ``datasets``, looked for after it has happened: it says too little."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from moe_builders.instantiate import component_of, did_you_mean, signature_of

_BUILDERS = {
    "csv": "csv", "json": "json", "jsonl": "json", "ndjson": "json", "parquet": "parquet",
    "tsv": "csv", "txt": "text",
}  # fmt: skip
_UNKNOWN = re.compile(r"doesn't have a '(\w+)' key|unexpected keyword argument '(\w+)'")


def builder_of(source: Any) -> str | None:
    """The reader that a file, or the ending of files, needs; None: the source may be right."""
    if not isinstance(source, str) or Path(source).is_dir():
        return None
    if Path(source).is_file():
        return _BUILDERS.get(Path(source).suffix.lstrip("."))
    kind = _BUILDERS.get(source)
    return None if kind == source else kind


def unknown_argument(message: str, component: Mapping[str, Any]) -> str | None:
    """The sentence for an argument that a builder handed on, and that nobody knows."""
    found = _UNKNOWN.search(message)
    if found is None:
        return None
    signature = signature_of(component_of(component, path="dataset"))
    own = [] if signature is None else list(signature.parameters)
    known = [*own, *inspect.signature(datasets.load_dataset).parameters]
    name = found[1] or found[2]
    return f"there is no argument {name!r}{did_you_mean(name, known)}"


def broken_line(component: Mapping[str, Any]) -> str | None:
    """The first line of JSON-lines files here that is no JSON; None: no such line."""
    if component.get("source") != "json":
        return None
    for path in _files(component.get("data_files")):
        if not path.is_file() or _is_one_value(path):
            continue
        where = "" if isinstance(component["data_files"], str) else f" of {path}"
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    json.loads(line)
                except ValueError as error:
                    what = getattr(error, "msg", None) or error
                    return f"line {number}{where} is not JSON ({what}): mend it"
    return None


def _files(data_files: Any) -> Iterator[Path]:
    if isinstance(data_files, str):
        yield Path(data_files)
    elif isinstance(data_files, Mapping):
        for value in data_files.values():
            yield from _files(value)
    elif isinstance(data_files, list):
        for value in data_files:
            yield from _files(value)


def _is_one_value(path: Path) -> bool:
    """A list, or an object over several lines: its lines are no JSON by themselves."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"").strip()
    return first.startswith(b"[") or first == b"{"
