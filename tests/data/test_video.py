"""Clips: the frames that were asked for, decoded once, and batches that are functions of seed."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from fastssl.data import video
from fastssl.data.crops import Request
from fastssl.data.decode import BrokenImage
from fastssl.data.labelled import CenterCrop
from fastssl.data.loader import build_loader
from fastssl.data.video import Clip, VideoClips, VideoFiles
from fastssl.data.views import View

NUMBER, STEP = 48, 5


def write_video(path, number=NUMBER, rate=12, pts=None, size=(64, 48), codec="libx264", gop=8):
    """Frame i is as bright as 5 i in its left half, and black to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.bit_rate = 8_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 12 * 100)
        for i in range(number):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[:, : size[0] // 2] = STEP * i
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 100 * i if pts is None else pts[i]
            frame.time_base = Fraction(1, 12 * 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "a.mp4")
    write_video(root / "b.mkv", number=10)
    (root / "c.avi").write_bytes(b"RIFF, and no video")
    write_video(root / "d.mp4", codec="mpeg4")
    return root


def numbers(clip):
    """Of the frames of a clip [T, H, W, 3], by their brightness."""
    return (clip[:, 8:-8, 8:24].mean(axis=(1, 2, 3)) / STEP).round().astype(int).tolist()


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (Clip(4, 2, 0.0), [0, 2, 4, 6]),
        (Clip(4, 2, 1 - 2**-24), [41, 43, 45, 47]),
        (Clip(3, 8, 0.5), [16, 24, 32]),
        (Clip(1, 1, 0.5), [24]),
        (Clip(5, 12, 0.9), [0, 12, 24, 36, 47]),  # too short for it: the last frame stays
    ],
)
@pytest.mark.parametrize("position", [0, 3])
def test_frames_are_those_asked_for(folder, position, clip, expected):
    (frames,) = VideoFiles(folder).read(position, [clip])
    assert frames.dtype == np.uint8 and frames.shape[1:] == (48, 64, 3)
    assert numbers(frames) == expected == clip.frames(NUMBER)


def test_a_container_without_a_count_of_frames(folder):
    (frames,) = VideoFiles(folder).read(1, [Clip(4, 3, 0.0)])
    assert numbers(frames) == [0, 3, 6, 9]


def test_frames_that_come_when_they_like(tmp_path):
    """At 12 a second on average; twice as fast at first, then half as fast."""
    pts = [*range(0, 1200, 50), *range(1200, 3600, 200)]
    write_video(tmp_path / "a.mkv", number=len(pts), pts=pts)
    files = VideoFiles(tmp_path)
    with av.open(str(tmp_path / "a.mkv")) as container:
        rate = container.streams.video[0].average_rate
    (frames,) = files.read(0, [Clip(6, 6, 0.0)])
    for t, number in enumerate(numbers(frames)):
        time = Fraction(6 * t) / rate * 1200
        assert number == min(range(len(pts)), key=lambda i: abs(pts[i] - time))


def test_clips_of_one_video_are_decoded_once(folder, monkeypatch):
    files, opened, converted = VideoFiles(folder), [], []
    real, upright = av.open, video._upright
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    monkeypatch.setattr(video, "_upright", lambda frame: converted.append(1) or upright(frame))
    data = VideoClips(files, View((16, 16)), num_frames=4, stride=1, repeats=4)
    batch = data[Request(torch.arange(4) * len(files))]
    assert len(opened) == 1 and len(converted) <= 16
    assert batch.images.shape == (4, 3, 4, 16, 16)
    seen = {tuple(clip.flatten().tolist()) for clip in batch.images}
    assert len(seen) > 1, "places of their own"


def test_rotation_is_honoured():
    class Frame:
        rotation = -90

        def to_ndarray(self, format):
            return np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)

    pixels = Frame().to_ndarray("rgb24")
    assert np.array_equal(video._upright(Frame()), np.rot90(pixels, 3))


def test_broken_videos_are_named_and_replaced(folder):
    files = VideoFiles(folder)
    with pytest.raises(BrokenImage, match=r"c\.avi: "):
        files.read(2, [Clip(1, 1, 0.0)])
    data = VideoClips(files, CenterCrop((8, 8)), num_frames=2, stride=1, num_clips=1)
    broken, next_one = (data[Request(torch.tensor([i]))] for i in (2, 3))
    assert list(broken.skipped) == [str(folder / "c.avi")] and next_one.skipped is None
    assert torch.equal(broken.images, next_one.images)


def test_all_frames_of_a_clip_have_one_crop(folder):
    view = View((24, 24), (0.2, 0.5), jitter=1.0, blur=1.0)
    data = VideoClips(VideoFiles(folder), view, num_frames=4, stride=1)
    clip = data[Request(torch.tensor([0]))].images[0]
    # The edge between bright and black is at one place.
    edges = [(frame[0].float().mean(0).diff().abs().argmax()).item() for frame in clip.unbind(1)]
    assert len(set(edges)) == 1


def batches(data, **options):
    return list(build_loader(data, global_batch_size=4, num_steps=3, seed=1, **options))


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_are_functions_of_seed_and_step(folder, repeats):
    def data():
        files = VideoFiles(folder)
        return VideoClips(
            files, View((16, 16), jitter=0.8), num_frames=3, stride=2, repeats=repeats
        )

    whole = batches(data())
    assert whole[0].images.shape == (4, 3, 3, 16, 16) and whole[0].images.dtype == torch.float32
    for got, wanted in zip(batches(data(), num_workers=2), whole, strict=True):
        assert torch.equal(got.index, wanted.index) and torch.equal(got.images, wanted.images)
    ranks = [batches(data(), rank=rank, world_size=2) for rank in range(2)]
    for left, right, wanted in zip(*ranks, whole, strict=True):
        assert torch.equal(torch.cat([left.images, right.images]), wanted.images)
    assert torch.equal(batches(data(), start_step=2)[0].images, whole[2].images)


def test_evaluation_takes_evenly_spaced_clips_and_the_middle(folder):
    data = VideoClips(VideoFiles(folder), CenterCrop((28, 28)), num_frames=2, stride=1, num_clips=3)
    assert len(data) == 12
    clips = data[Request(torch.tensor([0, 1, 2]))].images
    assert clips.shape == (3, 3, 2, 28, 28) and clips.dtype == torch.uint8
    brightness = clips[:, 0, 0, :, :8].float().mean((1, 2)) / STEP
    assert brightness.round().int().tolist() == [7, 23, 39]
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        VideoClips(VideoFiles(folder), View((8, 8)), stride=0)
