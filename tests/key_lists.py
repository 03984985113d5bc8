"""The tensors of a released checkpoint without downloading it, as short text files.

    python tests/key_lists.py            # rewrite tests/assets/keys from tests/assets/configs

Each list is what transformers' own save conversion writes for the released config.json, on the
meta device: names and shapes, without what the family passes through. They are NOT CHECKED AGAINST
A HUB FILE. A line is a name and a shape, where ``{0-3}`` stands for 0 to 3 and ``{0,2}`` for 0 and
2, all combinations.
"""

import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
HEADER = (
    "# transformers {}: save conversion of {} on the meta device; not checked against a hub file"
)
Shape = tuple[int, ...]


def compress(shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Lines for names with shapes; numbers in names become ranges."""
    groups: dict[tuple[str, Shape], set[tuple[int, ...]]] = defaultdict(set)
    for name, shape in shapes.items():
        numbers = tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name)))
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), shape].add(numbers)
    for (template, shape), found in groups.items():
        for block in _blocks(found):
            ranges = ("{" + _ranges(numbers) + "}" for numbers in block)
            yield f"{template.format(*ranges)} {'x'.join(map(str, shape)) or 'scalar'}"


def expand(lines: Iterable[str]) -> dict[str, Shape]:
    """The inverse of ``compress``; a name that comes twice is an error."""
    shapes: dict[str, Shape] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        pattern, size = line.split()
        shape = () if size == "scalar" else tuple(map(int, size.split("x")))
        parts = re.split(r"\{([^}]*)\}", pattern)
        choices = [_numbers(part) if n % 2 else [part] for n, part in enumerate(parts)]
        for words in itertools.product(*choices):
            name = "".join(words)
            assert name not in shapes, name
            shapes[name] = shape
    return shapes


def read_keys(release: str) -> dict[str, Shape]:
    """Name -> shape of a release's tensors."""
    return expand((ASSETS / "keys" / f"{release}.txt").read_text().splitlines())


def released_keys(config: dict) -> dict[str, Shape]:
    """What transformers would write for a config.json, without what the family passes through."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    fields = {k: v for k, v in config.items() if k != "quantization_config"}
    # names that hub files carry and transformers knows under another one
    kinds = {"hunyuan": "hunyuan_v1_moe", "kimi_k2": "deepseek_v3"}
    kind = kinds.get(fields["model_type"], fields["model_type"])
    if "attention_head_dim" in fields:
        fields["head_dim"] = fields["attention_head_dim"]
    with torch.device("meta"):
        auto = AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
        model = auto.from_config(
            AutoConfig.for_model(kind, **{k: v for k, v in fields.items() if k != "model_type"})
        )
    tensors = revert_weight_conversion(model, model.state_dict())
    left_out = {*model.all_tied_weights_keys, *_carried(config, tensors)}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in left_out}


def _carried(config: dict, names: Iterable[str]) -> list[str]:
    """Tensors that our model has no place for: a vision model, of which no size is known here."""
    import torch

    from moe_builders.checkpoint.stream import model_shapes
    from moe_builders.families import BY_MODEL_TYPE
    from moe_builders.weights import carried_names

    family = BY_MODEL_TYPE[config["model_type"]]
    with torch.device("meta"):
        shapes = model_shapes(family.build(config))
    return carried_names(family.weight_map, shapes, names)


def main(names: list[str]) -> None:
    """Write the lists of the named releases, or of all."""
    import transformers

    for path in sorted((ASSETS / "configs").glob("*.json")):
        if names and path.stem not in names:
            continue
        lines = compress(released_keys(json.loads(path.read_text())))
        header = HEADER.format(transformers.__version__, path.name)
        (ASSETS / "keys" / f"{path.stem}.txt").write_text("\n".join([header, *lines]) + "\n")


def _blocks(found: set[tuple[int, ...]]) -> Iterator[list[list[int]]]:
    """Numbers per place, such that all combinations of a block are there and no others."""
    by_rest: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for numbers in sorted(found):
        by_rest[numbers[1:]].append(numbers[0] if numbers else 0)
    if () in by_rest:
        yield [by_rest[()]] if found != {()} else []
        return
    by_first: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for rest, first in by_rest.items():
        by_first[tuple(first)].add(rest)
    for first, rests in by_first.items():
        for block in _blocks(rests):
            yield [list(first), *block]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _numbers(ranges: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [str(n) for n in range(int(first), int(last or first) + 1)]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
