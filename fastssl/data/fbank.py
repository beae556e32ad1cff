"""Log-mel filter banks of waveforms as Kaldi makes them, in batches on any device.

The input of AST (arXiv 2104.01778) and Audio-MAE (arXiv 2207.06405): 25 ms windows every 10 ms, 128
bins between 20 Hz and half of the sampling rate, without dither.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl.kernels.common.checks import check_int, check_tensor

# Of AudioSet's filter banks, as AST publishes them.
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974
WINDOWS = ("hanning", "povey")
# Below it a power counts as this: the distance of 1 to the next float32.
_FLOOR = torch.finfo(torch.float32).eps


def log_mel_filter_bank(
    waveforms: Tensor,  # [B, S] float
    *,
    sample_rate: int = 16_000,
    num_mel_bins: int = 128,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    window: str = "hanning",
    preemphasis: float = 0.97,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
) -> Tensor:  # [B, F, num_mel_bins] float32
    """The logarithm of the power in mel bins, of F = 1 + (S - length) // shift whole windows.

    Of each window: its mean subtracted, preemphasis (the first sample by itself), the window
    function, the power spectrum of the next power of two samples, triangles on the mel scale
    1127 ln(1 + f / 700).

    frame_length, frame_shift: in milliseconds. window: "hanning", or "povey", its power of 0.85.
    low_freq, high_freq: in Hz; 0 or less counts down from half of the sampling rate.

    float32 inside whatever the dtype, also under autocast. Raises ValueError or TypeError for
    arguments that do not fit, naming them.
    """
    check_tensor("waveforms", waveforms, dim=2)
    check_int("sample_rate", sample_rate, 1)
    check_int("num_mel_bins", num_mel_bins, 1)
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {window!r}")
    length = int(sample_rate * frame_length / 1000)
    shift = int(sample_rate * frame_shift / 1000)
    if length < 2 or shift < 1:
        raise ValueError(
            "frame_length must be 2 samples and frame_shift one at least, got "
            f"{frame_length} and {frame_shift} ms at {sample_rate} Hz"
        )
    nyquist = sample_rate / 2
    high = high_freq if high_freq > 0 else nyquist + high_freq
    if not 0 <= low_freq < high <= nyquist:
        raise ValueError(
            f"low_freq and high_freq must be 0 <= low < high <= {nyquist}, got {low_freq}, {high}"
        )
    if waveforms.shape[1] < length:
        return waveforms.new_empty((waveforms.shape[0], 0, num_mel_bins), dtype=torch.float32)
    size = 1 << (length - 1).bit_length()
    on = {"device": waveforms.device}
    with torch.autocast(waveforms.device.type, enabled=False):
        frames = waveforms.float().unfold(1, length, shift)  # [B, F, length]
        frames = frames - frames.mean(dim=2, keepdim=True)
        before = torch.cat([frames[:, :, :1], frames[:, :, :-1]], dim=2)
        frames = (frames - preemphasis * before) * _window(window, length).to(**on)
        spectrum = torch.fft.rfft(frames, n=size)
        power = spectrum.real.square() + spectrum.imag.square()
        filters = _mel_filters(num_mel_bins, size, sample_rate, low_freq, high).to(**on)
        return (power @ filters).clamp(min=_FLOOR).log()


def audio_input(
    filter_banks: Tensor,  # [B, F, bins]
    num_frames: Tensor | None = None,  # [B] int
    *,
    length: int = 1024,
    mean: float = AUDIOSET_MEAN,
    std: float = AUDIOSET_STD,
) -> Tensor:  # [B, 1, length, bins]
    """Filter banks cut or padded to `length` frames, then (x - mean) / (2 std), as AST has it.

    num_frames: how many of each sample are of the sound; the others become 0 before the
        normalisation, as do those that are padded.
    """
    check_tensor("filter_banks", filter_banks, dim=3)
    check_int("length", length, 1)
    x = filter_banks[:, :length]
    if num_frames is not None:
        there = torch.arange(x.shape[1], device=x.device) < num_frames[:, None]
        x = torch.where(there[:, :, None], x, 0.0)
    x = torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1]))
    return ((x - mean) / (2 * std)).unsqueeze(1)


def _window(name: str, length: int) -> Tensor:
    places = torch.arange(length, dtype=torch.float64) * (2 * math.pi / (length - 1))
    hanning = 0.5 - 0.5 * places.cos()
    return (hanning if name == "hanning" else hanning**0.85).float()


def _mel(frequency: Tensor) -> Tensor:
    return 1127.0 * (1.0 + frequency / 700.0).log()


def _mel_filters(bins: int, size: int, sample_rate: int, low: float, high: float) -> Tensor:
    """[size / 2 + 1, bins] float32; triangles between neighbouring centers, linear in mel."""
    low_mel, high_mel = (_mel(torch.tensor(f, dtype=torch.float64)) for f in (low, high))
    edges = low_mel + (high_mel - low_mel) / (bins + 1) * torch.arange(bins + 2)
    mels = _mel(torch.arange(size // 2 + 1, dtype=torch.float64) * sample_rate / size)[:, None]
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (mels - left) / (center - left), (right - mels) / (right - center)
    filters = torch.minimum(rising, falling).clamp(min=0)
    filters[-1] = 0  # half of the sampling rate itself takes no part
    return filters.float()
