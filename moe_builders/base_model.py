"""Where training starts: a Hugging Face folder, a folder of our own, or random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_builders.checkpoint.own import is_own_folder, load_model, save_model
from moe_builders.decoder import MoEDecoder, initialize
from moe_builders.errors import InputError
from moe_builders.hub import (
    HFSource,
    build_hf_model,
    load_hf_weights,
    read_hf_source,
    save_hf_model,
)
from moe_builders.instantiate import instantiate


@dataclass(frozen=True)
class BaseModel:
    """A model before it is filled, with what is needed to fill it and to write it back.

    Attributes:
        model: on the meta device while it waits for a folder's weights; else real.
        folder: where its weights lie; None: it has its random ones already.
        source: the folder's layout, if it is a Hugging Face folder.
        component: how it was built, if not from a config.json.
    """

    model: MoEDecoder
    folder: str | None
    source: HFSource | None
    component: Mapping[str, Any] | None

    def fill(self, device: torch.device) -> MoEDecoder:
        """Stream the weights in, sharded or not; each process reads its own slices."""
        if self.source is not None:
            load_hf_weights(self.model, self.source, device=device)
        elif self.folder is not None:
            load_model(self.model, self.folder, device=device)
        return self.model

    def save(self, path: str | Path, *, write: bool) -> None:
        """Write the model back in its HF layout, or under our own names; all processes call."""
        if self.source is not None:
            save_hf_model(self.model, path, source=self.source, write=write)
        else:
            component = dict(self.component) if self.component is not None else None
            save_model(self.model, path, component=component, write=write)


def open_base_model(
    folder: str | None,
    component: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    init_std: float | None,
) -> BaseModel:
    """Build the model that a config asks for; weights come with ``BaseModel.fill``.

    Args:
        folder: a Hugging Face folder, one that ``BaseModel.save`` wrote, or None.
        component: how to build the model; None: as the Hugging Face folder's config.json says.
        dtype: storage of all parameters.
        device: where a model with random weights is moved.
        seed: of random weights.
        init_std: of random matrices; None: as the modules drew them.

    Raises:
        InputError: neither folder nor component, or both where one decides.
    """
    if folder is not None and not is_own_folder(folder):
        source = read_hf_source(folder)
        if component is not None:
            raise InputError(
                f"base_model {folder} is a Hugging Face folder, whose config.json says what to "
                "build: leave model out, or give a base_model that a run saved"
            )
        return BaseModel(build_hf_model(source, dtype=dtype), folder, source, None)
    if component is None:
        raise InputError(
            "there is no model: set base_model to a Hugging Face folder, or model to a component"
        )
    if folder is not None:
        with torch.device("meta"):
            model = _store_as(instantiate(component, path="model"), dtype)
        return BaseModel(model, folder, None, component)
    model = _store_as(instantiate(component, path="model"), dtype)
    initialize(model, seed=seed, std=init_std)
    return BaseModel(model.to(device), None, None, component)


def _store_as(model: Any, dtype: torch.dtype) -> MoEDecoder:
    if not isinstance(model, MoEDecoder):
        raise InputError(
            f"model._component_ built a {type(model).__name__}, but must build what moe_decoder "
            "builds (a MoEDecoder), which hands the token mask to its routers"
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
