"""Models without a Hugging Face layout: safetensors under our own parameter names."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_builders.checkpoint.folder import TensorFolder
from moe_builders.checkpoint.stream import (
    check_complete,
    load_pieces,
    materialize,
    model_shapes,
)
from moe_builders.checkpoint.taking import take_pieces
from moe_builders.checkpoint.writing import (
    MAX_FILE_BYTES,
    publish,
    raise_alone,
    split_into_files,
    write_tensors,
)
from moe_builders.parallel.agree import raise_together
from moe_builders.weights import make_plan, own_rows

MARKER_NAME = "moe_builders.json"  # what makes a folder one of ours


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    component: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    rank: int = 0,
    size: int = 1,
) -> None:
    """Write a model's parameters and persistent buffers as they are.

    The files are dealt out to the processes; see ``write_tensors``.

    Args:
        model: sharded or not; with more than one process all must call.
        path: folder to write; replaced if it is there.
        component: how the model is built (its ``_component_`` and arguments), kept for the reader.
        router: the component that took the place of its routers, if one did.
        rank: this process, 0 … size-1.
        size: number of processes that hold the model and write it.
    """
    shapes, state = model_shapes(model), model.state_dict()
    plan = make_plan(own_rows(shapes), shapes)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    files = split_into_files(sizes, MAX_FILE_BYTES)
    agree = raise_together if size > 1 else raise_alone
    take = take_pieces(model, plan, dtypes, rank=rank)
    with publish(path, rank=rank, agree=agree) as folder:
        write_tensors(
            folder, files, take, with_index=len(files) > 1, rank=rank, size=size, agree=agree
        )
        if rank == 0:
            built = {"component": component} | ({} if router is None else {"router": router})
            text = json.dumps({"format": 1} | built, indent=2)
            (folder / MARKER_NAME).write_text(text + "\n")


def load_model(
    model: nn.Module,
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    show: bool = False,
) -> None:
    """Fill a model that was built on the meta device from a folder of ``save_model``.

    Args:
        model: sharded or not.
        path: the folder.
        device: where to.
        show: with a progress bar.

    Raises:
        InputError: the folder does not fit the model; all differences are listed.
    """
    folder = TensorFolder(path)
    shapes = model_shapes(model)
    plan = make_plan(own_rows(shapes), shapes)
    check_complete(plan, folder.entries, path)
    materialize(model, device)
    load_pieces(model, plan, folder, show=show)


def saved_router(path: str | Path) -> dict[str, Any] | None:
    """The router component that a folder of ours was saved with; None: the model's own."""
    return json.loads((Path(path) / MARKER_NAME).read_text()).get("router")


def is_own_folder(path: str | Path) -> bool:
    """Whether ``save_model`` wrote this folder."""
    return (Path(path) / MARKER_NAME).is_file()
