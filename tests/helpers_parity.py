"""Every family equal to transformers, as data: what tests/parity proves, it proves for all.

To add a family write ``tests/parity/cases/<model_type>.py`` with ``CASE = Case(...)``; it is found
by itself, and every test in tests/parity then runs on each of its variants. Needed:

- ``hf_model``, ``hf_config``: names of classes in transformers;
- ``tiny``: fields of the config (hidden 64, 3 or 4 layers, 8 experts, 3 a token, vocabulary 128,
  64 positions). Values are not defaults, where a wrong reading of a default could hide;
- ``variants``: name -> fields that differ from ``tiny``, at least 3, the first one most ordinary.
  Sequences have 20 positions, so a window is seen where it is shorter.

Where they apply (each is described at ``Case``): ``mutations``, mistakes that must be seen in the
logits; ``inert`` and ``own_defaults``, fields of config.json; ``extra_tensors``, which the family
passes through; ``skips``, checks that cannot be made, with the reason; ``router``, ``prepare``.

Run one family with ``pytest tests/parity -k "mixtral-" -m "not full"``.

Letters: b rows · s positions · v vocabulary · t tokens.
"""

import copy
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_builders.families import BY_MODEL_TYPE
from moe_builders.hub import load_hf_model, save_hf_model
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.scores import keep_best_groups

transformers.utils.logging.disable_progress_bar()

B, S = 3, 20
CHECKS = (
    "logits", "gradients", "padding", "left_padding", "gaps", "packing", "bf16", "round_trip",
    "config",
)  # fmt: skip
# Fields of config.json that no family has to read: bookkeeping, generation, training's own.
INERT = frozenset({
    "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "model_type",
    "output_router_logits", "pad_token_id", "router_aux_loss_coef", "transformers_version",
    "use_cache",
})  # fmt: skip
NEVER_TRAINED = re.compile(r"(correction|expert)_bias$")  # a parameter, or even asks for gradients
Mutation = Callable[[Any], None]


@dataclass(frozen=True)
class Case:
    """What the parity tests must know of a family.

    Attributes:
        model_type: of its config.json; the file's name, too.
        hf_model, hf_config: names in transformers.
        tiny: fields of the config.
        variants: name -> fields that differ from ``tiny``.
        mutations: name -> function that breaks one of our models so that its logits move by more
            than 1e-2; or (variant, function), where the first variant does not have the part.
        inert: further fields of config.json that change nothing -> why.
        own_defaults: fields whose default is not transformers' -> why.
        extra_tensors: name on disk -> shape, of tensors that the family passes through.
        skips: one of ``CHECKS`` -> variant (or "*") -> why that check cannot be made.
        router: pattern of the gates' weights in transformers; None: what has the shape of one.
        bf16_limit: our mean distance to fp32 in transformers' own.
        prepare: changes transformers' random model before it is saved.
        wide: fields of a model of hidden size 256 for `make test-full`.
    """

    model_type: str
    hf_model: str
    hf_config: str
    tiny: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    mutations: Mapping[str, Mutation | tuple[str, Mutation]] = field(default_factory=dict)
    inert: Mapping[str, str] = field(default_factory=dict)
    own_defaults: Mapping[str, str] = field(default_factory=dict)
    extra_tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    skips: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    router: str | None = None
    bf16_limit: float = 2.0
    prepare: Callable[[Any], None] | None = None
    wide: Mapping[str, Any] | None = None

    @property
    def first(self) -> str:
        """The variant for what is checked on one alone."""
        return next(iter(self.variants))

    def reference(self, **fields: Any) -> Any:
        """transformers' config of ``tiny`` with some fields changed."""
        no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        values = copy.deepcopy({**no_tokens, **self.tiny, **fields})
        return getattr(transformers, self.hf_config)(**values)

    def written_config(self, variant: str) -> dict[str, Any]:
        """config.json of a variant as save_pretrained writes it."""
        return json.loads(self.reference(**self.variants[variant]).to_json_string())

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with transformers' default for every field it lacks."""
        kind = getattr(transformers, self.hf_config)
        return json.loads(kind(**copy.deepcopy(dict(config))).to_json_string())

    def skipped(self, check: str, variant: str) -> str | None:
        """Why a check is not made on a variant; None: it is."""
        reasons = self.skips.get(check, {})
        return reasons.get(variant, reasons.get("*"))


def _load_cases() -> dict[str, Case]:
    cases = {}
    for path in sorted((Path(__file__).parent / "parity" / "cases").glob("*.py")):
        name = f"parity_case_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        assert module.CASE.model_type == path.stem, path
        cases[path.stem] = module.CASE
    return cases


def all_cases() -> dict[str, Case]:
    """model_type -> its case, from tests/parity/cases."""
    if not _CASES:
        _CASES.update(_load_cases())
    return _CASES


_CASES: dict[str, Case] = {}


def randomise(model: Any, *, seed: int, router: str | None = None) -> None:
    """Make wrong code visible: nothing keeps the 0 or 1 it starts with, top-k margins are wide."""
    stream = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    gates = []
    with torch.no_grad():
        for name, tensor in {**parameters, **buffers}.items():
            noise = torch.randn(tensor.shape, generator=stream)
            if not tensor.requires_grad or name in buffers or NEVER_TRAINED.search(name):
                value = 0.05 * noise  # steers selection alone
            elif tensor.ndim < 2 and name.endswith("weight"):
                value = 1 + 0.3 * noise  # a norm
            elif tensor.ndim < 2 or name.endswith("bias"):
                value = 0.2 * noise
            else:
                value = 0.08 * noise
                if _is_gate(name, tensor, model.config, router):
                    gates.append(name)
                    value = 4 * value
            tensor.copy_(value)
    assert gates, "no router found: give Case.router, a pattern of its weights' names"


def _is_gate(name: str, tensor: Tensor, config: Any, pattern: str | None) -> bool:
    if pattern is not None:
        return re.search(pattern, name) is not None
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = {getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)}
    return any(tuple(tensor.shape) == (count, config.hidden_size) for count in counts)


def write_folder(
    case: Case, path: Path, *, seed: int = 0, shard_size: str = "5GB", **fields: Any
) -> Path:
    """A folder as transformers writes it; ``fields`` change ``tiny``, ``dtype`` the storage."""
    dtype = fields.pop("dtype", torch.float32)
    model = getattr(transformers, case.hf_model)(case.reference(**fields))
    randomise(model, seed=seed, router=case.router)
    if case.prepare is not None:
        case.prepare(model)
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    return path


def load_reference(case: Case, path: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The reference: eager attention, eager experts; every key of the folder used, none missing."""
    model, info = getattr(transformers, case.hf_model).from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    for name, parameter in model.named_parameters():
        if name.endswith("correction_bias"):  # ERNIE's is a parameter, and loading thaws it
            parameter.requires_grad_(False)
    return model.eval()


class Models:
    """Folders and models of this session, each made once: most of the tests' time is in here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[tuple, Path] = {}
        self._loaded: dict[tuple, Any] = {}

    def folder(self, case: Case, variant: str, *, seed: int = 0) -> Path:
        """As transformers saves it in fp32 and one file; not to be written to."""
        key = (case.model_type, variant, seed)
        if key not in self._folders:
            path = self.root / "-".join(map(str, key))
            self._folders[key] = write_folder(case, path, seed=seed, **case.variants[variant])
        return self._folders[key]

    def hf(self, case: Case, variant: str, *, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' model; its gradients are the test's to clear."""
        key = ("hf", case.model_type, variant, dtype)
        if key not in self._loaded:
            folder = self.folder(case, variant)
            self._loaded[key] = load_reference(case, folder, dtype=dtype)
        return self._loaded[key]

    def pair(self, case: Case, variant: str) -> SimpleNamespace:
        """Models of both kinds without gradients, and our source."""
        key = ("ours", case.model_type, variant)
        if key not in self._loaded:
            self._loaded[key] = load_hf_model(self.folder(case, variant))
        ours, source = self._loaded[key]
        hf = self.hf(case, variant)
        for model in (hf, ours):
            model.zero_grad(set_to_none=True)
        return SimpleNamespace(hf=hf, ours=ours, source=source)


def smallest_margin(model: nn.Module, real: Tensor, *args: Any, **inputs: Any) -> float:
    """How far the k-th choice is ahead of the next, of experts and groups, at worst.

    Args:
        model: ours.
        real: [b, s] bool, tokens that count.
        args, inputs: of its forward.
    """
    margins = [float("inf")]

    def gap(scores: Tensor, k: int) -> None:
        if k < scores.shape[-1]:
            best = scores[real.flatten()].topk(k + 1, dim=-1).values
            margins.append((best[:, -2] - best[:, -1]).min().item())

    def watch(router: TokenChoiceTopKRouter) -> Callable[[Tensor], Tensor]:
        choose = router._select

        def look(scores: Tensor) -> Tensor:
            seen = scores if router.expert_bias is None else scores + router.expert_bias
            if router.num_groups > 1:
                groups = seen.unflatten(-1, (router.num_groups, -1))  # [t, g, e/g]
                best = groups.topk(router.group_score_topk, dim=-1).values.sum(-1)
                gap(best, router.groups_per_token)
                seen = keep_best_groups(
                    seen, num_groups=router.num_groups, groups_per_token=router.groups_per_token,
                    group_score_topk=router.group_score_topk)  # fmt: skip
            elif router.score_function == "softmax" and router.expert_bias is None:
                seen = seen.log()  # small scores are as exact as large ones, and chosen as surely
            gap(seen, router.experts_per_token)
            return choose(scores)

        return look

    routers = [m for m in model.modules() if isinstance(m, TokenChoiceTopKRouter)]
    assert routers
    try:
        for router in routers:
            router._select = watch(router)
        with torch.no_grad():
            model(*args, **inputs)
    finally:
        for router in routers:
            router.__dict__.pop("_select", None)
    return min(margins)


def draw_tokens(model: nn.Module, real: Tensor, **inputs: Any) -> Tensor:
    """Random tokens [b, s] whose smallest top-k margin is so wide that rounding flips no route."""
    for seed in range(200):
        stream = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 128, real.shape, generator=stream)
        if smallest_margin(model, real, tokens, **inputs) > 1e-4:
            return tokens
    raise AssertionError("no draw has wide margins")


def loss_of(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Next-token cross-entropy over pairs of real tokens, documents being rows: [b, s, v] -> []."""
    labels = tokens[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


@contextmanager
def gradients_as_values(model: nn.Module) -> Iterator[None]:
    """Each parameter holds its gradient, and NaN what never gets one."""
    kept = []
    try:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            kept.append((tensor, tensor.data))
            free = not tensor.requires_grad or NEVER_TRAINED.search(name)
            assert free or tensor.grad is not None, f"{name}: no gradient"
            nothing = torch.full_like(tensor.data, float("nan"))
            tensor.data = nothing if tensor.grad is None else tensor.grad.data
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def gradients_on_disk(model: nn.Module, save: Callable[[Path], Any]) -> dict[str, Tensor]:
    """Gradients under their names on disk, by whatever names and cuts the weights there."""
    with TemporaryDirectory() as folder, gradients_as_values(model):
        save(Path(folder) / "gradients")
        files = (Path(folder) / "gradients").glob("*.safetensors")
        return {name: t for file in files for name, t in load_file(file).items()}


def gradient_error(pair: SimpleNamespace) -> float:
    """Largest |Δ| of a gradient relative to its largest entry, over all tensors on disk.

    An expert's is relative to the largest of the layer's experts: one may idle.
    """
    expected = gradients_on_disk(pair.hf, pair.hf.save_pretrained)
    found = gradients_on_disk(
        pair.ours, lambda path: save_hf_model(pair.ours, path, source=pair.source)
    )
    assert found.keys() == expected.keys()
    without = [{n for n, t in some.items() if t.isnan().all()} for some in (expected, found)]
    assert without[0] == without[1]
    largest: dict[str, Tensor] = {}
    trained = [name for name in expected if name not in without[0]]
    kinds = {name: re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in trained}
    for name in trained:
        size = expected[name].abs().max()
        largest[kinds[name]] = torch.maximum(largest.get(kinds[name], size), size)
    errors = {
        name: float((found[name] - expected[name]).abs().max() / largest[kinds[name]])
        for name in trained
    }
    wrong = {name: error for name, error in errors.items() if not error <= 1e-5}
    assert not wrong, wrong
    return max(errors.values())


def compare(pair: SimpleNamespace, real: Tensor, hf_inputs: dict, our_inputs: dict) -> float:
    """Logits of real tokens to 1e-5, and every tensor's gradient to 1e-5 of its largest.

    Returns:
        The largest relative error of a gradient.
    """
    tokens = draw_tokens(pair.ours, real, **our_inputs)
    theirs = pair.hf(input_ids=tokens, **hf_inputs).logits
    ours = pair.ours(tokens, **our_inputs)
    assert ours.dtype == torch.float32
    assert theirs[real].std() > 0.3  # not a comparison of nothings
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-5)
    loss_of(theirs, tokens, real).backward()
    loss_of(ours, tokens, real).backward()
    return gradient_error(pair)


def builder_arguments(case: Case, config: Mapping[str, Any]) -> dict[str, Any]:
    """What our family makes of a config.json."""
    return BY_MODEL_TYPE[case.model_type].builder_arguments(config)


# Mutations that many families share; each takes a model of ours.


def on_layers(change: Mutation) -> Mutation:
    """The same change in every layer."""

    def mutate(model: Any) -> None:
        for layer in model.layers:
            change(layer)

    return mutate


def on_moe(change: Mutation) -> Mutation:
    """The same change in every layer that has experts."""
    return on_layers(lambda layer: change(layer.mlp) if hasattr(layer.mlp, "experts") else None)


def _swap_gate_and_up(mlp: Any) -> None:
    weight = mlp.experts.gate_up_proj
    weight.data = torch.cat(weight.data.chunk(2, dim=1)[::-1], dim=1)


def _reverse_experts(mlp: Any) -> None:
    mlp.experts.down_proj.data = mlp.experts.down_proj.data.flip(0)


def _swap_norms(layer: Any) -> None:
    layer._modules.update(sa_norm=layer.mlp_norm, mlp_norm=layer.sa_norm)


no_rope = on_layers(lambda layer: setattr(layer.attn, "rope", None))
no_correction_bias = on_moe(lambda mlp: mlp.router.expert_bias.zero_())
no_shared_experts = on_moe(lambda mlp: setattr(mlp, "shared_experts", None))
gate_and_up_swapped = on_moe(_swap_gate_and_up)
experts_reversed = on_moe(_reverse_experts)
norms_swapped = on_layers(_swap_norms)


def toggled_normalisation(model: Any) -> None:
    """Normalise the routers' weights where they are not, and the reverse."""
    on_moe(lambda mlp: setattr(mlp.router, "normalize_weights", not mlp.router.normalize_weights))(
        model
    )


def scaled_frequencies(model: Any) -> None:
    """Rotary frequencies of another base."""
    on_layers(lambda layer: layer.attn.rope and layer.attn.rope.inverse_frequency.mul_(0.5))(model)


EVERYWHERE: Mapping[str, Mutation] = {  # for a pre-norm decoder with rotary positions
    "no rope": no_rope,
    "rope frequencies": scaled_frequencies,
    "gate and up swapped": gate_and_up_swapped,
    "experts reversed": experts_reversed,
    "norms swapped": norms_swapped,
    "normalisation of weights": toggled_normalisation,
}
