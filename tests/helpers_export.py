"""Folders of several files, and exports by real processes: what each held and was sent."""

import dataclasses
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import HF_CONFIG
from helpers_weights import count_received
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders import hub
from moe_builders.checkpoint import own, writing
from moe_builders.errors import InputError
from moe_builders.families import BY_MODEL_TYPE
from moe_builders.hub import build_hf_model, create_hf_model, load_hf_weights, save_hf_model
from moe_builders.parallel.sharding import shard_model
from moe_builders.parallel.world import World, open_world
from moe_builders.weights import PassThrough

GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8,
    "num_experts_per_tok": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    "sliding_window": 8, "swiglu_limit": 7.0, "rms_norm_eps": 1e-5, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16,
    },
}  # fmt: skip
CONFIGS = {"qwen3_moe": HF_CONFIG, "gpt_oss": GPT_OSS}
CARRIED = "model.mtp.weight"  # in the second file of qwen3_moe: no place for it in the model
MAX_FILE = 120_000


def write_source(path: Path, model_type: str) -> Path:
    """A folder of several files, one of which holds a tensor that the model has no place for."""
    create_hf_model(path, CONFIGS[model_type], seed=3, max_shard_bytes=MAX_FILE)
    if model_type == "qwen3_moe":
        second = sorted(path.glob("*.safetensors"))[1]
        save_file(load_file(second) | {CARRIED: torch.arange(9.0)}, second, {"format": "pt"})
        index = path / hub.INDEX_NAME
        content = json.loads(index.read_text())
        content["weight_map"][CARRIED] = second.name
        index.write_text(json.dumps(content))
    return path


@contextmanager
def carried_rows() -> Iterator[None]:
    """The layout that leaves ``CARRIED`` alone."""
    family = BY_MODEL_TYPE["qwen3_moe"]
    rows = (*family.weight_map, PassThrough(CARRIED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BY_MODEL_TYPE, "qwen3_moe", dataclasses.replace(family, weight_map=rows))
        yield


class Held(TorchDispatchMode):
    """Bytes of all tensors that operations inside make, as long as they live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            a.untyped_storage()._cdata
            for a in args
            if isinstance(a, Tensor) and not isinstance(a, DTensor)
        }
        if isinstance(out, Tensor) and not isinstance(out, DTensor):
            storage = out.untyped_storage()
            if storage._cdata not in inputs | self._known:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _load(world: World, source: hub.HFSource) -> torch.nn.Module:
    model = build_hf_model(source, dtype=torch.float32)
    shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
    load_hf_weights(model, source)
    return model


def export(folder: str, out: str, dp_shard: int = -1, ep: int = 1) -> dict[str, list[int]]:
    """Load, shard and write back by all processes, in its own layout and under our names.

    Returns:
        By process: bytes received, and the most that tensors took while the first was written.
    """
    with (
        open_world(device="cpu", dp_shard=dp_shard, ep=ep) as world, carried_rows(),
        pytest.MonkeyPatch.context() as patch,
    ):  # fmt: skip
        patch.setattr(own, "MAX_FILE_BYTES", MAX_FILE)
        source = hub.read_hf_source(folder)
        model = _load(world, source)
        with count_received() as received, Held() as held:
            save_hf_model(model, out, source=source, rank=world.rank, size=world.size)
        own.save_model(model, f"{out}_own", rank=world.rank, size=world.size)
        found = world.gather_objects((sum(received), held.peak, max(received, default=0)))
        return {"received": [r for r, _, _ in found], "peak": [p for _, p, _ in found]}


def export_with_an_error(folder: str, out: str, kind: str) -> list[str]:
    """What each process raises if the second one alone cannot do its part."""
    with open_world(device="cpu") as world, carried_rows(), pytest.MonkeyPatch.context() as patch:
        source = hub.read_hf_source(folder)
        model = _load(world, source)
        if world.rank == 1:
            _break(patch, kind)
        try:
            save_hf_model(model, out, source=source, rank=world.rank, size=world.size)
            raised = "nothing"
        except InputError as error:
            raised = str(error)
        return world.gather_objects(raised)


def _break(patch: pytest.MonkeyPatch, kind: str) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def damaged(*_: Any) -> None:
        raise InputError("the source is damaged")

    if kind == "write":
        patch.setattr(writing, "save_file", full_disk)
    elif kind == "carried":
        patch.setattr(hub, "open_tensors", damaged)
    else:
        patch.setattr(hub, "is_hf_folder", lambda path: False)
