"""Hugging Face folders in and out: a model comes in by its rows and leaves by the same rows."""

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from moe_builders.checkpoint.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    Entry,
    TensorFolder,
    check_output_folder,
    copy_other_files,
    publish,
    write_tensors,
)
from moe_builders.checkpoint.stream import (
    check_complete,
    load_pieces,
    materialize,
    model_shapes,
    take_pieces,
)
from moe_builders.decoder import MoEDecoder, initial_value
from moe_builders.errors import InputError
from moe_builders.families import BY_MODEL_TYPE
from moe_builders.parallel.sharding import raise_together
from moe_builders.routing import storage_dtype
from moe_builders.weights import Piece, make_plan, passes_through

_TORCH_DTYPES = {  # by safetensors' names: what weights that can be trained are stored as
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class HFSource:
    """Where a model came from, and all that is needed to write it back the same way.

    Attributes:
        folder: its path; configuration and tokenizer files are copied from there on export.
        config: config.json.
        tensors: every tensor on disk: file, dtype, shape.
        has_index: sharded with an index, or a single file.
    """

    folder: str
    config: dict[str, Any]
    tensors: dict[str, Entry]
    has_index: bool

    @property
    def family(self) -> ModuleType:
        """The family module of config.json's model_type."""
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
        InputError: not such a folder, an unknown architecture, or a damaged file.
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
    find_family(config, str(path))
    folder = TensorFolder(path)
    return HFSource(str(path.absolute()), config, folder.entries, folder.has_index)


def find_family(config: Mapping[str, Any], where: str) -> ModuleType:
    """The family module of a config.json.

    Raises:
        InputError: a model_type without a family here; the known ones are listed.
    """
    model_type = config.get("model_type")
    if model_type not in BY_MODEL_TYPE:
        raise InputError(
            f"{where} holds a model of type {model_type!r}, but supported are: "
            f"{', '.join(sorted(BY_MODEL_TYPE))}"
        )
    return BY_MODEL_TYPE[model_type]


def build_hf_model(source: HFSource, *, dtype: torch.dtype | None = None) -> MoEDecoder:
    """The source's model on the meta device, checked against the folder's tensors.

    Args:
        source: from ``read_hf_source``.
        dtype: storage of all parameters (routers: fp32 or wider); None: each as on disk.

    Raises:
        InputError: the folder's tensors are not the model's; all differences are listed.
    """
    with torch.device("meta"):
        try:
            model = source.family.build(source.config)
        except InputError as error:
            raise InputError(f"{source.folder}/config.json: {error}") from error
    plan = make_plan(source.family.WEIGHT_MAP, model_shapes(model))
    _check_source(source, plan)
    on_disk: dict[str, torch.dtype] = {}
    for piece in plan:  # a stack of several dtypes is kept in one that holds them all
        found = _TORCH_DTYPES[source.tensors[piece.disk].dtype]
        on_disk[piece.ours] = torch.promote_types(on_disk.get(piece.ours, found), found)
    for name, parameter in model.named_parameters():
        own = on_disk[name] if dtype is None else storage_dtype(name, dtype)
        parameter.data = parameter.data.to(own)
    return model


def load_hf_weights(
    model: nn.Module, source: HFSource, *, device: torch.device | str = "cpu"
) -> None:
    """Stream the folder into a model from ``build_hf_model``, sharded or not.

    Each process reads only the slices it holds.
    """
    plan = make_plan(source.family.WEIGHT_MAP, model_shapes(model))
    materialize(model, device)
    load_pieces(model, plan, TensorFolder(source.folder))


def load_hf_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[MoEDecoder, HFSource]:
    """A Hugging Face folder as a model of ours.

    Args:
        path: folder with config.json and safetensors.
        dtype: storage of all parameters (routers: fp32 or wider); None: each as on disk.
        device: where to.

    Raises:
        InputError: see ``read_hf_source`` and ``build_hf_model``.
    """
    source = read_hf_source(path)
    model = build_hf_model(source, dtype=dtype)
    load_hf_weights(model, source, device=device)
    return model, source


def save_hf_model(
    model: nn.Module, path: str | Path, *, source: HFSource, write: bool = True
) -> None:
    """Write a model back in the layout, dtypes and files of its source.

    config.json, tokenizer and other small files are copied as they are; tensors the model has no
    place for are carried over. The folder appears under its name only when complete.

    Args:
        model: sharded or not; with more than one process all must call.
        path: folder to write; replaced if it is there.
        source: where the model came from.
        write: True on the one process that writes.

    Raises:
        InputError: the path is a file, the source itself or above it, the source folder is gone,
            or the model is not the source's.
    """
    origin = Path(source.folder)
    if not is_hf_folder(origin):
        raise InputError(
            f"{origin}, which this model came from, is gone; its config and tokenizer files are "
            "needed for the export: put it back"
        )
    target, origin = Path(path).resolve(), origin.resolve()
    if target in (origin, *origin.parents):
        raise InputError(
            f"writing {target} would replace the model's own source {origin}: "
            "choose another output folder"
        )
    plan = make_plan(source.family.WEIGHT_MAP, model_shapes(model))
    _check_source(source, plan)
    modelled = {piece.disk for piece in plan}
    dtypes = {name: _TORCH_DTYPES[source.tensors[name].dtype] for name in modelled}
    take = take_pieces(model, plan, dtypes, keep=write)

    def tensors_of(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = take([name for name in names if name in modelled])
        carried = [name for name in names if name not in modelled] if write else []
        folder = TensorFolder(origin) if carried else None
        for name in carried:
            assert folder is not None
            tensors[name] = folder.read(name, (slice(None),) * len(source.tensors[name].shape))
        return tensors

    names_by_file: dict[str, list[str]] = defaultdict(list)
    for name, entry in source.tensors.items():
        names_by_file[entry.file].append(name)
    with publish(path, write=write, agree=raise_together) as folder:
        write_tensors(
            folder, names_by_file, tensors_of, with_index=source.has_index, write=write,
            agree=raise_together,
        )  # fmt: skip
        if write:
            copy_other_files(origin, folder)
            if source.has_index and (origin / INDEX_NAME).is_file():
                shutil.copy2(origin / INDEX_NAME, folder)  # same files, and metadata as it was


def create_hf_model(
    path: str | Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a randomly initialised model folder: config.json and fp32 safetensors.

    Files that are already there (a tokenizer) are left alone.

    Args:
        path: folder, made if needed.
        config: config.json of a supported model type.
        seed: same seed, same weights.
        max_shard_bytes: larger models are written as shards with an index.
    """
    path, family = Path(path), find_family(config, "the config")
    check_output_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = family.build(config)
    shapes = model_shapes(model)
    plan = make_plan(family.WEIGHT_MAP, shapes)
    values = {
        name: initial_value(name, like, seed=seed) for name, like in model.state_dict().items()
    }
    model.load_state_dict(values, assign=True)
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for piece in plan:
        size = 4 * torch.Size(piece.shape).numel()
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(piece.disk)
        room -= size
    total = len(shards)
    files = {
        SINGLE_NAME if total == 1 else f"model-{n:05d}-of-{total:05d}.safetensors": names
        for n, names in enumerate(shards, start=1)
    }
    dtypes = {piece.disk: torch.float32 for piece in plan}
    for file in [path / INDEX_NAME, *path.glob("model*.safetensors")]:
        file.unlink(missing_ok=True)  # of an earlier model here
    write_tensors(
        path, files, take_pieces(model, plan, dtypes, keep=True), with_index=total > 1, write=True
    )
    (path / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def _check_source(source: HFSource, plan: list[Piece]) -> None:
    rows = source.family.WEIGHT_MAP
    check_complete(plan, source.tensors, source.folder, lambda name: passes_through(rows, name))
    dtypes = {source.tensors[piece.disk].dtype for piece in plan} - set(_TORCH_DTYPES)
    if dtypes:
        raise InputError(
            f"{source.folder} holds weights of type {', '.join(sorted(dtypes))}, but only "
            f"{', '.join(_TORCH_DTYPES)} can be trained: get the unquantised release"
        )
