"""Released sizes: our builder, the released config.json and the published counts agree.

Each family's case file names its releases; the tensors of each are listed in tests/assets/keys
(see tests/key_lists.py), and the family's rows must take each of them exactly once.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_releases import all_releases
from key_lists import compress, expand, read_keys

from moe_builders.checkpoint.stream import model_shapes
from moe_builders.decoder import MoEDecoder
from moe_builders.families import BY_MODEL_TYPE
from moe_builders.flops import count_parameters
from moe_builders.weights import make_plan

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"  # values: the releases' config.json
RELEASES = {release.config: release for release in all_releases()}


def released_config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def facts(model: MoEDecoder) -> dict[str, dict[str, Any]]:
    """Every plain value that a module keeps: what shapes do not say (epsilons, bases, scales)."""
    plain = (int, float, str, bool, tuple, type(None))

    def told(key: str, value: Any) -> bool:
        if isinstance(value, dict):  # a rotary scaling, not torch's own
            return not key.startswith("_")
        return isinstance(value, plain) and key not in ("training", "_is_hf_initialized")

    return {
        name: {key: value for key, value in vars(module).items() if told(key, value)}
        for name, module in model.named_modules()
    }


@pytest.fixture(params=RELEASES)
def release(request):
    return RELEASES[request.param]


def test_there_are_releases():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(RELEASES)
    assert {path.stem for path in (CONFIGS.parent / "keys").glob("*.txt")} == set(RELEASES)


def test_builder_config_and_counts(release):
    config = released_config(release.config)
    with torch.device("meta"):
        sized, read = release.builder(), BY_MODEL_TYPE[config["model_type"]].build(config)
    assert model_shapes(read) == model_shapes(sized)
    assert facts(read) == facts(sized)
    counts = count_parameters(sized)
    assert counts.total == release.total
    assert f"{counts.active / 1e9:.2f}" == release.active
    assert f"{release.total:,}" in release.builder.__doc__


def test_rows_take_each_tensor_once(release):
    config = released_config(release.config)
    family = BY_MODEL_TYPE[config["model_type"]]
    with torch.device("meta"):
        plan = make_plan(family.weight_map, model_shapes(family.build(config)))
    plan = [piece for piece in plan if not piece.copy]  # which a folder may lack
    taken = {piece.disk: tuple(piece.shape) for piece in plan}
    assert taken == read_keys(release.config)
    numbers = Counter()
    for piece in plan:
        numbers[piece.disk] += torch.Size(piece.size).numel()
    sizes = {name: torch.Size(shape).numel() for name, shape in taken.items()}
    assert numbers == sizes


def test_key_lists_say_what_they_were_made_of():
    shapes = {f"a.{n}.b.{m}.w": (2, 3) for n in (0, 1, 3) for m in range(4)}
    shapes |= {"c": (), "d.5.w": (7,)}
    lines = list(compress(shapes))
    assert expand(lines) == shapes
    assert lines == ["a.{0-1,3}.b.{0-3}.w 2x3", "c scalar", "d.{5}.w 7"]
    uneven = shapes | {"a.2.b.1.w": (2, 3), "a.0.b.0.w": (9, 9)}
    assert expand(compress(uneven)) == uneven
