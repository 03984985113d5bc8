"""Tiny random Hugging Face models whose every parameter matters; gradients by name on disk."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_builders.checkpoint.stream import model_shapes
from moe_builders.families import qwen3_moe
from moe_builders.weights import make_plan

transformers.utils.logging.disable_progress_bar()

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "intermediate_size": 48,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


def randomise(model: nn.Module, *, seed: int) -> None:
    """Make wrong code visible: nothing keeps the 0 or 1 it starts with, top-k margins are wide."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=stream)
            if name.endswith("norm.weight") or "layernorm" in name:
                value = 1 + 0.3 * noise
            elif name.endswith("bias"):
                value = 0.2 * noise
            else:
                value = 0.08 * noise
                if name.endswith("mlp.gate.weight"):
                    value = 4 * value
            parameter.copy_(value)


def write_hf_folder(path: Path, *, seed: int = 0, shard_size: str = "5GB", **fields: Any) -> Path:
    """A folder as transformers writes it; ``fields`` change ``TINY``, ``dtype`` the storage."""
    dtype = fields.pop("dtype", torch.float32)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(TINY | fields)))
    randomise(model, seed=seed)
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    return path


def load_hf(path: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The reference: eager attention, eager experts; every key of the folder used, none missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def hf_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients under their names on disk: transformers fuses the experts, gate rows first."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = grad
            continue
        stem, _, kind = name.rpartition(".")
        for expert, matrix in enumerate(grad):
            parts = zip(("gate", "up"), matrix.chunk(2), strict=True)
            for word, part in parts if kind == "gate_up_proj" else [("down", matrix)]:
                found[f"{stem}.{expert}.{word}_proj.weight"] = part
    return found


def our_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients under their names on disk, cut out by the pieces of the plan."""
    found, parameters = {}, dict(model.named_parameters())
    for piece in make_plan(qwen3_moe.WEIGHT_MAP, model_shapes(model)):
        grad = parameters[piece.ours].grad
        assert grad is not None, piece.ours
        region = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True))
        found[piece.disk] = grad[region].reshape(piece.shape)
    return found


def draw_tokens(rows: int, length: int, margin: Callable[[Tensor], float]) -> Tensor:
    """Random tokens [b, s] whose smallest top-k margin is so wide that rounding flips no route."""
    for seed in range(50):
        stream = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, TINY["vocab_size"], (rows, length), generator=stream)
        if margin(tokens) > 1e-4:
            return tokens
    raise AssertionError("no draw has wide margins")


def smallest_margin(model: nn.Module, real: Tensor, **inputs: Any) -> float:
    """How far apart the k-th and the next expert's probability are, at worst, over real tokens."""
    margins = []

    def look(module: Any, args: tuple, output: tuple) -> None:
        best = output[0].float().softmax(-1).topk(module.top_k + 1).values[real.flatten()]
        margins.append((best[:, -2] - best[:, -1]).min().item())

    gates = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
    hooks = [gate.register_forward_hook(look) for gate in gates]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return min(margins)


def read_tensors(files: Iterable[Path]) -> dict[str, tuple[str, Tensor]]:
    """Every tensor of some safetensors files: name -> (file name, tensor)."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found[name] = (path.name, file.get_tensor(name))
    return found


def rewrite(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, (_, tensor) in read_tensors([path]).items()}
    tensors |= changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


def assert_equal_tensors(first: Path, second: Path) -> None:
    """Same names in the same files, same dtypes, same bits."""
    expected, found = (read_tensors(p.glob("*.safetensors")) for p in (first, second))
    assert found.keys() == expected.keys()
    for name, (file, tensor) in expected.items():
        assert found[name][0] == file, name
        assert found[name][1].dtype == tensor.dtype, name
        assert torch.equal(found[name][1], tensor), name
