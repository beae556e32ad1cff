"""list_photos: what the default data consists of, and the error where it is not installed."""

import subprocess
import sys

import pytest

from fastssl.data.decode import decode_image
from fastssl.data.photos import list_photos


def test_photographs_are_there_and_readable():
    root, files = list_photos()
    assert len(files) == len(set(files)) == 18
    sizes = [decode_image(root / file).shape[:2] for file in files]
    # Half of the smallest one still gives distinct crops of 64 pixels without enlarging.
    assert min(min(width // 2, height) for height, width in sizes) >= 172


def test_one_of_the_stereo_pair_and_no_drawings():
    names = " ".join(list_photos()[1])
    assert "motorcycle_left" in names and "motorcycle_right" not in names
    for drawing in ("horse", "logo", "chessboard", "phantom", "color.png", "multipage"):
        assert drawing not in names


def test_neither_package_is_imported():
    code = (
        "import sys; from fastssl.data.photos import list_photos; list_photos(); "
        "print(sorted({'skimage', 'sklearn', 'scipy', 'pooch'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["scikit-image", "scikit-learn"])
def test_missing_package_says_what_to_install(monkeypatch, package):
    from importlib import util

    module = {"scikit-image": "skimage", "scikit-learn": "sklearn"}[package]
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(ImportError, match=rf"{package}: pip install 'fastssl\[photos\]'"):
        list_photos()


def test_missing_file_is_named(monkeypatch):
    monkeypatch.setattr("fastssl.data.photos._SKLEARN", ("china.jpg", "gone.jpg"))
    with pytest.raises(ImportError, match=r"gone\.jpg.*fastssl\[photos\]"):
        list_photos()
