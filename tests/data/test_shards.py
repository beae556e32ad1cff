"""ShardImages: what is found in tar shards, its index, and shards behind URLs."""

import multiprocessing
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastssl.data import build_datasets, fetch, shards
from fastssl.data.decode import BrokenImage, decode_bytes
from fastssl.data.shards import ShardImages, expand_braces, find_shards
from tests.data.shards import png, write_shard, write_shards


def same(image: Image.Image, content: bytes) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(decode_bytes(content, "")))


def three_shards(root):
    return write_shards(root, [png(i) for i in range(12)], per_shard=5)


def logging(root, shard="{000..002}"):
    """A URL of the shards in `root`, and the shards that have been fetched from it so far."""
    log = root / "log.txt"
    # A shard's name stands for itself in both places; braces would expand into all pairs.
    first, last = shard.strip("{}").split("..")
    url = f"pipe:i={{{first}..{last}}}; cat {root}/$i.tar && echo $i >> {log}"
    return url, lambda: Counter(log.read_text().split()) if log.exists() else Counter()


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b,}x", ["ax", "bx", "x"]),
        ("{0..1}/{a,b}", ["0/a", "0/b", "1/a", "1/b"]),
        ("{7..7}", ["7"]),
        ("awk '{print}'", ["awk '{print}'"]),
    ],
)
def test_braces(text, expanded):
    assert expand_braces(text) == expanded


def test_a_range_that_falls_is_refused():
    with pytest.raises(ValueError, match=r"data must have .*got \{3\.\.1\}"):
        expand_braces("{3..1}.tar")


def test_what_names_shards(tmp_path):
    folder = three_shards(tmp_path / "shards")
    (folder / "README.md").write_text("x")
    (folder / ".hidden.png").write_text("x")
    assert find_shards(str(folder)) == [f"{folder}/{i:03d}.tar" for i in range(3)]
    assert find_shards(f"{folder}/000.tar") == [f"{folder}/000.tar"]
    url = "https://host/{0..1}.tar.part?key=1"
    assert find_shards(url) == [f"https://host/{i}.tar.part?key=1" for i in (0, 1)]
    assert find_shards(str(tmp_path)) is None and find_shards(f"{folder}/000.zip") is None
    # A folder of images that has been unpacked from the tar files beside it.
    (folder / "n01440764").mkdir()
    assert find_shards(str(folder)) is None
    (folder / "n01440764").rmdir()
    (folder / "a.png").write_bytes(png(0))
    assert find_shards(str(folder)) is None


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_images_are_found_among_other_members(tmp_path, format):
    long = "d/" * 40 + "é" * 20 + ".png" if format != tarfile.USTAR_FORMAT else "d/long.png"
    members = {
        "a.JSON": b"{}",
        "a.PNG": png(0),
        "._a.png": b"resource fork",
        long: png(1),
        "b.cls": b"1",
        "b.seg.webp": png(2),
    }
    path = write_shard(tmp_path / "x.tar", members, format)
    with tarfile.open(path, "a", format=format) as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.PNG"
        tar.addfile(link)
    images = ShardImages([str(path)], "x")
    assert [images.path(i) for i in range(len(images))] == [
        f"{path}/{name}" for name in ("a.PNG", long, "b.seg.webp")
    ]
    assert all(same(images.read(i), png(i)) for i in range(3))


def test_reads_by_position_across_shards_and_after_pickling(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_NUM_OPEN", 2)
    folder = three_shards(tmp_path)
    images = ShardImages(find_shards(str(folder)), str(folder))
    assert len(images) == 12
    for i in (11, 0, 4, 5, 9, 10, 3, 11):
        assert same(images.read(i), png(i)) and len(images._open) <= 2
    assert images.path(5) == f"{folder}/001.tar/00005.png"
    assert same(pickle.loads(pickle.dumps(images)).read(7), png(7))


def test_broken_members_are_skipped_and_named(tmp_path):
    members = {f"{i}.png": png(i) for i in range(4)} | {"1.png": b"", "2.png": png(2)[:80]}
    path = write_shard(tmp_path / "x.tar", members)
    images = ShardImages([str(path)], "x")
    assert [images.read_or_next(i)[0] for i in range(4)] == [0, 3, 3, 3]
    assert set(images.skipped) == {f"{path}/1.png", f"{path}/2.png"} and all(
        images.skipped.values()
    )
    with pytest.raises(BrokenImage):
        images.read(1)


def test_the_index_is_made_once_and_again_for_another_file(tmp_path, monkeypatch, cache):
    folder = three_shards(tmp_path / "shards")
    paths = find_shards(str(folder))
    first = ShardImages(paths, "x")
    made = []
    real = shards._make_index
    monkeypatch.setattr(shards, "_make_index", lambda *args: made.append(args[0]) or real(*args))
    again = ShardImages(paths, "x")
    assert made == [] and again.path(11) == first.path(11) and same(again.read(11), png(11))
    write_shard(folder / "001.tar", {"new.png": png(99), "newer.png": png(98)})
    changed = ShardImages(paths, "x")
    assert made == [paths[1]] and len(changed) == 9
    assert same(changed.read(6), png(98)) and same(changed.read(7), png(10))
    # One that was cut off while it was written is made again.
    for file in (cache / "shards").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert len(ShardImages(paths, "x")) == 9


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    folder = three_shards(tmp_path / "shards")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "file"))
    images = ShardImages(find_shards(str(folder)), "x")
    assert same(images.read(8), png(8)) and images.path(0).endswith("000.tar/00000.png")


def damaged(kind, path):
    content = path.read_bytes()
    if kind == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(__file__, "a.png")
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "no tar":
        path.write_bytes(b"x" * 2000)
    elif kind == "cut off":
        path.write_bytes(content[:2000])
    elif kind == "cut off between members":
        path.write_bytes(content[:1024])
    else:
        # The second member's header; the first is a label of one block.
        path.write_bytes(content[:1024] + b"?" * 512 + content[1536:])


@pytest.mark.parametrize(
    "kind",
    [
        "compressed",
        "empty file",
        "no tar",
        "cut off",
        "cut off between members",
        "header in the middle",
    ],
)
def test_what_is_no_whole_tar_is_refused(tmp_path, kind):
    folder = three_shards(tmp_path)
    damaged(kind, folder / "001.tar")
    with pytest.raises(ValueError, match=r"data must be whole, uncompressed .*/001\.tar is not: "):
        build_datasets(str(folder), image_size=8)


def test_a_shard_without_images_and_missing_ones_are_refused(tmp_path):
    folder = three_shards(tmp_path)
    write_shard(folder / "003.tar", {"a.cls": b"1"})
    with pytest.raises(ValueError, match=r"data must have an image in every shard.*003\.tar has"):
        build_datasets(str(folder), image_size=8)
    with pytest.raises(ValueError, match=r"data must name .* of 5, 2 .*003a\.tar, .*004\.tar"):
        build_datasets(f"{folder}/{{000,001,002,003a,004}}.tar", image_size=8)


def test_a_shard_behind_a_url_is_fetched_once(tmp_path, cache):
    pytest.importorskip("webdataset")
    url, fetched = logging(three_shards(tmp_path))
    for _ in range(2):
        images = ShardImages(find_shards(url), url)
        assert all(same(images.read(i), png(i)) for i in range(12))
    assert fetched() == {"000": 1, "001": 1, "002": 1}
    assert images.num_near == 5 and len(images) == 12


def count(url, barrier):
    barrier.wait()
    assert len(ShardImages(find_shards(url), url)) == 12


def test_several_processes_fetch_a_shard_once(tmp_path):
    pytest.importorskip("webdataset")
    url, fetched = logging(three_shards(tmp_path))
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    processes = [fork.Process(target=count, args=(url, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert fetched() == {"000": 1, "001": 1, "002": 1}


def test_the_cache_of_shards_is_bounded(tmp_path, cache, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setattr(shards, "_NUM_THREADS", 1)
    monkeypatch.setattr("fastssl.data.pictures._CACHE_BYTES", 0)
    folder = write_shards(tmp_path, [png(i) for i in range(20)], per_shard=5)
    url, fetched = logging(folder, "{000..003}")
    room = 2.5 * (folder / "000.tar").stat().st_size
    monkeypatch.setenv("FASTSSL_CACHE_GB", str(room / 1e9))
    with pytest.raises(ValueError, match=r"loader\.shard_window must be so small .* 4 shards"):
        ShardImages(find_shards(url), url)
    before = fetched()
    images = ShardImages(find_shards(url), url, shard_window=1)

    def kept():
        return sum(f.stat().st_size for f in (cache / "fetched").iterdir() if not f.suffix)

    for i in (*range(20), 0, 1, 2):
        assert same(images.read(i), png(i))
        assert 0 < kept() <= room
        # Nor is there more on the disk by files that are open and have no name.
        assert len(images._open) <= 3
    # The last shards were still there; the first had gone, and came again at the end.
    assert (fetched() - before)["000"] == 2 and fetched().total() <= before.total() + 5


def test_a_shard_that_cannot_be_fetched(tmp_path, cache):
    pytest.importorskip("webdataset")
    with pytest.raises(OSError, match=r"data cannot be fetched from pipe:cat .*missing\.tar: "):
        ShardImages([f"pipe:cat {tmp_path}/missing.tar"], "x")
    with pytest.raises(OSError, match=r"cannot be fetched from nonsense://x: .*no gopen handler"):
        ShardImages(["nonsense://x"], "x")
    assert {file.suffix for file in (cache / "fetched").iterdir()} == {".lock"}


def test_what_is_no_shard_is_fetched_anew_once_the_server_is_well(tmp_path, cache):
    pytest.importorskip("webdataset")
    folder = three_shards(tmp_path)
    (tmp_path / "answer").write_bytes(b"<html>503</html>")
    url = f"pipe:cat {tmp_path}/answer"
    with pytest.raises(ValueError, match="must be whole, uncompressed tar shards; pipe:cat"):
        ShardImages([url], url)
    (tmp_path / "answer").write_bytes((folder / "000.tar").read_bytes())
    assert len(ShardImages([url], url)) > 0


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "_PAUSES", (0.0, 0.0))


def test_a_shard_that_changed_behind_its_url_is_refused(tmp_path, cache):
    pytest.importorskip("webdataset")
    folder = three_shards(tmp_path)
    url = f"pipe:cat {folder}/000.tar"
    ShardImages([url], url)
    for file in (cache / "fetched").iterdir():
        file.unlink()
    write_shard(folder / "000.tar", {"a.png": png(1)})
    with pytest.raises(ValueError, match=r"data must not change; pipe:cat .* bytes and had"):
        ShardImages([url], url).read(0)


def test_an_attempt_that_fails_is_made_again(tmp_path):
    pytest.importorskip("webdataset")
    folder = three_shards(tmp_path)
    # Fails the first time, after half of the bytes.
    url = f"pipe:head -c 999 {folder}/000.tar; mkdir {tmp_path}/once && exit 1; tail -c +1000 "
    url += f"{folder}/000.tar"
    with fetch.open_fetched(url) as file:
        assert file.read() == (folder / "000.tar").read_bytes()


def test_the_bound_of_the_cache_must_be_a_number(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSSL_CACHE_GB", "many")
    with pytest.raises(ValueError, match="FASTSSL_CACHE_GB must be a positive number, got 'many'"):
        ShardImages(find_shards(str(three_shards(tmp_path))), "x")
