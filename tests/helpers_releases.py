"""The released sizes that the families' case files name."""

import sys
from collections.abc import Callable
from typing import NamedTuple

from helpers_parity import all_cases

from moe_builders.decoder import MoEDecoder


class Release(NamedTuple):
    """A released size: name of its config.json in tests/assets/configs, builder, published counts.

    Attributes:
        config: file name without ``.json``.
        builder: of our family file, without arguments.
        total: parameters.
        active: parameters a token meets, in 10^9 with two digits.
    """

    config: str
    builder: Callable[[], MoEDecoder]
    total: int
    active: str


def all_releases() -> list[Release]:
    """Of all case files, in their order."""
    modules = (sys.modules[f"parity_case_{name}"] for name in all_cases())
    return [Release(*release) for module in modules for release in getattr(module, "RELEASES", ())]
