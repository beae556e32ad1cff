"""Sounds: reading a part, resampling, and batches that are functions of (seed, step)."""

import math

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample_poly

from fastssl.data.audio import AudioFiles, AudioSpectrograms, resample
from fastssl.data.crops import Request
from fastssl.data.decode import BrokenImage
from fastssl.data.loader import build_loader
from fastssl.data.pictures import NoReadableImage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ramp of 2 s, stereo at another rate, one that is short, and a broken one."""
    root = tmp_path_factory.mktemp("sounds")
    ramp = np.linspace(0, 0.5, 32_000)
    soundfile.write(root / "a.wav", ramp, 16_000, subtype="FLOAT")
    time = np.arange(22_050 * 2) / 22_050
    tone = np.stack([0.4 * np.sin(2 * np.pi * 440 * time), 0.2 * np.sin(2 * np.pi * 440 * time)])
    soundfile.write(root / "b.flac", tone.T, 22_050)
    (root / "c.mp3").write_bytes(b"no sound at all")
    soundfile.write(root / "d.wav", 0.1 * np.random.default_rng(0).standard_normal(4000), 16_000)
    return root


def test_a_part_of_a_sound(folder):
    files = AudioFiles(folder)
    assert [files.path(i).rpartition("/")[2] for i in range(len(files))] == [
        *("a.wav", "b.flac", "c.mp3", "d.wav")
    ]
    wave, rate = files.read(0, 0.5, 0.0)
    assert rate == 16_000 and len(wave) == 8000 and wave[0] == 0
    last, _ = files.read(0, 0.5, 1 - 2**-24)
    assert last[-1] == pytest.approx(0.5) and len(last) == 8000
    middle, _ = files.read(0, 0.5, 0.5)
    assert middle[0] == pytest.approx(0.5 * 12_000 / 32_000, abs=1e-4)
    assert len(files.read(3, 10.0, 0.3)[0]) == 4000
    mixed, rate = files.read(1, 1.0, 0.0)
    assert rate == 22_050 and mixed.abs().max() == pytest.approx(0.3, abs=1e-3), "the mean of both"


def test_broken_sounds_are_named_and_replaced(folder, tmp_path):
    files = AudioFiles(folder)
    with pytest.raises(BrokenImage, match=r"c\.mp3: ") as caught:
        files.read(2, 1.0, 0.0)
    assert files.skipped == {str(folder / "c.mp3"): caught.value.reason}
    assert torch.equal(files.read_or_next(2, 1.0, 0.0)[0], files.read(3, 1.0, 0.0)[0])
    (tmp_path / "x.wav").write_bytes(b"")
    with pytest.raises(NoReadableImage, match="one readable audio file; none of the 1"):
        AudioFiles(tmp_path).read_or_next(0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"a folder of audio files; .* does not exist"):
        AudioFiles(tmp_path / "no")
    (tmp_path / "x.wav").unlink()
    with pytest.raises(ValueError, match=r"at least one audio file; .* such as \.wav, \.flac"):
        AudioFiles(tmp_path)


@pytest.mark.parametrize(("old", "new"), [(44_100, 16_000), (8_000, 16_000), (22_050, 16_000)])
def test_tones_keep_their_pitch_and_height(old, new):
    """Below 0.8 of the smaller half rate; what is above both half rates goes."""
    seconds, edge = 0.5, 400
    time, fresh = np.arange(int(old * seconds)) / old, np.arange(math.ceil(new * seconds)) / new
    for share in (0.01, 0.3, 0.8):
        pitch = share * min(old, new) / 2
        wave = torch.tensor(np.sin(2 * np.pi * pitch * time), dtype=torch.float32)[None]
        got = resample(wave, old, new)[0].numpy()
        assert len(got) == -(-len(time) * new // old)
        expected = np.sin(2 * np.pi * pitch * fresh[: len(got)])
        assert np.abs(got - expected[: len(got)])[edge:-edge].max() < 2e-3
    if old > new:
        wave = torch.tensor(np.sin(2 * np.pi * 1.1 * new / 2 * time), dtype=torch.float32)[None]
        assert resample(wave, old, new)[0, edge:-edge].abs().max() < 2e-3


def test_resampling_beside_scipy():
    rng = np.random.default_rng(0)
    smooth = np.convolve(rng.standard_normal(8000), np.hanning(31) / 15, mode="same")
    waves = torch.tensor(np.stack([smooth, smooth[::-1]]), dtype=torch.float32)
    got = resample(waves, 44_100, 16_000)
    theirs = resample_poly(waves.numpy(), 160, 441, axis=1)
    assert got.shape == theirs.shape
    assert np.abs(got.numpy() - theirs)[:, 50:-50].max() < 0.01 * np.abs(theirs).max()
    assert resample(waves, 16_000, 16_000) is waves
    torch.testing.assert_close(resample(waves[1:], 44_100, 16_000)[0], got[1])
    for length in (1, 2, 5, 441, 442):
        assert resample(waves[:, :length], 44_100, 16_000).shape[1] == -(-length * 160 // 441)


def dataset(folder, **options):
    return AudioSpectrograms(AudioFiles(folder), seconds=1.0, num_frames=104, seed=3, **options)


def batches(data, **options):
    return list(build_loader(data, global_batch_size=4, num_steps=4, seed=1, **options))


def test_spectrograms(folder):
    batch = dataset(folder, random=False)[Request(torch.tensor([0, 1, 3]))]
    (view,) = batch.views
    assert view.shape == (3, 1, 104, 128) and view.dtype == torch.float32
    silent = (0 + 4.2677393) / (2 * 4.5689974)
    # 98 whole windows in a second, 23 in a quarter of one.
    assert torch.allclose(view[:, :, 98:], torch.tensor(silent))
    assert (
        torch.allclose(view[2, 0, 23:], torch.tensor(silent)) and (view[2, 0, :23] != silent).all()
    )
    # The bin of 440 Hz is the loudest of the tone.
    mel = lambda f: 1127 * math.log(1 + f / 700)  # noqa: E731
    step = (mel(8000) - mel(20)) / 129
    assert view[1, 0, 50].argmax().item() == pytest.approx((mel(440) - mel(20)) / step - 1, abs=1)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"start_step": 2}])
def test_batches_are_functions_of_seed_and_step(folder, options):
    whole = batches(dataset(folder))
    again = batches(dataset(folder), **options)
    for got, wanted in zip(again, whole[options.get("start_step", 0) :], strict=True):
        assert torch.equal(got.index, wanted.index)
        torch.testing.assert_close(got.images, wanted.images, atol=1e-5, rtol=0)
    ranks = [batches(dataset(folder), rank=r, world_size=2) for r in range(2)]
    for left, right, wanted in zip(*ranks, whole, strict=True):
        together = torch.cat([left.images, right.images])
        torch.testing.assert_close(together, wanted.images, atol=1e-5, rtol=0)


def test_repeats_and_epochs_have_places_of_their_own(folder):
    data = dataset(folder, repeats=2)
    assert len(data) == 8
    one, other = data[Request(torch.tensor([0, 4]))].images
    assert not torch.equal(one, other)
    assert not torch.equal(one, data[Request(torch.tensor([0]), epoch=1)].images[0])
    skipped = data[Request(torch.tensor([2]))].skipped
    assert (
        list(skipped) == [str(folder / "c.mp3")]
        and data[Request(torch.tensor([2]))].skipped is None
    )
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        AudioSpectrograms(AudioFiles(folder), seconds=0)
