"""Data sets are cached in the test's own folder, and draw no progress bars."""

import pytest
from helpers_data import isolate_datasets


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    isolate_datasets(tmp_path, monkeypatch)
