"""decode_image: every mode and format to upright 8-bit RGB, every broken file to BrokenImage."""

import io
import warnings

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from fastssl.data.decode import BrokenImage, decode_image, image_extensions

WIDTH, HEIGHT = 24, 16


def ramp(dtype=np.uint8, high=255):
    """[16, 24], rising from 0 to `high` in reading order."""
    values = np.linspace(0, high, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    return values.round().astype(dtype) if np.issubdtype(dtype, np.integer) else values


def colours():
    """[16, 24, 3] with three different smooth channels."""
    grey = ramp()
    return np.stack([grey, grey[::-1], np.full_like(grey, 90)], axis=2)


def pixels(path, **kwargs):
    image = decode_image(path, **kwargs)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert image.flags.c_contiguous
    return image.astype(int)


def grey_as_rgb(values):
    return np.repeat(np.asarray(values).astype(int)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_rgb_is_unchanged(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(colours()).save(path)
    np.testing.assert_array_equal(pixels(path), colours())


def test_grey_fills_three_channels(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(ramp()).save(path)
    np.testing.assert_array_equal(pixels(path), grey_as_rgb(ramp()))


def test_bilevel(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(ramp() > 127).save(path)
    np.testing.assert_array_equal(pixels(path), grey_as_rgb((ramp() > 127) * 255))


def test_palette(tmp_path):
    path = tmp_path / "x.png"
    image = Image.fromarray((ramp() // 64).astype(np.uint8), mode="P")
    palette = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 150], [9, 8, 7]])
    image.putpalette(palette.flatten().tolist())
    image.save(path)
    np.testing.assert_array_equal(pixels(path), palette[ramp() // 64])


def test_transparency_shows_white(tmp_path):
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[:, :, 0] = 100
    rgba[:, 12:, 3] = 255
    rgba[:, 6:12, 3] = 51  # a fifth
    expected = np.full((HEIGHT, WIDTH, 3), 255)
    expected[:, 12:] = (100, 0, 0)
    expected[:, 6:12] = (224, 204, 204)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(pixels(tmp_path / "rgba.png"), expected, atol=1)

    grey_alpha = np.stack([ramp(), np.where(np.arange(WIDTH) < 12, 0, 255) + 0 * ramp()], axis=2)
    Image.fromarray(grey_alpha.astype(np.uint8), mode="LA").save(tmp_path / "la.png")
    expected = grey_as_rgb(ramp())
    expected[:, :12] = 255
    np.testing.assert_array_equal(pixels(tmp_path / "la.png"), expected)


def test_transparent_palette_entry_and_colour_key_show_white(tmp_path):
    image = Image.fromarray((ramp() // 128).astype(np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "palette.png", transparency=0)
    expected = np.where((ramp() < 128)[:, :, None], 255, [40, 50, 60])
    np.testing.assert_array_equal(pixels(tmp_path / "palette.png"), expected)

    grey = (ramp() // 128).astype(np.uint8) * 200
    Image.fromarray(grey).save(tmp_path / "key.png", transparency=0)
    np.testing.assert_array_equal(
        pixels(tmp_path / "key.png"), grey_as_rgb(np.where(grey == 0, 255, 200))
    )


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    cmyk = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    cmyk[:, :12, 0] = 255  # cyan ink takes away red
    cmyk[:, 12:, 3] = 127  # half black
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(cmyk, mode="CMYK").save(path)
    got = pixels(path)
    np.testing.assert_allclose(got[:, :8], np.broadcast_to([0, 255, 255], (16, 8, 3)), atol=6)
    np.testing.assert_allclose(got[:, 16:], np.broadcast_to([128, 128, 128], (16, 8, 3)), atol=6)


def test_lab_colours(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(colours()), srgb, lab, outputMode="LAB")
    image.save(tmp_path / "x.tif")
    # Eight bits of LAB are coarse for saturated colours.
    assert np.median(np.abs(pixels(tmp_path / "x.tif") - colours())) <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = ramp(np.uint16, 65535)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(values).save(path)
    expected = np.round(values / 65535 * 255)
    np.testing.assert_array_equal(pixels(path), grey_as_rgb(expected))


def test_dark_sixteen_bit_grey_is_not_stretched(tmp_path):
    values = ramp(np.uint16, 2570)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").max() == 10


def test_big_endian_sixteen_bit_pgm(tmp_path):
    values = ramp(np.uint16, 65535)
    (tmp_path / "x.pgm").write_bytes(b"P5 24 16 65535\n" + values.astype(">u2").tobytes())
    expected = np.round(values / 65535 * 255)
    np.testing.assert_array_equal(pixels(tmp_path / "x.pgm"), grey_as_rgb(expected))


def test_thirty_two_bit_grey_is_stretched(tmp_path):
    values = ramp(np.int32, 1_000_000) - 500_000
    Image.fromarray(values).save(tmp_path / "x.tif")
    expected = np.round((values + 500_000) / 1_000_000 * 255)
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif"), grey_as_rgb(expected))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 7.0)])
def test_float_grey(tmp_path, low, high):
    values = (ramp(np.float64, 1.0) * (high - low) + low).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    got = pixels(tmp_path / "x.tif")
    np.testing.assert_allclose(got, grey_as_rgb(np.round(ramp(np.float64, 255.0))), atol=1)


def test_a_constant_float_image_is_no_error(tmp_path):
    Image.fromarray(np.full((4, 4), 7.0, np.float32)).save(tmp_path / "x.tif")
    assert (pixels(tmp_path / "x.tif") == 0).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, dtype, suffix):
    stored = ramp(dtype, np.iinfo(dtype).max)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: np.rot90(stored, 2),
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: np.rot90(stored.T, 2),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif)
    expected = np.round(upright / np.iinfo(dtype).max * 255)
    np.testing.assert_array_equal(pixels(tmp_path / f"x.{suffix}"), grey_as_rgb(expected))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
    got = pixels(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(got, np.broadcast_to([255, 0, 0], (8, 8, 3)))


def test_multi_picture_jpeg(tmp_path):
    first, second = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "x.mpo", save_all=True, append_images=[second])
    assert ".mpo" in image_extensions()
    for side in (None, 12):
        got = pixels(tmp_path / "x.mpo", shortest_side=side)
        assert got.shape[0] == (48 if side is None else 12)
        np.testing.assert_allclose(got[0, 0], [254, 0, 0], atol=3)


def test_every_format_that_pillow_writes_is_read_back(tmp_path):
    smooth = Image.new("L", (64, 64), 140)
    read = set()
    for extension in sorted(image_extensions()):
        image_format = Image.registered_extensions()[extension]
        # What Pillow cannot write in a mode is not checked in that mode.
        for mode in ("L", "RGB", "P", "1", "F", "RGBA"):
            path = tmp_path / f"{mode}{extension}"
            try:
                smooth.convert(mode).save(path)
            except (KeyError, OSError, ValueError, SystemError):
                continue
            if mode in ("L", "RGB"):
                np.testing.assert_allclose(pixels(path), 140, atol=4, err_msg=extension)
                read.add(image_format)
            else:
                pixels(path)
    # The formats that any Pillow with its usual libraries writes in these modes.
    assert read >= {"BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP", "PCX", "SGI"}


def test_extensions_leave_out_what_needs_other_programs():
    extensions = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".jp2"} <= extensions
    assert not extensions & {".eps", ".h5", ".mpg", ".wmf", ".pdf"}


def test_jpeg_draft_keeps_the_shortest_side(tmp_path):
    x = np.linspace(0, 255, 640).astype(np.uint8)
    Image.fromarray(np.broadcast_to(x, (480, 640)).copy()).save(tmp_path / "x.jpg")
    assert decode_image(tmp_path / "x.jpg").shape == (480, 640, 3)
    assert decode_image(tmp_path / "x.jpg", shortest_side=100).shape == (120, 160, 3)
    assert decode_image(tmp_path / "x.jpg", shortest_side=240).shape == (240, 320, 3)
    assert decode_image(tmp_path / "x.jpg", shortest_side=241).shape == (480, 640, 3)
    assert decode_image(tmp_path / "x.jpg", shortest_side=5000).shape == (480, 640, 3)
    small = pixels(tmp_path / "x.jpg", shortest_side=240)
    np.testing.assert_allclose(small[100, :, 0], np.linspace(0, 255, 320), atol=3)


def photo(height=61, width=83, mode="RGB"):
    """Slow colours and a little noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    values = np.array(coarse.resize((width, height))) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


def both_ways(monkeypatch, path, **kwargs):
    """What libjpeg-turbo makes of a file, and what Pillow does."""
    used = []
    decode = simplejpeg.decode_jpeg
    with monkeypatch.context() as patch:
        patch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: used.append(1) or decode(*a, **k))
        fast = pixels(path, **kwargs)
        patch.setattr("fastssl.data.decode.simplejpeg", None)
        slow = pixels(path, **kwargs)
    assert used == [1]
    return fast, slow


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}]
)
@pytest.mark.parametrize("shortest_side", [None, 31, 30, 9, 7])
def test_libjpeg_turbo_gives_pillows_pixels(tmp_path, monkeypatch, mode, options, shortest_side):
    photo(mode=mode).save(tmp_path / "x.jpg", quality=85, **options)
    fast, slow = both_ways(monkeypatch, tmp_path / "x.jpg", shortest_side=shortest_side)
    assert fast.shape == {None: (61, 83, 3), 31: (61, 83, 3), 30: (31, 42, 3)}.get(
        shortest_side, {9: (16, 21, 3), 7: (8, 11, 3)}.get(shortest_side)
    )
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_libjpeg_turbo_turns_pictures_as_pillow_does(tmp_path, monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / "x.jpg", exif=exif)
    fast, slow = both_ways(monkeypatch, tmp_path / "x.jpg", shortest_side=30)
    np.testing.assert_array_equal(fast, slow)


def test_pillow_decodes_and_judges_what_libjpeg_turbo_does_not(tmp_path, monkeypatch):
    photo(mode="CMYK").save(tmp_path / "cmyk.jpg")
    photo().save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert pixels(tmp_path / "cmyk.jpg").shape == (61, 83, 3)
    with pytest.raises(BrokenImage, match="truncated"):
        decode_image(tmp_path / "cut.jpg")

    def fails(*args, **kwargs):
        raise ValueError("a marker that only Pillow forgives")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fails)
    assert pixels(tmp_path / "x.jpg").shape == (61, 83, 3)


def encoded(suffix, **options):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=suffix, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.9])
def test_truncated_file(tmp_path, suffix, keep):
    data = encoded(suffix)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BrokenImage) as caught:
        decode_image(path)
    assert caught.value.path == str(path) and caught.value.reason
    assert str(path) in str(caught.value) and caught.value.reason in str(caught.value)


def test_damaged_middle(tmp_path):
    data = bytearray(encoded("png"))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(BrokenImage):
        decode_image(tmp_path / "x.png")


def test_no_image_at_all(tmp_path):
    (tmp_path / "x.jpg").write_text("not an image")
    with pytest.raises(BrokenImage, match="cannot identify"):
        decode_image(tmp_path / "x.jpg")
    with pytest.raises(BrokenImage, match="No such file"):
        decode_image(tmp_path / "missing.jpg")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(BrokenImage, match="decompression bomb"):
        decode_image(tmp_path / "x.png")
    # Between the limit and twice the limit Pillow warns and reads.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert decode_image(tmp_path / "x.png").shape == (100, 100, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
def test_random_bytes_after_a_valid_header_never_escape(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpeg", "gif", "tiff", "webp", "bmp"):
        data = encoded(suffix)
        for trial in range(10):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 20):
                damaged[position] = rng.integers(0, 256)
            path = tmp_path / f"{trial}.{suffix}"
            path.write_bytes(damaged)
            try:
                pixels(path)
            except BrokenImage:
                continue
