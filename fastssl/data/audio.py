"""Sounds as the spectrograms that audio encoders take: cut, mixed, resampled, filtered."""

from __future__ import annotations

import functools
import math
import os
from fractions import Fraction
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastssl import functional as F
from fastssl.data.batch import Batch
from fastssl.data.crops import Request
from fastssl.data.fbank import AUDIOSET_MEAN, AUDIOSET_STD, audio_input, log_mel_filter_bank
from fastssl.data.pictures import NewlySkipped
from fastssl.data.recordings import Recordings
from fastssl.kernels.common.checks import check_int, check_tensor

# Zero crossings of the resampling filter on each side, and the share of the band that it keeps.
_WIDTH, _ROLLOFF = 16, 0.95


class AudioFiles(Recordings):
    """Sound files, read by libsndfile (package soundfile): WAV, FLAC, OGG, MP3, AIFF and more."""

    kind = "audio"
    extensions: ClassVar = frozenset(
        {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
    )

    def __init__(self, data: str | os.PathLike[str]):
        try:
            import soundfile  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "sounds need the package soundfile: pip install 'fastssl[audio]'"
            ) from error
        super().__init__(data)

    def _read(self, path: str, seconds: float, place: float) -> tuple[Tensor, int]:
        """[S] float32, the mean of the channels, and the sampling rate.

        seconds: how much of it, all if it is shorter. place: of [0, 1), of where it begins.
        """
        import soundfile

        with soundfile.SoundFile(path) as file:
            wanted = math.ceil(seconds * file.samplerate)
            room = max(file.frames - wanted, 0)
            file.seek(min(int(place * (room + 1)), room))
            samples = file.read(wanted, dtype="float32", always_2d=True)
            if not len(samples):
                raise ValueError("it holds no sound")
            return torch.from_numpy(samples.mean(axis=1, dtype=np.float32)), file.samplerate


def resample(waveforms: Tensor, orig_rate: int, new_rate: int) -> Tensor:
    """[B, S] at orig_rate -> [B, ceil(S * new_rate / orig_rate)] at new_rate.

    A sinc filter under a Kaiser window, cut off at 0.95 of the smaller half rate, one phase for
    each place that a new sample may have between two old ones.
    """
    check_tensor("waveforms", waveforms, dim=2)
    check_int("orig_rate", orig_rate, 1)
    check_int("new_rate", new_rate, 1)
    if orig_rate == new_rate:
        return waveforms
    ratio = Fraction(new_rate, orig_rate)
    up, down = ratio.numerator, ratio.denominator
    kernel, reach = _resampling_filter(up, down)
    length = -(-waveforms.shape[1] * up // down)
    # Phase p of group g is the new sample g * up + p, at g * down + p * down / up of the old ones.
    groups = -(-length // up)
    after = (groups - 1) * down + kernel.shape[2] - reach - waveforms.shape[1]
    padded = torch.nn.functional.pad(waveforms.float(), (reach, max(after, 0)))
    out = torch.nn.functional.conv1d(padded[:, None], kernel.to(waveforms.device), stride=down)
    return out[:, :, :groups].transpose(1, 2).flatten(1)[:, :length]


@functools.cache
def _resampling_filter(up: int, down: int) -> tuple[Tensor, int]:
    """[up, 1, taps] float32, and how many old samples before its own a new one begins to read."""
    cutoff = _ROLLOFF * min(1.0, up / down)  # of half of the old rate
    reach = math.ceil(_WIDTH / cutoff)
    taps = torch.arange(-reach, down + reach + 1, dtype=torch.float64)
    places = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    distance = taps - places
    inside = (distance.abs() * cutoff / _WIDTH).clamp(max=1)
    window = torch.special.i0(8.6 * (1 - inside.square()).sqrt()) / torch.special.i0(
        torch.tensor(8.6, dtype=torch.float64)
    )
    window = torch.where(distance.abs() * cutoff < _WIDTH, window, 0.0)
    kernel = cutoff * torch.sinc(cutoff * distance) * window
    return kernel.float()[:, None], reach


class AudioSpectrograms(Dataset[Batch]):
    """A part of each sound as the log-mel filter bank that `audio_input` makes of it.

    Works with `build_loader`: batches are functions of (seed, step). A batch's view is float32
    [B, 1, num_frames, num_mel_bins].

    seconds: of the part, at a random place drawn by (seed, epoch, sample, view), or in the middle
        with random=False; a shorter sound is followed by silence.
    sample_rate: to which all sounds are brought, in Hz.
    repeats: parts of one sound in the same batch.
    """

    def __init__(
        self,
        files: AudioFiles,
        *,
        seconds: float = 10.0,
        sample_rate: int = 16_000,
        num_mel_bins: int = 128,
        num_frames: int = 1024,
        mean: float = AUDIOSET_MEAN,
        std: float = AUDIOSET_STD,
        seed: int = 0,
        random: bool = True,
        repeats: int = 1,
    ):
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        check_int("repeats", repeats, 1)
        self.files, self.repeats, self.held_out = files, repeats, frozenset()
        self.seconds, self.sample_rate = seconds, sample_rate
        self.num_mel_bins, self.num_frames = num_mel_bins, num_frames
        self.mean, self.std = (mean,), (std,)
        self.seed, self.random = seed, random
        self._new = NewlySkipped(files)

    def __len__(self) -> int:
        return len(self.files) * self.repeats

    def __getitem__(self, request: Request) -> Batch:
        keys = {"seed": self.seed, "epoch": request.epoch, "view": request.view}
        places = F.keyed_uniform(request.indices, 1, **keys, stream=F.STREAM_TIME)[:, 0].tolist()
        size = round(self.seconds * self.sample_rate)
        waveforms = torch.zeros(len(places), size)
        lengths = torch.zeros(len(places), dtype=torch.int64)
        for row, (index, place) in enumerate(zip(request.indices.tolist(), places, strict=True)):
            wave, rate = self.files.read_or_next(
                index % len(self.files), self.seconds, place if self.random else 0.5
            )
            wave = resample(wave[None], rate, self.sample_rate)[0, :size]
            waveforms[row, : len(wave)] = wave
            lengths[row] = len(wave)
        banks = log_mel_filter_bank(
            waveforms, sample_rate=self.sample_rate, num_mel_bins=self.num_mel_bins
        )
        # Whole windows of the sound itself; one at least, of what is next to nothing.
        window, shift = self.sample_rate // 40, self.sample_rate // 100
        there = (1 + (lengths - window) // shift).clamp(min=1)
        view = audio_input(banks, there, length=self.num_frames, mean=self.mean[0], std=self.std[0])
        return Batch(
            (view,),
            request.indices,
            request.epoch,
            request.view,
            request.step,
            skipped=self._new(),
        )
