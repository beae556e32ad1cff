"""Filter banks beside Kaldi's, transformers' and the definition written out in float64."""

import math

import kaldi_native_fbank as knf
import numpy as np
import pytest
import torch
from transformers import ASTFeatureExtractor

from fastssl.data.fbank import AUDIOSET_MEAN, AUDIOSET_STD, audio_input, log_mel_filter_bank

RATE = 16_000


def sounds(batch, samples, seed=0):
    """Tones that glide, and noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / RATE
    low = 200 + 600 * torch.rand(batch, 1, generator=generator)
    tones = 0.3 * torch.sin(2 * math.pi * low * time * (1 + time))
    return tones + 0.05 * torch.randn(batch, samples, generator=generator)


def written_out(wave, *, rate, bins, length_ms, shift_ms, window, preemphasis, low, high):
    length, shift = int(rate * length_ms / 1000), int(rate * shift_ms / 1000)
    size = 2 ** math.ceil(math.log2(length))
    n = np.arange(length)
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * n / (length - 1))
    shape = shape if window == "hanning" else shape**0.85
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    step = (mel(high) - mel(low)) / (bins + 1)
    rows = []
    for begin in range(0, len(wave) - length + 1, shift):
        frame = wave[begin : begin + length].astype(np.float64)
        frame = frame - frame.mean()
        before = np.concatenate([frame[:1], frame[:-1]])
        frame = (frame - preemphasis * before) * shape
        power = np.abs(np.fft.rfft(frame, size)) ** 2
        row = []
        for b in range(bins):
            left, center, right = (mel(low) + (b + i) * step for i in range(3))
            total = 0.0
            for k in range(size // 2):
                m = mel(k * rate / size)
                if left < m < right:
                    up, down = (m - left) / (center - left), (right - m) / (right - center)
                    total += power[k] * (up if m <= center else down)
            row.append(math.log(max(total, np.finfo(np.float32).eps)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(
    ("rate", "bins", "length_ms", "shift_ms", "window", "preemphasis", "low", "high"),
    [
        (16_000, 128, 25.0, 10.0, "hanning", 0.97, 20.0, 8000.0),
        (16_000, 40, 20.0, 7.5, "povey", 0.9, 60.0, 7000.0),
        (8_000, 23, 25.0, 10.0, "povey", 0.0, 0.0, 4000.0),
    ],
)
def test_the_definition(rate, bins, length_ms, shift_ms, window, preemphasis, low, high):
    waves = sounds(2, 2000)
    got = log_mel_filter_bank(
        waves,
        sample_rate=rate,
        num_mel_bins=bins,
        frame_length=length_ms,
        frame_shift=shift_ms,
        window=window,
        preemphasis=preemphasis,
        low_freq=low,
        high_freq=high,
    )
    words = {"length_ms": length_ms, "shift_ms": shift_ms, "window": window, "low": low}
    words |= {"rate": rate, "bins": bins, "preemphasis": preemphasis, "high": high}
    for wave, bank in zip(waves, got, strict=True):
        expected = written_out(wave.numpy(), **words)
        assert bank.shape == expected.shape and bank.dtype == torch.float32
        np.testing.assert_allclose(bank.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("window", ["hanning", "povey"])
@pytest.mark.parametrize("bins", [40, 80])
@pytest.mark.parametrize("high", [0.0, -400.0])
def test_kaldi(window, bins, high):
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = window
    options.mel_opts.num_bins = bins
    options.mel_opts.high_freq = high
    waves = sounds(2, 12_345)
    got = log_mel_filter_bank(waves, num_mel_bins=bins, window=window, high_freq=high)
    for wave, bank in zip(waves, got, strict=True):
        theirs = knf.OnlineFbank(options)
        theirs.accept_waveform(RATE, wave.tolist())
        theirs.input_finished()
        expected = np.stack([theirs.get_frame(i) for i in range(theirs.num_frames_ready)])
        assert bank.shape == expected.shape
        np.testing.assert_allclose(bank.numpy(), expected, atol=2e-3)


def test_transformers():
    """What AST is given: padded to 1024 frames and normalised with AudioSet's numbers."""
    extractor = ASTFeatureExtractor()
    assert (extractor.mean, extractor.std) == (AUDIOSET_MEAN, AUDIOSET_STD)
    for samples in (160_000, 40_000, 200_000):
        waves = sounds(2, samples)
        expected = extractor(
            [wave.numpy() for wave in waves], sampling_rate=RATE, return_tensors="pt"
        ).input_values
        got = audio_input(log_mel_filter_bank(waves))
        assert got.shape == (2, 1, 1024, 128)
        torch.testing.assert_close(got[:, 0], expected.float(), atol=2e-3, rtol=0)


def test_silence_and_what_is_too_short():
    bank = log_mel_filter_bank(torch.zeros(1, 800))
    assert torch.allclose(bank, torch.tensor(math.log(torch.finfo(torch.float32).eps)))
    assert log_mel_filter_bank(torch.zeros(3, 399)).shape == (3, 0, 128)
    assert log_mel_filter_bank(torch.zeros(3, 400)).shape == (3, 1, 128)
    padded = audio_input(torch.ones(2, 3, 4), torch.tensor([1, 3]), length=5, mean=0.0, std=0.5)
    assert padded[:, 0, :, 0].tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_precision_bits_and_graph():
    waves = sounds(3, 4000)
    expected = log_mel_filter_bank(waves)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel_filter_bank(waves), expected)
    assert torch.equal(log_mel_filter_bank(waves.clone()), expected)
    for row in range(3):
        torch.testing.assert_close(
            log_mel_filter_bank(waves[row : row + 1])[0], expected[row], atol=1e-4, rtol=0
        )
    compiled = torch.compile(log_mel_filter_bank, fullgraph=True)
    torch.testing.assert_close(compiled(waves), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "hann"}, "window must be one of hanning, povey, got 'hann'"),
        ({"num_mel_bins": 0}, "num_mel_bins must be at least 1"),
        ({"frame_shift": 0.01}, "frame_length must be 2 samples and frame_shift one"),
        ({"low_freq": 9000.0}, r"must be 0 <= low < high <= 8000\.0, got 9000\.0"),
        ({"high_freq": 9000.0}, "low_freq and high_freq must be"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        log_mel_filter_bank(torch.zeros(1, 1000), **options)
    with pytest.raises(ValueError, match="waveforms must have 2 dimensions"):
        log_mel_filter_bank(torch.zeros(1000))
