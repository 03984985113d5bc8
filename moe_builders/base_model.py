"""Where training starts: a Hugging Face folder, a folder of our own, or random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_builders.checkpoint.folder import check_output_folder, check_writable
from moe_builders.checkpoint.own import (
    MARKER_NAME,
    is_own_folder,
    load_model,
    save_model,
    saved_router,
)
from moe_builders.checkpoint.stream import materialize
from moe_builders.decoder import MoEDecoder
from moe_builders.errors import InputError
from moe_builders.hub import (
    HFSource,
    build_hf_model,
    carried_over,
    load_hf_weights,
    read_hf_source,
    save_hf_model,
)
from moe_builders.initialization import initialize
from moe_builders.instantiate import instantiate
from moe_builders.router_control import replace_routers
from moe_builders.routing import storage_dtype

_SHOWN = 3  # names of tensors in a note


@dataclass(frozen=True)
class BaseModel:
    """A model before it is filled, with what is needed to fill it and to write it back.

    Attributes:
        model: on the meta device while it waits for a folder's weights; else real.
        folder: where its weights lie; None: it has its random ones already.
        source: the folder's layout, if it is a Hugging Face folder.
        component: how it was built, if not from a config.json.
        router: the component that took the place of its routers, if one did.
    """

    model: MoEDecoder
    folder: str | None
    source: HFSource | None
    component: Mapping[str, Any] | None
    router: Mapping[str, Any] | None = None

    @property
    def source_json(self) -> str | None:
        """The HF folder's layout as text, to be kept in checkpoints."""
        return None if self.source is None else self.source.to_json()

    @property
    def notes(self) -> list[str]:
        """Sentences worth telling before training: what of the folder is changed or left alone."""
        if self.source is None:
            return _notes_on_router(self.folder, self.router)
        notes, quantised = [], self.source.is_quantized
        if self.router is not None:
            notes.append(
                f"every layer routes with {self.router['_component_']}, which the layout of "
                f"{self.folder} cannot say: other programs route the export as its config.json does"
            )
        if quantised:
            notes.append(
                f"{self.folder} is quantised: it is trained, and exported, as if it were in bf16"
            )
        names = carried_over(self.model, self.source)
        if not names:
            return notes
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        how = "found, or in bf16 if quantised" if quantised else "found"
        what = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
        return [
            *notes,
            f"{what} of {self.folder} without a place in the model will not be trained, and will "
            f"be exported as {how}: {', '.join(names[:_SHOWN])}{more}",
        ]

    def fill(self, device: torch.device, *, weights: bool = True, show: bool = False) -> MoEDecoder:
        """Stream the weights in, sharded or not; each process reads its own slices.

        Args:
            device: where to.
            weights: False: only make room for those that a checkpoint gives.
            show: with a progress bar, on a terminal.
        """
        if not weights:
            if self.folder is not None:
                materialize(self.model, device)
        elif self.source is not None:
            load_hf_weights(self.model, self.source, device=device, show=show)
        elif self.folder is not None:
            load_model(self.model, self.folder, device=device, show=show)
        return self.model

    def save(self, path: str | Path, *, rank: int = 0, size: int = 1) -> None:
        """Write the model back in its HF layout, or under our own names; all processes call.

        Args:
            path: folder to write, the same for all processes.
            rank: this process, 0 … size-1.
            size: number of processes; each writes a part of the files.

        Raises:
            InputError: the HF layout cannot be written any more; the weights then lie under our
                own names in a folder beside it, which is named, or nowhere, which is said.
        """
        if self.source is None:
            component, router = (
                None if node is None else dict(node) for node in (self.component, self.router)
            )
            save_model(self.model, path, component=component, router=router, rank=rank, size=size)
            return
        try:
            save_hf_model(self.model, path, source=self.source, rank=rank, size=size)
        except InputError as error:  # days of training must not be lost for a moved folder
            rescue = Path(path).with_name(f"{Path(path).name}.own_names")
            try:
                save_model(self.model, rescue, rank=rank, size=size)
            except InputError as again:
                raise InputError(
                    f"the trained model could not be saved ({error}), nor could its weights beside "
                    f"it ({again}): make room or mend the folder, then launch the same command "
                    "again, which goes on from the last checkpoint if there is one"
                ) from error
            raise InputError(f"{error}; the trained weights were saved to {rescue}") from error


def open_base_model(
    folder: str | None,
    component: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    init_std: float | None,
    router: Mapping[str, Any] | None = None,
) -> BaseModel:
    """Build the model that a config asks for; weights come with ``BaseModel.fill``.

    Args:
        folder: a Hugging Face folder, one that ``BaseModel.save`` wrote, or None.
        component: how to build the model; None: as the Hugging Face folder's config.json says.
        dtype: storage of all parameters; routers are kept in fp32 or wider.
        device: where a model with random weights is moved.
        seed: of random weights.
        init_std: of random matrices; None: as the modules drew them.
        router: component, in place of every layer's router; None: the model's own.

    Raises:
        InputError: neither folder nor component, or both where one decides; a router with tensors
            that the Hugging Face layout has no place for.
    """
    check_one_decides(folder, component)
    if folder is not None and not is_own_folder(folder):
        source = read_hf_source(folder)
        model = build_hf_model(source, dtype=dtype)
        if router is not None:
            before = set(model.state_dict())
            _store_as(_with_router(model, router), dtype)
            _check_same_tensors(before, set(model.state_dict()), folder)
        return BaseModel(model, folder, source, None, router)
    if component is None and folder is not None:
        raise InputError(
            f"base_model {folder} was saved under our own names, which do not say how to build "
            f"it: set model to the component that its {MARKER_NAME} names"
        )
    if component is None:
        raise InputError(
            "there is no model: set base_model to a Hugging Face folder, or model to a component"
        )
    if folder is not None:
        with torch.device("meta"):
            model = _store_as(_with_router(instantiate(component, path="model"), router), dtype)
        return BaseModel(model, folder, None, component, router)
    model = _store_as(_with_router(instantiate(component, path="model"), router), dtype)
    initialize(model, seed=seed, std=init_std)
    return BaseModel(model.to(device), None, None, component, router)


def check_one_decides(folder: str | None, component: Mapping[str, Any] | None) -> None:
    """Refuse (InputError) a component beside a Hugging Face folder, which says what to build."""
    if component is None or folder is None or is_own_folder(folder):
        return
    raise InputError(
        f"base_model {folder} is a Hugging Face folder, whose config.json says what to build: "
        "leave model out; or, for a model of your own with random weights, leave base_model out "
        "and set tokenizer to that folder's"
    )


def check_paths(output: str | Path, *, base_model: str | None) -> None:
    """Look at both ends of a run before any work is done; no weights are read.

    A run writes torchtune_config.yaml, logs/ and model/; a model/ of an earlier run is replaced.

    Raises:
        InputError: a file where a folder must be, or one that cannot be written; a model/ that is
            the base model or above it, or that no run has written; a base model that is not there
            or damaged.
    """
    output = Path(output)
    model = output / "model"
    for folder in (output, output / "logs", model):
        check_output_folder(folder)
    if base_model is not None:
        if not Path(base_model).is_dir():
            raise InputError(
                f"base_model {base_model} is not a folder here: it must be a local one, with the "
                "downloaded config.json, safetensors and tokenizer"
            )
        if not is_own_folder(base_model):
            read_hf_source(base_model)
        origin = Path(base_model).resolve()
        if output.resolve() == origin:
            raise InputError(
                f"output_dir {output} is base_model itself, which is left as it is: choose another"
            )
        if model.resolve() in (origin, *origin.parents):
            raise InputError(
                f"the trained model would be written to {model} and replace base_model "
                f"{base_model}: choose another output_dir"
            )
    if model.is_dir() and any(model.iterdir()) and not (output / "torchtune_config.yaml").is_file():
        raise InputError(
            f"{model} would be replaced, but no run has written it (there is no "
            "torchtune_config.yaml beside it): choose another output_dir"
        )
    check_writable(output)


def check_fits(
    model: MoEDecoder, *, max_seq_len: int | None = None, vocab_size: int | None = None
) -> None:
    """Compare a model with the data it is to be given.

    Args:
        model: as built.
        max_seq_len: tokens of the longest row; None: not known.
        vocab_size: the tokenizer's ids are below it; None: not known.

    Raises:
        InputError: rows too long, or ids without an embedding.
    """
    if max_seq_len is not None and max_seq_len > model.max_seq_len:
        raise InputError(
            f"max_seq_len is {max_seq_len}, but the model takes {model.max_seq_len} tokens at "
            "most: lower max_seq_len"
        )
    rows = model.tok_embeddings.num_embeddings
    if vocab_size is not None and vocab_size > rows:
        raise InputError(
            f"the tokenizer has {vocab_size} ids, but the model's vocabulary only {rows}: use the "
            "tokenizer that belongs to the model"
        )


def _with_router(model: Any, router: Mapping[str, Any] | None) -> MoEDecoder:
    if not isinstance(model, MoEDecoder):
        raise InputError(
            f"model._component_ built a {type(model).__name__}, but must build what moe_decoder "
            "builds (a MoEDecoder), which hands the token mask to its routers"
        )
    if router is not None:
        replace_routers(model, router)
    return model


def _notes_on_router(folder: str | None, router: Mapping[str, Any] | None) -> list[str]:
    """Routers with the same tensors load into each other: that it is another one must be said."""
    if folder is None or saved_router(folder) == router:
        return []
    before, now = (given or "the model's own" for given in (saved_router(folder), router))
    return [f"{folder} was saved with router {before}; this run has {now}"]


def _check_same_tensors(before: set[str], after: set[str], folder: str) -> None:
    more, less = sorted(after - before), sorted(before - after)
    if more or less:
        holds = f"has {more[0]}, which" if more else f"lacks {less[0]}, which"
        has = "has no place for" if more else "needs"
        raise InputError(
            f"with this router the model {holds} the layout of {folder} {has}: choose a router "
            "with the same tensors, or build a model of your own (model) with random weights"
        )


def _store_as(model: MoEDecoder, dtype: torch.dtype) -> MoEDecoder:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, dtype))
    return model
