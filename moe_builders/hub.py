"""Hugging Face folders in and out: a model comes in by its rows and leaves by the same rows."""

import functools
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_builders.checkpoint.folder import (
    INDEX_NAME,
    TensorSource,
    check_output_folder,
)
from moe_builders.checkpoint.quantized import open_tensors
from moe_builders.checkpoint.stream import (
    check_complete,
    load_pieces,
    materialize,
    model_shapes,
)
from moe_builders.checkpoint.taking import take_pieces
from moe_builders.checkpoint.writing import (
    MAX_FILE_BYTES,
    copy_other_files,
    publish,
    raise_alone,
    split_into_files,
    write_tensors,
)
from moe_builders.decoder import MoEDecoder
from moe_builders.errors import InputError
from moe_builders.hf_source import (
    HFSource,
    find_family,
    is_hf_folder,
    read_hf_source,
    unquantized_config,
)
from moe_builders.initialization import initial_value
from moe_builders.parallel.agree import raise_together
from moe_builders.pieces import Piece
from moe_builders.routing import storage_dtype
from moe_builders.weights import carried_names, make_plan

_TORCH_DTYPES = {  # by safetensors' names: what weights that can be trained are stored as
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


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
    plan = _checked_plan(model, source)
    on_disk: dict[str, torch.dtype] = {}
    for piece in plan:  # a stack of several dtypes is kept in one that holds them all
        found = _TORCH_DTYPES[source.tensors[piece.disk].dtype]
        on_disk[piece.ours] = torch.promote_types(on_disk.get(piece.ours, found), found)
    for name, parameter in model.named_parameters():
        own = on_disk[name] if dtype is None else storage_dtype(name, dtype)
        parameter.data = parameter.data.to(own)
    return model


def load_hf_weights(
    model: nn.Module,
    source: HFSource,
    *,
    device: torch.device | str = "cpu",
    show: bool = False,
) -> None:
    """Stream the folder into a model from ``build_hf_model``, sharded or not.

    Each process reads only the slices it holds; ``show``: with a progress bar.
    """
    plan = _checked_plan(model, source)
    materialize(model, device)
    load_pieces(model, plan, open_tensors(source.folder, source.config), show=show)


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
    model: nn.Module, path: str | Path, *, source: HFSource, rank: int = 0, size: int = 1
) -> None:
    """Write a model back in the layout, dtypes and files of its source.

    config.json, tokenizer and other small files are copied as they are; tensors the model has no
    place for are carried over. What was quantised is written as bf16, and config.json then says so.
    The folder appears under its name only when complete. Several processes write as many files at a
    time; each collects the tensors of its own file and no others.

    Args:
        model: sharded or not; with more than one process all must call.
        path: folder to write, the same for all processes; replaced if it is there.
        source: where the model came from.
        rank: this process, 0 … size-1.
        size: number of processes that hold the model and write it.

    Raises:
        InputError: the path is a file, the source itself or above it, the source folder is gone,
            or the model is not the source's; on every process, whichever found it.
    """
    agree = raise_together if size > 1 else raise_alone
    plan, problem = [], None
    try:
        _check_source_is_safe(path, source)
        plan = _checked_plan(model, source)
    except InputError as error:
        problem = error
    agree(problem)
    origin = Path(source.folder).resolve()
    modelled = {piece.disk for piece in plan}
    dtypes = {name: _TORCH_DTYPES[source.tensors[name].dtype] for name in modelled}
    take = take_pieces(model, plan, dtypes, rank=rank)

    @functools.cache  # looks at every file; most folders need none of it
    def stored() -> TensorSource:
        return open_tensors(origin, source.config)

    def tensors_of(names_by_process: Sequence[list[str]]) -> dict[str, torch.Tensor]:
        tensors = take([[n for n in names if n in modelled] for names in names_by_process])
        for name in names_by_process[rank]:
            if name not in modelled:
                whole = (slice(None),) * len(source.tensors[name].shape)
                tensors[name] = stored().read(name, whole)
        return tensors

    names_by_file: dict[str, list[str]] = defaultdict(list)
    for name, entry in source.tensors.items():
        names_by_file[entry.file].append(name)
    with publish(path, rank=rank, agree=agree) as folder:
        write_tensors(
            folder, names_by_file, tensors_of, with_index=source.has_index, rank=rank, size=size,
            agree=agree,
        )  # fmt: skip
        if rank == 0:
            _copy_the_rest(origin, folder, source)


def create_hf_model(
    path: str | Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    max_shard_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a randomly initialised model folder: config.json and fp32 safetensors, not quantised.

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
    plan = make_plan(family.weight_map, shapes)
    values = {
        name: initial_value(name, like, seed=seed) for name, like in model.state_dict().items()
    }
    model.load_state_dict(values, assign=True)
    on_disk = {piece.disk: 4 * prod(piece.shape) for piece in plan if not piece.copy}
    files = split_into_files(on_disk, max_shard_bytes)
    dtypes = dict.fromkeys(on_disk, torch.float32)
    for file in [path / INDEX_NAME, *path.glob("model*.safetensors")]:
        file.unlink(missing_ok=True)  # of an earlier model here
    write_tensors(
        path,
        files,
        take_pieces(model, plan, dtypes),
        with_index=len(files) > 1,
    )
    written = {name: value for name, value in config.items() if name != "quantization_config"}
    (path / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def carried_over(model: nn.Module, source: HFSource) -> list[str]:
    """The source's tensors that the model has no place for; an export carries them over."""
    planned = {piece.disk for piece in _checked_plan(model, source)}
    return [name for name in source.tensors if name not in planned]


def _check_source_is_safe(path: str | Path, source: HFSource) -> None:
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


def _copy_the_rest(origin: Path, folder: Path, source: HFSource) -> None:
    """What is not weights; of config.json and the index what still holds."""
    copy_other_files(origin, folder)
    if source.is_quantized:  # the export is not
        config = folder / "config.json"
        text = unquantized_config((origin / "config.json").read_bytes().decode())
        config.unlink()  # may have been copied with its write protection
        config.write_bytes(text.encode())
    elif source.has_index and (origin / INDEX_NAME).is_file():
        shutil.copy2(origin / INDEX_NAME, folder)  # same files, and metadata as it was


def _checked_plan(model: nn.Module, source: HFSource) -> list[Piece]:
    """The plan for a folder that fits the model, without the copies that it lacks."""
    rows, shapes = source.family.weight_map, model_shapes(model)
    try:
        plan = make_plan(rows, shapes)
    except ValueError as error:  # the source's own model always has a plan
        raise InputError(
            f"the model is not one of {source.folder}, a {source.family.model_type}: {error}"
        ) from error
    check_complete(plan, source.tensors, source.folder, carried_names(rows, shapes, source.tensors))
    plan = [piece for piece in plan if piece.disk in source.tensors]
    dtypes = {source.tensors[piece.disk].dtype for piece in plan} - set(_TORCH_DTYPES)
    if dtypes:
        raise InputError(
            f"{source.folder} holds weights of type {', '.join(sorted(dtypes))}, but only "
            f"{', '.join(_TORCH_DTYPES)} can be trained: get the unquantised release"
        )
    return plan
