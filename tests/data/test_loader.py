"""Batches: the same global order for any number of ranks, micro-batches, workers and restarts."""

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import functional as F
from fastssl.data.batch import Batch
from fastssl.data.crops import PretrainingCrops, Request
from fastssl.data.folder import ImageFiles
from fastssl.data.loader import _moved, build_loader, epoch_permutation, steps_per_epoch
from fastssl.data.pictures import NoReadableImage
from fastssl.data.views import View
from tests.kernels.util import DEVICE

NUM_FILES = 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(NUM_FILES):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.png")
    return root


PLAIN = (View((8, 12)),)
COLORS = {"jitter": 0.8, "grey": 0.3, "blur": 0.5, "solarize": 0.3}
KINDS = [View((16, 16), number=2, **COLORS), View((8, 8), (0.05, 0.4), blur=0.5, number=3)]


def dataset_of(root, seed=0, views=PLAIN, **kwargs):
    files = ImageFiles(root, sorted(path.name for path in root.iterdir()))
    return PretrainingCrops(files, views, seed=seed, **kwargs)


def batches_of(root, **kwargs):
    options = {"global_batch_size": 4, "num_steps": 8, "seed": 3} | kwargs
    return list(build_loader(dataset_of(root), **options))


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.epoch, a.view) == (b.epoch, b.view)
        assert torch.equal(a.index, b.index) and torch.equal(a.images, b.images)


def test_batches_are_normalised_crops(folder):
    batch = batches_of(folder)[0]
    assert batch.images.shape == (4, 3, 8, 12) and batch.images.dtype == torch.float32
    assert batch.index.shape == (4,) and batch.index.dtype == torch.int64
    assert len(batch) == 4 and batch.labels is None
    # Uniform noise: mean 0.5 and, averaged over some pixels by the resize, a smaller deviation.
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    raw = torch.cat([b.images for b in batches_of(folder)]) * std + mean
    assert 0.0 <= raw.min() and raw.max() <= 1.0
    assert raw.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_same_batches_for_any_number_of_workers(folder, num_workers):
    assert_same(batches_of(folder, num_workers=num_workers), batches_of(folder))


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_same_global_batch_for_any_number_of_ranks_and_micro_batches(
    folder, world_size, accumulation
):
    expected = batches_of(folder)
    by_rank = [
        batches_of(folder, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    assert all(len(batches) == 8 * accumulation for batches in by_rank)
    for step, whole in enumerate(expected):
        parts = [
            part
            for batches in by_rank
            for part in batches[step * accumulation : (step + 1) * accumulation]
        ]
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_resumes_at_a_step(folder):
    assert_same(batches_of(folder, start_step=5), batches_of(folder)[5:])
    assert_same(batches_of(folder, start_step=3, accumulation=2, num_workers=2),
                batches_of(folder, accumulation=2)[6:])  # fmt: skip
    assert batches_of(folder, start_step=8) == []


def test_an_epoch_has_each_sample_at_most_once_in_a_new_order(folder):
    batches = batches_of(folder, num_steps=6)  # two epochs of three batches of 4 of 13
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 1]
    first, second = (torch.cat([b.index for b in batches[i : i + 3]]) for i in (0, 3))
    for epoch in (first, second):
        assert len(epoch.unique()) == 12 and set(epoch.tolist()) <= set(range(NUM_FILES))
    assert not torch.equal(first, second)
    assert steps_per_epoch(dataset_of(folder), 4) == 3


def test_an_epoch_is_a_permutation_keyed_by_seed_and_epoch():
    order = epoch_permutation(5000, seed=1, epoch=2)
    assert torch.equal(order.sort().values, torch.arange(5000))
    assert torch.equal(order, epoch_permutation(5000, seed=1, epoch=2))
    others = [epoch_permutation(5000, seed=s, epoch=e) for s, e in ((1, 3), (2, 2), (2, 1))]
    for other in others:
        # Two random permutations agree in one place on average.
        assert (order == other).sum() < 12
    # No trace of the sorted order: the rank correlation of n values deviates by 1 / sqrt(n).
    correlation = np.corrcoef(order.numpy(), np.arange(5000))[0, 1]
    assert abs(correlation) < 4 / 5000**0.5


def test_a_dataset_smaller_than_a_batch_repeats_with_new_crops(folder):
    dataset = dataset_of(folder)
    assert steps_per_epoch(dataset, 20) == 1 and steps_per_epoch(dataset, 26) == 1
    batches = list(build_loader(dataset, global_batch_size=26, num_steps=2))
    for epoch, batch in enumerate(batches):
        assert batch.epoch == epoch
        assert torch.equal(batch.index.sort().values, torch.arange(26))
        order = batch.index.argsort()
        once, again = batch.images[order[:13]], batch.images[order[13:]]
        assert all(not torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_crops_depend_on_seed_epoch_view_and_sample_only(folder):
    def crops(seed=0, epoch=0, view=0, order=(0, 5, 2)):
        from fastssl.data.crops import Request

        batch = dataset_of(folder, seed)[Request(torch.tensor(order), epoch, view)]
        return dict(zip(order, batch.images, strict=True))

    base = crops()
    for index, image in crops(order=(2, 7, 0)).items():
        assert index not in base or torch.equal(image, base[index])
    for change in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        assert all(not torch.equal(image, base[i]) for i, image in crops(**change).items())


def test_crop_numbers_come_from_their_own_stream(folder):
    """What the design promises: keyed_uniform with STREAM_CROP, five numbers a sample."""
    dataset = dataset_of(folder)
    batch = batches_of(folder)[5]
    numbers = F.keyed_uniform(
        batch.index, 5, seed=0, epoch=batch.epoch, view=0, stream=F.STREAM_CROP
    )
    for i, index in enumerate(batch.index.tolist()):
        picture = dataset.files.read(index)
        region = (0, 0, picture.shape[1], picture.shape[0])
        crop = dataset.views[0]([picture], [region], numbers[i : i + 1])[0]
        mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
        expected = (crop.permute(1, 2, 0) / 255 - mean) / std
        torch.testing.assert_close(batch.images[i].permute(1, 2, 0), expected, atol=1e-5, rtol=0)


def test_the_global_generators_are_left_alone(folder):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches_of(folder, num_steps=3, num_workers=1)
    batches_of(folder, num_steps=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_skipped_counted_and_named(folder, tmp_path, num_workers):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "03.png").write_bytes((folder / "03.png").read_bytes()[:200])
    (tmp_path / "08.png").write_text("no image")
    options = {"global_batch_size": 13, "num_steps": 2, "seed": 3}
    loader = build_loader(dataset_of(tmp_path), num_workers=num_workers, **options)
    got = list(loader)
    assert set(loader.skipped) == {str(tmp_path / "03.png"), str(tmp_path / "08.png")}
    assert all(loader.skipped.values())
    # Samples of readable files are untouched; the broken ones show the next file.
    for a, b in zip(got, build_loader(dataset_of(folder), **options), strict=True):
        assert torch.equal(a.index, b.index)
        same = [torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True)]
        assert {i for i, equal in zip(a.index.tolist(), same, strict=True) if not equal} == {3, 8}
    assert_same(list(build_loader(dataset_of(tmp_path), **options)), got)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stops_when_nothing_is_left(tmp_path, num_workers):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no image")
    loader = build_loader(
        dataset_of(tmp_path), global_batch_size=2, num_steps=2, num_workers=num_workers
    )
    with pytest.raises(NoReadableImage, match="none of the 3 image files"):
        list(loader)


def test_held_out_halves_stay_out(tmp_path):
    for i in range(2):
        pixels = np.zeros((20, 31, 3), np.uint8)
        pixels[:, 15:] = 255  # the right half of 31 columns begins at 15
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    dataset = dataset_of(tmp_path, held_out=[1], mean=(0.0,) * 3, std=(1.0,) * 3)
    batches = list(build_loader(dataset, global_batch_size=2, num_steps=40))
    images = torch.cat([b.images for b in batches])
    index = torch.cat([b.index for b in batches])
    assert (images[index == 1] == 0).all()
    assert (images[index == 0] == 1).any()


def test_a_program_that_fails_with_workers_under_way_ends(folder):
    code = f"""
import sys
from fastssl.data.crops import PretrainingCrops
from fastssl.data.folder import ImageFiles
from fastssl.data.loader import build_loader
from fastssl.data.views import View
files = ImageFiles({str(folder)!r}, ["00.png", "01.png"])
dataset = PretrainingCrops(files, [View((8, 8))])
batches = iter(build_loader(dataset, global_batch_size=2, num_steps=1000, num_workers=2))
next(batches)
sys.modules["kept until the very end"] = batches
raise ValueError("training failed")
"""
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "training failed" in done.stderr


def test_workers_outlive_a_signal_to_every_process(folder):
    """As Ctrl-C and schedulers send it."""
    before = set(multiprocessing.active_children())
    loader = build_loader(dataset_of(folder), global_batch_size=2, num_steps=30, num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    kill = "import os, sys; [os.kill(int(sys.argv[1]), int(n)) for n in sys.argv[2:]]"
    signals = [str(int(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    subprocess.run([sys.executable, "-c", kill, str(worker.pid), *signals], check=True)
    assert len(list(batches)) == 29
    worker.join(20)
    assert worker.exitcode == 0


def test_workers_have_one_thread(folder):
    class Threads(PretrainingCrops):
        def __getitem__(self, request):
            batch = super().__getitem__(request)
            batch.skipped = {"threads": str(torch.get_num_threads())}
            return batch

    files = ImageFiles(folder, ["00.png"])
    dataset = Threads(files, [View((8, 8))])
    loader = build_loader(dataset, global_batch_size=2, num_steps=1, num_workers=1)
    list(loader)
    assert loader.skipped == {"threads": "1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "global_batch_size must be a positive multiple .* 3 x 1, got 4"),
        ({"accumulation": 8}, "global_batch_size must be a positive multiple .* 1 x 8, got 4"),
        ({"global_batch_size": 0}, "global_batch_size must"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"start_step": 9}, r"start_step must be in \[0, 8\], got 9"),
    ],
)
def test_wrong_arguments_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        batches_of(folder, **options)


def test_batch_moves_all_its_tensors(folder):
    batch = batches_of(folder)[0]
    batch.labels = torch.arange(4)
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.images, moved.index, moved.labels)} == {"meta"}
    assert (moved.epoch, moved.view) == (batch.epoch, batch.view)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_each_worker_has_so_many_micro_batches_ready(folder, prefetch):
    read = multiprocessing.get_context("fork").Value("i", 0)

    class Counted(PretrainingCrops):
        def __getitem__(self, request):
            with read.get_lock():
                read.value += 1
            return super().__getitem__(request)

    dataset = Counted(ImageFiles(folder, ["00.png"]), [View((8, 8))])
    options = {"global_batch_size": 1, "num_steps": 50, "num_workers": 2, "prefetch": prefetch}
    batches = iter(build_loader(dataset, **options))
    next(batches)
    # One has been taken, and asked for anew.
    deadline = time.monotonic() + 20
    while read.value < 2 * prefetch + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert read.value == 2 * prefetch + 1
    batches.close()


def test_the_next_batch_is_made_before_the_present_one_is_worked_on(folder, monkeypatch):
    """The order of events on a GPU, with a stream that only writes down what it is asked."""
    events = []

    class Stream:
        def __init__(self, device=None):
            pass

        def record_event(self):
            return len(events)

        def wait_event(self, event):
            events.append(f"wait for {event}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    within = []

    @contextlib.contextmanager
    def entered(stream):
        within.append(stream)
        yield
        within.pop()

    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    kept = []
    monkeypatch.setattr(Batch, "record_stream", lambda self, stream: kept.append(self))
    real = batches_of(folder, num_steps=3)
    numbers = {id(batch): i for i, batch in enumerate(real)}

    def copy(batch, device, non_blocking):
        assert within
        events.append(f"copy {numbers[id(batch)]}")
        return batch

    def finish(batch):
        assert within
        events.append(f"finish {numbers[id(batch)]}")
        made = replace(batch)
        numbers[id(made)] = numbers[id(batch)]
        return made

    monkeypatch.setattr(Batch, "to", copy)
    worked_on = []
    for batch in _moved(real, torch.device("cuda"), finish):
        assert not within
        worked_on.append(batch)
        events.append(f"work on {numbers[id(batch)]}")
    assert events == [
        *("copy 0", "finish 0", "copy 1", "finish 1", "wait for 2", "work on 0"),
        *("copy 2", "finish 2", "wait for 4", "work on 1"),
        *("wait for 8", "work on 2"),
    ]
    # What was finished belongs to the other stream, too, and must outlive its use on this one.
    assert [id(batch) for batch in kept] == [id(batch) for batch in worked_on]
    assert list(_moved([], torch.device("cuda"), finish)) == []


def every_view(folder, **options):
    dataset = dataset_of(folder, views=KINDS, mean=(0.0,) * 3, std=(1.0,) * 3)
    return list(build_loader(dataset, global_batch_size=4, num_steps=3, seed=2, **options))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_made_by_the_loader_are_those_made_by_workers(folder, num_workers):
    """All in one launch a size, from what the workers decoded, but for the rounding to bytes."""
    here = every_view(folder, num_workers=num_workers, views_on_device=True)
    for got, wanted in zip(here, every_view(folder), strict=True):
        assert got.decoded is None and torch.equal(got.index, wanted.index)
        assert [v.shape[2] for v in got.views] == [16, 16, 8, 8, 8]
        for view, levels in zip(got.views, wanted.views, strict=True):
            assert (view - levels).abs().max() <= 0.51 / 255
            assert torch.equal(levels, (levels * 255).round() / 255)


def test_views_made_by_triton_are_those_made_by_workers(folder, monkeypatch):
    pytest.importorskip("triton")
    from fastssl.kernels.augment_views import triton_kernel

    kinds = [View((8, 8), number=2, **COLORS), View((6, 10), blur=1.0)]
    dataset = dataset_of(folder, views=kinds, mean=(0.0,) * 3, std=(1.0,) * 3)
    options = {"global_batch_size": 2, "num_steps": 1, "seed": 2, "device": DEVICE}
    (wanted,) = build_loader(dataset, **options, views_on_device=False)
    used = []
    real = triton_kernel.augment_views
    monkeypatch.setattr(
        triton_kernel, "augment_views", lambda *args: used.append(args[6]) or real(*args)
    )
    monkeypatch.setenv("FASTSSL_BACKEND", "triton")
    (got,) = build_loader(dataset, **options, views_on_device=True)
    assert [tuple(size) for size in used] == [(8, 8), (6, 10)], "one launch a size"
    for view, levels in zip(got.views, wanted.views, strict=True):
        assert (view - levels).abs().max() <= 0.51 / 255


def test_decoded_pixels_move_with_their_batch(folder, monkeypatch):
    dataset = dataset_of(folder, views=KINDS)
    batch = dataset[Request(torch.arange(3), keep_decoded=True)]
    assert batch.views == () and len(batch) == 3
    moved = batch.to("meta").decoded
    devices = set()
    moved.map(lambda tensor: devices.add(tensor.device.type) or tensor)
    assert devices == {"meta"}
    assert moved.sizes == ((16, 16), (16, 16), (8, 8), (8, 8), (8, 8))
    tensors = {"index": batch.index, **vars(batch.decoded)}
    addresses = {one.data_ptr() for one in tensors.values() if isinstance(one, torch.Tensor)}
    for name, call in (
        ("pin_memory", lambda: batch.pin_memory()),
        ("record_stream", lambda: batch.record_stream(None)),
    ):
        touched = set()
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, *_, to=touched: to.add(tensor.data_ptr()) or tensor
        )
        call()
        assert touched == addresses and len(touched) == 6


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_the_cpu(folder):
    for got, wanted in zip(
        batches_of(folder, device="cuda", num_workers=2), batches_of(folder), strict=True
    ):
        # Memory that is used again too early shows when something is done in between.
        torch.empty(2**24, device="cuda").fill_(1.0)
        assert torch.equal(got.index.cpu(), wanted.index)
        # On the CPU views are rounded to bytes; a byte is 0.018 of the smallest deviation.
        torch.testing.assert_close(got.images.cpu(), wanted.images, atol=0.01, rtol=0)
