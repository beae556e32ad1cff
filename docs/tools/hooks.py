"""Shows mkdocs, which calls these functions by their names, the sources as a wheel holds them."""

import shutil
import sys
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

sys.path.insert(0, str(Path(__file__).parent))
import generate

REPOSITORY = Path(__file__).parents[2]
_sources: list[Path] = []


# Before mkdocstrings reads its paths.
@event_priority(100)
def on_config(config):
    """In a checkout `fastssl.kernels` lies elsewhere, where a parser does not find it."""
    folder = Path(tempfile.mkdtemp(prefix="fastssl-docs-"))
    _sources.append(folder)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(REPOSITORY / "fastssl", folder / "fastssl", ignore=ignore)
    kernels = folder / "fastssl" / "kernels"
    shutil.copytree(REPOSITORY / "kernels", kernels, ignore=ignore, dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    return config


def on_page_markdown(markdown, **kwargs):
    """Parts that are read off the code, as it is now."""
    return generate.fill(markdown, generate.WRITTEN | generate.FILLED_IN)


def on_shutdown():
    for folder in _sources:
        shutil.rmtree(folder, ignore_errors=True)
