"""Where the tests of data keep what the library caches."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The folder of the cache, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FASTSSL_CACHE", str(folder))
    return folder
