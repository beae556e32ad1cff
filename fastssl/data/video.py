"""Clips of videos: which frames, decoded once for all clips that show them, and their crops."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from fastssl import functional as F
from fastssl.data.batch import Batch
from fastssl.data.crops import Request
from fastssl.data.labelled import CenterCrop
from fastssl.data.pictures import NewlySkipped
from fastssl.data.recordings import Recordings
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fastssl.data.views import View, decode_later, make_views
from fastssl.kernels.common.checks import check_int


class VideoFiles(Recordings):
    """Video files, decoded by FFmpeg through PyAV (package av), on one thread."""

    kind = "video"
    extensions: ClassVar = frozenset(
        {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".ts", ".flv"}
    )

    def __init__(self, data: str | os.PathLike[str]):
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ImportError("videos need the package av: pip install 'fastssl[video]'") from error
        super().__init__(data)

    def _read(self, path: str, clips: Sequence[Clip]) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] for each clip; a frame that several show is decoded once."""
        import av

        with av.open(path) as container:
            stream = container.streams.video[0]
            # More would compete with other workers and with training for the same cores.
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            rate = stream.average_rate or stream.guessed_rate
            number = _num_frames(container, stream, rate)
            wanted = [clip.frames(number) for clip in clips]
            frames = _decode(container, stream, rate, sorted({i for one in wanted for i in one}))
        return [np.stack([frames[i] for i in one]) for one in wanted]


class Clip:
    """num_frames frames, each `stride` after the one before, of a video of any length.

    place: of [0, 1], where it begins among the places where it may. A video that is too short
    shows its last frame until the end.
    """

    def __init__(self, num_frames: int, stride: int, place: float):
        self.num_frames, self.stride, self.place = num_frames, stride, place

    def frames(self, number: int) -> list[int]:
        """Of a video of `number` frames."""
        room = max(number - ((self.num_frames - 1) * self.stride + 1), 0)
        begin = min(int(self.place * (room + 1)), room)
        return [min(begin + t * self.stride, number - 1) for t in range(self.num_frames)]


def _num_frames(container: Any, stream: Any, rate: Fraction) -> int:
    """As its index says, or its duration; at least one."""
    if stream.frames:
        return stream.frames
    if stream.duration is not None:
        seconds = stream.duration * stream.time_base
    elif container.duration is not None:
        seconds = Fraction(container.duration, 1_000_000)
    else:
        raise ValueError("nothing says how long it is")
    return max(round(seconds * rate), 1)


def _decode(
    container: Any, stream: Any, rate: Fraction, wanted: list[int]
) -> dict[int, np.ndarray]:
    """Frame number i is the one that is the nearest to i / rate, whenever its frames come."""
    start = (stream.start_time or 0) * stream.time_base
    first = start + wanted[0] / rate
    container.seek(int(first / stream.time_base), stream=stream, backward=True)
    found: dict[int, np.ndarray] = {}
    places = iter(wanted)
    place = next(places)
    last, last_time = None, Fraction(0)
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        time = frame.pts * stream.time_base - start
        while place is not None and time >= place / rate:
            earlier = last is not None and place / rate - last_time <= time - place / rate
            found[place] = _upright(last if earlier else frame)
            place = next(places, None)
        if place is None:
            return found
        last, last_time = frame, time
    if last is None:
        raise ValueError("it has no frame that can be decoded")
    # It ends earlier than was said.
    shown = _upright(last)
    return found | dict.fromkeys((place, *places), shown)


def _upright(frame: Any) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


class VideoClips(Dataset[Batch]):
    """Clips of the videos of a folder, unlabelled: for training at random places and in random
    crops, or evenly spaced and from the middle.

    Works with `build_loader`: batches are functions of (seed, step). A batch's view is
    [B, 3, num_frames, H, W]: uint8 from a worker, float32 and normalised from the loader.

    view: the crop, mirror and colours of all frames of a clip alike; or a CenterCrop.
    num_frames, stride: of a clip, in frames of the video.
    repeats: clips of one video in the same batch, which is decoded once for all of them.
    num_clips: None: at a random place, drawn by (seed, epoch, sample, view). Else sample i is clip
        i mod num_clips of that many, whose middles divide the video evenly.
    """

    def __init__(
        self,
        files: VideoFiles,
        view: View | CenterCrop,
        *,
        num_frames: int = 16,
        stride: int = 4,
        repeats: int = 1,
        num_clips: int | None = None,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        numbers = {"num_frames": num_frames, "stride": stride, "repeats": repeats}
        for name, value in (numbers | {"num_clips": num_clips or 1}).items():
            check_int(name, value, 1)
        self.files, self.view, self.held_out = files, view, frozenset()
        self.num_frames, self.stride, self.num_clips = num_frames, stride, num_clips
        self.repeats, self.seed = repeats, seed
        self.mean, self.std = tuple(mean), tuple(std)
        self._new = NewlySkipped(files)

    def __len__(self) -> int:
        return len(self.files) * self.repeats * (self.num_clips or 1)

    def __getitem__(self, request: Request) -> Batch:
        """The clips that the request names; `keep_decoded` of a request is not for clips."""
        keys = {"seed": self.seed, "epoch": request.epoch, "view": request.view}
        places = F.keyed_uniform(request.indices, 1, **keys, stream=F.STREAM_TIME)[:, 0]
        clips = list(self._clips(request.indices.tolist(), places.tolist()))
        if isinstance(self.view, CenterCrop):
            crops = [torch.stack([self.view(frame) for frame in clip]) for clip in clips]
            frames = torch.stack(crops)
        else:
            draws = F.keyed_uniform(
                request.indices, self.view.num_uniforms, **keys, stream=F.STREAM_CROP
            )
            # All frames of a clip by the numbers of the clip.
            made = [
                make_views(decode_later([self.view], list(clip), [row.expand(len(clip), -1)]))[0]
                for clip, row in zip(clips, draws, strict=True)
            ]
            frames = torch.stack(made)
        return Batch(
            (frames.transpose(1, 2).contiguous(),),
            request.indices,
            request.epoch,
            request.view,
            request.step,
            skipped=self._new(),
        )

    def _clips(self, indices: list[int], places: list[float]) -> Iterator[np.ndarray]:
        """Those of one video that follow one another are decoded together."""
        samples = [self._sample(i, place) for i, place in zip(indices, places, strict=True)]
        for position, group in groupby(samples, key=lambda sample: sample[0]):
            yield from self.files.read_or_next(position, [clip for _, clip in group])

    def _sample(self, index: int, place: float) -> tuple[int, Clip]:
        if self.num_clips is None:
            return index % len(self.files), Clip(self.num_frames, self.stride, place)
        video, number = divmod(index, self.num_clips)
        place = (number + 0.5) / self.num_clips
        return video % len(self.files), Clip(self.num_frames, self.stride, place)
