"""What a model family is: a value with its name, its weight rows, and how to build it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_builders.decoder import MoEDecoder
from moe_builders.weights import Row


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face transformers, as data.

    Attributes:
        model_type: of its config.json.
        weight_map: how its checkpoints lie on disk.
        builder_arguments: config.json -> arguments of ``builder``; raises an InputError that names
            every field the family does not honour.
        builder: plain numbers -> the model.
    """

    model_type: str
    weight_map: tuple[Row, ...]
    builder_arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    builder: Callable[..., MoEDecoder]

    def build(self, config: Mapping[str, Any]) -> MoEDecoder:
        """The model that a config.json describes, with random weights."""
        return self.builder(**self.builder_arguments(config))
