"""Where a Hugging Face model came from: its folder, config.json and tensors, as a value to keep."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_builders.checkpoint.folder import Entry
from moe_builders.checkpoint.quantized import open_tensors
from moe_builders.errors import InputError
from moe_builders.families import BY_MODEL_TYPE
from moe_builders.family import Family


@dataclass(frozen=True)
class HFSource:
    """Where a model came from, and all that is needed to write it back the same way.

    Attributes:
        folder: its path; configuration and tokenizer files are copied from there on export.
        config: config.json.
        tensors: every tensor on disk: file, dtype, shape; a quantised weight as the bf16 one
            that it is read and exported as.
        has_index: sharded with an index, or a single file.
    """

    folder: str
    config: dict[str, Any]
    tensors: dict[str, Entry]
    has_index: bool

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are dequantised as they are read."""
        return self.config.get("quantization_config") is not None

    @property
    def family(self) -> Family:
        """The family of config.json's model_type."""
        return find_family(self.config, self.folder)

    def to_json(self) -> str:
        """As text, to be kept beside a training checkpoint."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "HFSource":
        """The inverse of ``to_json``."""
        fields = json.loads(text)
        fields["tensors"] = {
            name: Entry(e["file"], e["dtype"], tuple(e["shape"]))
            for name, e in fields["tensors"].items()
        }
        return HFSource(**fields)


def is_hf_folder(path: str | Path) -> bool:
    """Whether the path is a folder with a config.json."""
    return (Path(path) / "config.json").is_file()


def read_hf_source(path: str | Path) -> HFSource:
    """Look at a folder's config.json and safetensors headers; no weights are read.

    Raises:
        InputError: not such a folder, an unknown architecture or quantisation, or a damaged file.
    """
    config = read_hf_config(path)
    path = Path(path)
    find_family(config, str(path))
    folder = open_tensors(path, config)
    return HFSource(str(path.absolute()), config, folder.entries, folder.has_index)


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """A folder's config.json; nothing else need be there.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = Path(path)
    if not is_hf_folder(path):
        raise InputError(f"{path} is not a Hugging Face model folder: it has no config.json")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise InputError(f"{path / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.json'} is not a JSON object, but {config!r}")
    return config


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        InputError: a model_type without a family here; the known ones are listed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        raise InputError(
            f"{where} holds a model of type {model_type!r}, but supported are: "
            f"{', '.join(sorted(BY_MODEL_TYPE))}"
        )
    return BY_MODEL_TYPE[model_type]


def unquantized_config(text: str) -> str:
    """A quantised folder's config.json for its bf16 export.

    ``quantization_config`` is cut out and ``dtype`` or ``torch_dtype`` is bfloat16; every other
    character stays.
    """
    for name in ("dtype", "torch_dtype"):
        if (found := _members(text).get(name)) is not None:
            _, start, end = found
            text = f'{text[:start]}"bfloat16"{text[end:]}'
    members = _members(text)
    if "quantization_config" not in members:
        return text
    names = list(members)
    number = names.index("quantization_config")
    start, _, end = members["quantization_config"]
    if number:  # with the comma before it
        start = members[names[number - 1]][2]
    elif len(names) > 1:  # with the comma behind it
        end = members[names[1]][0]
    return text[:start] + text[end:]


def _members(text: str) -> dict[str, tuple[int, int, int]]:
    """Of an object in JSON: where each name starts, where its value starts, and where it ends."""
    decoder, found = json.JSONDecoder(), {}

    def skip(place: int, marks: str) -> int:
        while text[place] in marks:
            place += 1
        return place

    place = skip(text.index("{") + 1, " \t\r\n")
    while text[place] != "}":
        name, after = decoder.raw_decode(text, place)
        value = skip(after, " \t\r\n:")
        _, end = decoder.raw_decode(text, value)
        found[name] = (place, value, end)
        place = skip(end, " \t\r\n,")
    return found
