"""list_images and ImageFiles: what is found in a folder, and how broken files are passed."""

import os
import pickle
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from fastssl.data import folder
from fastssl.data.decode import BrokenImage
from fastssl.data.folder import ImageFiles, find_images, list_images
from fastssl.data.index import Names
from fastssl.data.pictures import NoReadableImage


def save(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, format="PNG")


def value(image):
    return int(np.asarray(image)[0, 0, 0])


def test_finds_images_at_any_depth_in_a_fixed_order(tmp_path):
    for name in ("b/c/d/z.png", "a.JPG", "b/a.Png", "b.webp", "B.tiff"):
        save(tmp_path / name)
    for name in ("notes.txt", "b/data.npy", "noextension"):
        (tmp_path / name).write_text("x")
    root, files, unreadable = list_images(tmp_path)
    assert root == tmp_path and unreadable == {}
    assert files == ["B.tiff", "a.JPG", "b.webp", "b/a.Png", "b/c/d/z.png"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("a.png", ".b.png", ".cache/c.png", "d/.e/f.png"):
        save(tmp_path / name)
    assert list_images(tmp_path)[1] == ["a.png"]


def test_symbolic_links(tmp_path):
    save(tmp_path / "data/a.png")
    save(tmp_path / "elsewhere/b.png")
    data = tmp_path / "data"
    (data / "loop").symlink_to(data)
    (data / "self.png").symlink_to(data / "self.png")
    (data / "dangling.png").symlink_to(tmp_path / "missing.png")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "link.png").symlink_to(tmp_path / "elsewhere/b.png")
    files = list_images(data)[1]
    assert files == ["a.png", "dangling.png", "link.png", "linked/b.png", "self.png"]


def test_a_pipe_is_no_file(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert list_images(tmp_path)[1] == ["a.png"]


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "closed/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, files, unreadable = list_images(tmp_path)
    assert files == ["a.png"]
    assert unreadable == {str(tmp_path / "closed"): "Permission denied"}


def test_home_is_expanded(tmp_path, monkeypatch):
    save(tmp_path / "pictures/a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_images("~/pictures")[0] == tmp_path / "pictures"


def test_wrong_paths(tmp_path):
    with pytest.raises(ValueError, match=r"data must be .*missing does not exist"):
        list_images(tmp_path / "missing")
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"data must be .*a\.png is a file"):
        list_images(tmp_path / "a.png")
    (tmp_path / "empty/nested").mkdir(parents=True)
    (tmp_path / "empty/readme.txt").write_text("x")
    with pytest.raises(ValueError, match=r"data must be .*at least one image.*empty has none"):
        list_images(tmp_path / "empty")


def five_files(tmp_path, broken):
    for i in range(5):
        path = tmp_path / f"{i}.png"
        path.write_text("broken") if i in broken else save(path, value=10 * i)
    return ImageFiles(tmp_path, [f"{i}.png" for i in range(5)])


def test_reads_by_position(tmp_path):
    files = five_files(tmp_path, broken=())
    assert len(files) == 5
    assert [value(files.read(i)) for i in (3, 0, 3, 4)] == [30, 0, 30, 40]
    assert files.path(2) == str(tmp_path / "2.png") and files.skipped == {}


def test_broken_files_are_replaced_by_the_next_and_reported(tmp_path):
    files = five_files(tmp_path, broken=(1, 2, 4))
    got = [files.read_or_next(i) for i in range(5)]
    assert [position for position, _ in got] == [0, 3, 3, 3, 0]
    assert [value(image) for _, image in got] == [0, 30, 30, 30, 0]
    assert set(files.skipped) == {str(tmp_path / f"{i}.png") for i in (1, 2, 4)}
    assert all("cannot identify" in reason for reason in files.skipped.values())
    with pytest.raises(BrokenImage):
        files.read(1)


def test_a_broken_file_is_opened_once(tmp_path):
    files = five_files(tmp_path, broken=(1,))
    files.read_or_next(1)
    save(tmp_path / "1.png", value=99)
    # A replacement that changed within a run would make batches depend on when they are read.
    assert files.read_or_next(1)[0] == 2


def test_nothing_left(tmp_path):
    files = five_files(tmp_path, broken=range(5))
    with pytest.raises(NoReadableImage, match=r"none of the 5 image files") as caught:
        files.read_or_next(2)
    assert "2.png" in str(caught.value) and isinstance(caught.value, ValueError)


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("fastssl.data.pictures._CACHE_BYTES", 2 * 8 * 8 * 4)
    files = five_files(tmp_path, broken=())
    first = [files.read(i) for i in range(5)]
    again = [files.read(i) for i in range(5)]
    kept = [a is b for a, b in zip(first, again, strict=True)]
    assert kept == [True, True, False, False, False]
    assert files.read(4) is again[4], "the last picture is kept for its next crop"


def test_pickles_without_pixels(tmp_path):
    files = five_files(tmp_path, broken=())
    files.read(0)
    copy = pickle.loads(pickle.dumps(files))
    assert copy._cache == {} and value(copy.read(1)) == 10


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / name, value=7)
    root, files, _ = list_images(tmp_path)
    assert value(ImageFiles(root, files).read(0)) == 7


@pytest.mark.parametrize(
    "names", [[], ["a"], ["", "b", "", "é" * 300, os.fsdecode(b"\xe9"), "line\nbreak"]]
)
def test_names(names):
    kept = Names.of(names)
    assert list(kept) == names and len(kept) == len(names)
    assert list(pickle.loads(pickle.dumps(kept))) == names
    for position in (-1, len(names)):
        with pytest.raises(IndexError, match="position must be in"):
            kept[position]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder of the size that is worth a file in the cache, which changed long ago."""
    monkeypatch.setattr(folder, "_WORTH_KEEPING", 4)
    for name in ("a.png", "b/c/d.png", "b/e.png", "f/notes.txt", "g.png"):
        save(tmp_path / "data" / name)
    settle(tmp_path / "data")
    return tmp_path / "data"


def settle(root, ago=60.0):
    for path, _, _ in os.walk(root):
        os.utime(path, (time.time() - ago,) * 2)


@pytest.fixture
def walks(monkeypatch):
    """The folders that were walked through."""
    walked, real = [], folder._walk
    monkeypatch.setattr(folder, "_walk", lambda *args: walked.append(args[0]) or real(*args))
    return walked


def test_a_long_list_is_made_once(large, walks):
    first = find_images(large)
    again = find_images(os.path.relpath(large))
    assert walks == [large]
    assert list(again[1]) == list(first[1]) == ["a.png", "b/c/d.png", "b/e.png", "g.png"]
    assert again[2] == first[2] == {}
    # What is kept is mapped, not read.
    assert isinstance(again[1].raw.base, np.memmap)
    assert value(ImageFiles(large, again[1]).read(3)) == 0


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "folder removed", "in f"])
def test_a_list_is_made_again_after_a_change(large, walks, change):
    find_images(large)
    expected = {"a.png", "b/c/d.png", "b/e.png", "g.png"}
    if change == "added":
        save(large / "b/c/new.png")
        expected.add("b/c/new.png")
    elif change == "removed":
        (large / "b/e.png").unlink()
        expected.remove("b/e.png")
    elif change == "renamed":
        (large / "b/c/d.png").rename(large / "b/c/z.png")
        expected = expected - {"b/c/d.png"} | {"b/c/z.png"}
    elif change == "folder removed":
        shutil.rmtree(large / "b/c")
        expected.remove("b/c/d.png")
    else:
        save(large / "f/h.png")
        expected.add("f/h.png")
    assert set(find_images(large)[1]) == expected and len(walks) == 2


def test_a_list_that_may_still_change_or_is_not_whole_is_not_kept(large, walks, monkeypatch):
    (large / "new").mkdir()
    for _ in range(2):
        find_images(large)
    assert len(walks) == 2
    settle(large)
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("new"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for _ in range(2):
        assert find_images(large)[2] == {str(large / "new"): "Permission denied"}
    assert len(walks) == 4


def test_a_short_list_leaves_no_file(tmp_path, cache):
    save(tmp_path / "data/a.png")
    settle(tmp_path / "data")
    find_images(tmp_path / "data")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_file_of_the_cache_that_was_cut_off_is_made_again(large, walks, cache, content):
    find_images(large)
    (kept,) = (cache / "folders").iterdir()
    kept.write_bytes(kept.read_bytes()[:-20] if content is None else content)
    assert len(find_images(large)[1]) == 4 and len(walks) == 2
    assert len(find_images(large)[1]) == 4 and len(walks) == 2


def test_a_cache_that_cannot_be_written_is_done_without(large, walks, monkeypatch):
    monkeypatch.setenv("FASTSSL_CACHE", str(large / "a.png"))
    for _ in range(2):
        assert len(find_images(large)[1]) == 4
    assert len(walks) == 2
