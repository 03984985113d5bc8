"""A world of one process for whatever saves."""

import pytest

from moe_builders.parallel.world import open_world


@pytest.fixture
def world():
    with open_world(device="cpu") as opened:
        yield opened
