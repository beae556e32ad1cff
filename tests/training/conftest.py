"""What the tests of whole runs start from."""

import pytest

from fastssl.training import loop
from tests.training.tiny import make_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def no_report(monkeypatch):
    """The report takes longer than the run; test_cli has it."""
    monkeypatch.setattr(loop, "write_report", lambda folder, **_: None)
