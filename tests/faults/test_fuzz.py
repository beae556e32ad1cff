"""Malformed images and configurations: a value, or an error with a sentence, and nothing else."""

from __future__ import annotations

import functools
import io
import json
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import cli
from fastssl.data.decode import BrokenImage, decode_image
from fastssl.data.folder import ImageFiles, list_images
from fastssl.training import recipes, setup
from fastssl.training.config import Config, keys, load
from fastssl.training.loop import train
from tests.training.tiny import make_images, tiny_config

# A few in `make test`, many in `make test-all`.
CASES = [
    pytest.param(40, id="40"),
    pytest.param(1000, id="1000", marks=pytest.mark.slow),
]
FORMATS = {
    ".png": {},
    ".jpg": {"quality": 80},
    ".gif": {},
    ".tif": {"compression": "tiff_lzw"},
    ".webp": {},
    ".bmp": {},
}


def valid_images():
    """[(suffix, bytes)], with what makes decoders branch: EXIF, palettes, transparency, 16 bits."""
    y, x = np.mgrid[0:24, 0:32]
    pixels = np.stack([x * 8, y * 10, (x + y) * 4], axis=-1).astype(np.uint8)
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6
    found = []
    for suffix, options in FORMATS.items():
        kinds = [(picture, {}), (picture.convert("L"), {})]
        if suffix in (".jpg", ".png", ".webp", ".tif"):
            kinds.append((picture, {"exif": exif}))
        if suffix in (".png", ".gif"):
            kinds.append((picture.convert("P"), {"transparency": 3}))
        if suffix in (".png", ".tif"):
            kinds.append((Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}))
        if suffix in (".png", ".webp"):
            kinds.append((picture.convert("RGBA"), {}))
        for image, more in kinds:
            stream = io.BytesIO()
            image.save(stream, Image.registered_extensions()[suffix], **options, **more)
            found.append((suffix, stream.getvalue()))
    return found


def mutated(content, draw):
    """One to four random edits of some bytes."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        length = draw.choice([1, 1, 2, 4, 16, 64])
        noise = draw.choice([b"\x00", b"\xff", b"\x80\x7f", draw.randbytes(length)]) * length
        edit = draw.randrange(5)
        if edit == 0:
            content[at : at + length] = noise[:length]
        elif edit == 1:
            content[at:at] = noise[:length]
        elif edit == 2:
            del content[at : at + length]
        elif edit == 3:
            del content[max(at, 1) :]
        else:  # near the start are the headers
            at = draw.randrange(min(64, len(content) + 1))
            content[at : at + 2] = draw.randbytes(2)
    return bytes(content)


def make_mutants(folder, number, seed):
    draw, images = random.Random(seed), valid_images()
    folder.mkdir()
    for i in range(number):
        suffix, content = draw.choice(images)
        (folder / f"{i:04d}{suffix}").write_bytes(mutated(content, draw))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", CASES)
def test_malformed_images(tmp_path, monkeypatch, number):
    # A header that claims millions of pixels is refused before they are made.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)
    folder = make_mutants(tmp_path / "mutants", number, seed=number)
    draw, read, broken = random.Random(number), 0, 0
    for path in sorted(folder.iterdir()):
        try:
            image = decode_image(path, shortest_side=draw.choice([None, 8]))
        except BrokenImage as error:
            broken += 1
            assert error.path == str(path) and error.reason.strip(), path
        else:
            read += 1
            assert image.dtype == np.uint8 and image.size > 0 and image.shape[2:] == (3,), path
    print(f"{number} malformed images: {read} read, {broken} refused")
    assert read >= number // 10 and broken >= number // 10
    (folder / "good.png").write_bytes(valid_images()[0][1])
    files = ImageFiles(*list_images(folder)[:2])
    for position in range(len(files)):
        found, image = files.read_or_next(position)
        assert image.shape[2:] == (3,) and files.path(found) not in files.skipped
    assert len(files.skipped) >= number // 10 and all(files.skipped.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_report")
def test_a_run_on_malformed_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)
    folder = make_mutants(tmp_path / "mutants", 40, seed=1)
    make_images(folder, 2)
    run = train(tiny_config(folder, tmp_path, "train.steps=8", "eval.max_images=0"))
    skipped = json.loads((run / "skipped.json").read_text())
    assert len(skipped) >= 4 and all(reason.strip() for reason in skipped.values())


VALUES = [
    *("", " ", "null", "~", "-1", "0", "1e999", "-.inf", ".nan", "0x10", "1_000", "9" * 40),
    *("true", "off", "[]", "{}", "[1, 2", "{a: 1", "[[1]]", "{1: 2}", "[null]", "a: b", "- a"),
    *("${x}", "${train.steps}", "${oc.env:HOME}", "${", "$", "???", "&a b", "*a", "!!int x"),
    *("!!python/object/apply:os.getcwd []", "!x y", "|", ">", "'", '"', "\t", "%", "@", "`", "#"),
    *("é", "\x00", "\u2028", "𝔘", "a\nb", "2020-01-01", "12:30:45", "null, null", "<<: 1"),
    *("0.5", "[0.5, 0.1]", "[1, 1, 1]", "{base: 1}", "{base: x}", "{name: nothing}", "[{size: 1}]"),
]


def mutated_text(text, draw):
    """One to three random edits of a YAML file."""
    for _ in range(draw.randint(1, 3)):
        lines = text.split("\n")
        line, at = draw.randrange(len(lines)), draw.randrange(len(text) + 1)
        edit = draw.randrange(8)
        if edit == 0:
            text = text[:at] + draw.choice(VALUES) + text[at:]
        elif edit == 1:
            text = text[:at] + text[at + draw.randint(1, 20) :]
        elif edit == 2:
            text = text[:at]
        elif edit == 3:
            key, colon, _ = lines[line].partition(":")
            lines[line] = f"{key}{colon or ':'} {draw.choice(VALUES)}"
        elif edit == 4:
            lines[line] = " " * draw.randint(0, 5) + lines[line].strip()
        elif edit == 5:
            lines.insert(line, draw.choice(lines))
        elif edit == 6:
            lines[line] = lines[line].replace(":", draw.choice(["", "=", "::", ": -"]))
        else:
            del lines[line]
        if edit > 2:
            text = "\n".join(lines)
    return text


def mutated_override(names, draw):
    name = draw.choice(names)
    if draw.random() < 0.2:
        name = mutated_text(name, draw)
    return f"{name}{draw.choice(['=', '=', '=', '=', '', '==', '+=', '.='])}{draw.choice(VALUES)}"


@functools.cache
def names_of_overrides(recipe, free):
    """The keys that every configuration has and some that none has, or the arguments of a recipe's
    own method and model, which are checked by these."""
    if not free:
        names = [key.name for key in keys(Config())]
        return [*names, "method.args.x", "nothing", "train.nothing", "a.b.c", "0", "[0]"]
    config = load(recipe)
    return [f"method.args.{k}" for k in config.method.args] + [
        f"model.args.{k}" for k in config.model.args
    ]


def check_load(recipe, overrides, case):
    """Whether it is a configuration; if not, the error says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = load(recipe, overrides)
            # What is checked where it is used.
            setup.scheduled(config, 0)
            arguments = (*config.model.args.values(), *config.method.args.values())
            # 10**40 blocks would be built, were there the time.
            if not any(isinstance(value, int) and value > 10**6 for value in arguments):
                with torch.device("meta"):
                    setup.method_of(config, num_samples=1000, steps_per_epoch=10)
    except cli.SAID as error:
        assert len(str(error).split()) >= 3, f"{case}: {error!r}"
        return False
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__} without a sentence") from error
    return True


@pytest.mark.parametrize("number", CASES)
def test_malformed_recipes(tmp_path, number):
    draw, names, good = random.Random(number), recipes.names(), 0
    for i in range(number):
        text = mutated_text(recipes.find(draw.choice(names)).read_text(), draw)
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        good += check_load(str(path), [], (i, text))
    print(f"{number} malformed recipes: {good} valid, {number - good} refused")
    assert number // 20 <= good <= number * 19 // 20


@pytest.mark.parametrize("number", CASES)
def test_malformed_overrides(number):
    draw, good = random.Random(number), 0
    small = [name for name in recipes.names() if name.startswith("photos")]
    for i in range(number):
        recipe = draw.choice(small)
        names = names_of_overrides(recipe, free=draw.random() < 0.5)
        overrides = [mutated_override(names, draw) for _ in range(draw.randint(1, 2))]
        good += check_load(recipe, overrides, (i, recipe, overrides))
    print(f"{number} malformed overrides: {good} valid, {number - good} refused")
    assert number // 50 <= good <= number * 19 // 20


@pytest.mark.parametrize(
    "recipe, override, sentence",
    [
        ("photos_ijepa", "method.args.target_scale=0.5", "method.args do not fit ijepa: 'float'"),
        ("photos_ijepa", "model.args.depth=0", "method.args do not fit ijepa: index 0"),
        (
            "photos_npid",
            "method.args.temperature=[1]",
            "method.args.temperature must be float, got",
        ),
        ("photos_npid", "method.args.output_dim=-1", "method.args.output_dim must not be negative"),
        ("photos_ibot", "method.args.patch_weight=abc", "method.args.patch_weight must be float"),
        ("photos_dino", "method.args.norm_last_layer=flase", "method.args.norm_last_layer must be"),
        ("photos", "model.args.norm_pix_loss=3", "model.args.norm_pix_loss must be bool, got 3"),
        ("photos_ijepa", "model.args.depth=1.5", "model.args.depth must be int, got 1.5"),
        ("photos", "optim.clip_grad=-1", "optim.clip_grad must be positive, got -1.0"),
        ("photos", "schedules.lr.base=-1", "schedules.lr.base must not be negative, got -1.0"),
        (
            "photos_simclr",
            "model={name: mae_vit_base_patch16, args: {}}",
            "model.name must build an encoder that returns a feature vector [B, D] for method sim",
        ),
        ("photos_simclr", "model.args.width=-1", "model.args.width must not be negative, got -1"),
        ("photos", "model.args.embed_dim='%'", "model.args.embed_dim must be int, got '%'"),
    ],
)
def test_arguments_of_methods_and_models_that_are_no_such_thing(recipe, override, sentence, capsys):
    assert cli.main([recipe, override, "name=never"]) == 1
    assert capsys.readouterr().err.startswith(f"fastssl-train: error: {sentence}")
