"""Faults happen to whole runs."""

from tests.training.conftest import images, no_report  # noqa: F401  (fixtures)
