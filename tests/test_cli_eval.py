"""fastssl-eval: its numbers are those of the measures, on one process or two; its errors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastssl import cli_eval
from fastssl.data.crops import Request
from fastssl.data.labelled import build_labelled
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from fastssl.data.views import View
from fastssl.distributed import World
from fastssl.evaluation import (
    FineTuneOptions,
    SGDOptions,
    attentive_probe,
    feature_std,
    knn_accuracies,
    linear_probe_accuracy,
    low_shot_accuracy,
    rankme,
    sgd_probe,
    uniformity,
)
from fastssl.evaluation.encoder import Encoder
from fastssl.evaluation.run import Options, ShuffledBatches
from fastssl.models import load_pretrained
from fastssl.training import loop
from fastssl.training.config import load
from tests.training.tiny import make_images, tiny_config

MODEL = "{patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
FAST = ["--probe-args", "{epochs: 2, lrs: [0.01, 0.3], batch_size: 16}"]
FAST += ["--fine-tune-args", "{epochs: 1, warmup_epochs: 0, layer_decay: 1.0}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, evaluated by the trainer on halves of pictures."""
    out = tmp_path_factory.mktemp("runs")
    images = make_images(out / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda folder: None)
        return loop.train(tiny_config(images, out, "train.steps=2", "name=tiny"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Noise of three colours that overlap, 20 pictures each, and a broken file."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir()
        for i in range(20):
            color = 110 + 15 * label + rng.normal(0, 12, 3)
            pixels = np.clip(color + rng.normal(0, 30, (24, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "bee" / "broken.png").write_bytes(b"not a picture")
    return root


def evaluate(*words, file):
    assert cli_eval.main([*map(str, words), "--device", "cpu", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def sets_by_hand(function, data, image_size=16):
    """function(images), labels, ... of the train and the test set, without a loader."""
    for dataset in build_labelled(data, image_size=image_size):
        batch = dataset[Request(torch.arange(len(dataset)))]
        with torch.no_grad():
            yield function(normalize(batch.images, IMAGENET_MEAN, IMAGENET_STD))
        yield batch.labels


def test_numbers_are_those_of_direct_calls(run, labelled, tmp_path, capsys):
    measures = "knn linear probe attentive low-shot rankme uniformity std".split()
    words = [run, "--data", labelled, *FAST, "--seeds", 3, 4, "--labels-per-class", 2]
    got = evaluate(*words, "--measures", *measures, file=tmp_path / "out.json")
    text = capsys.readouterr().out

    config = load(str(run / "config.yaml"))
    from fastssl.models import MaskedAutoencoderViT

    model = MaskedAutoencoderViT(img_size=16, **config.model.args).eval()
    load_pretrained(model, run / "weights.pth", strict=True)
    sets = list(sets_by_hand(model.features, labelled))
    token_sets = list(sets_by_hand(model.forward_features, labelled))
    options = SGDOptions(epochs=2, lrs=(0.01, 0.3), batch_size=16)
    values = got["measures"]
    assert list(values) == measures
    assert values["knn"] == {str(k): v for k, v in knn_accuracies(*sets).items()}
    assert values["linear"] == linear_probe_accuracy(*sets)
    probe = sgd_probe(*sets, options)
    assert values["probe"]["accuracy"] == probe.accuracy
    assert values["probe"]["held_out"] == {str(lr): v for lr, v in probe.held_out.items()}
    attentive = attentive_probe(*token_sets, options)
    assert values["attentive"]["test"] == {str(lr): v for lr, v in attentive.test.items()}
    few = low_shot_accuracy(*sets, per_class=2, seeds=(3, 4))
    assert list(values["low-shot"]) == ["2 per class"]
    for kind, spread in few.items():
        assert values["low-shot"]["2 per class"][kind]["values"] == list(spread.values)
    for name, function in (("rankme", rankme), ("std", feature_std), ("uniformity", uniformity)):
        assert values[name] == pytest.approx(function(sets[2]), rel=1e-4), name
    assert 35 < values["linear"] < 100, "a case with errors in it"

    assert got["classes"] == ["ant", "bee", "cat"]
    assert (got["train"], got["test"], got["features"], got["image_size"]) == (49, 12, 16, 16)
    assert [Path(path).name for path in got["skipped"]] == ["broken.png"]
    assert str(run) in got["encoder"] and got["data"] == str(labelled)
    for label, value in (("linear", values["linear"]), ("knn, k = 10", values["knn"]["10"])):
        assert re.search(rf"^{label} +{value:.2f} %$", text, re.MULTILINE)
    assert "1 broken files were skipped" in text and "broken.png" in text


def test_photographs_are_judged_as_the_trainer_did(run, tmp_path, monkeypatch):
    """The same crops of the same pictures: the numbers in metrics.jsonl."""
    images = run.parent / "images"
    files = sorted(path.name for path in images.iterdir())
    monkeypatch.setattr("fastssl.data.build.list_photos", lambda: (images, files))
    words = [run, "--data", "photos", "--batch-size", 8, "--measures", "knn", "linear", "rankme"]
    got = evaluate(*words, "std", "alignment", file=tmp_path / "out.json")["measures"]
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "eval"
    for name, value in (("knn", got["knn"]["20"]), ("linear", got["linear"])):
        assert value == last[name], name
    assert got["rankme"] == pytest.approx(last["rankme"])
    assert got["std"] == pytest.approx(last["feature_std"])
    assert 0 < got["alignment"] < 4


def test_alignment_is_of_two_views(run, labelled, tmp_path):
    words = [run, "--data", labelled, "--measures", "alignment"]
    got = evaluate(*words, file=tmp_path / "out.json")["measures"]["alignment"]
    config = tmp_path / "still" / "config.yaml"
    config.parent.mkdir()
    text = (run / "config.yaml").read_text()
    assert "scale: null\n  ratio: null\n  flip: null" in text
    still = "scale: [1.0, 1.0]\n  ratio: [0.83, 0.84]\n  flip: 0.0"
    config.write_text(text.replace("scale: null\n  ratio: null\n  flip: null", still))
    (config.parent / "weights.pth").write_bytes((run / "weights.pth").read_bytes())
    words[0] = config.parent
    same = evaluate(*words, file=tmp_path / "out.json")["measures"]["alignment"]
    assert same < 0.05 * got, "views that hardly differ"


def all_measures(words, file):
    torch.set_num_threads(1)
    assert cli_eval.main(words) == 0
    return json.loads(Path(file).read_text()) if file else None


def test_two_processes_equal_one(run, labelled, tmp_path, gloo_pool):
    words = [str(run), "--data", str(labelled), "--batch-size", "16", "--device", "cpu", *FAST]
    words += ["--labels-per-class", "2", "--measures", "knn", "linear", "probe", "attentive"]
    words += ["low-shot", "fine-tune", "rankme", "alignment", "uniformity", "std"]
    results = []
    for size in (1, 2):
        file = str(tmp_path / f"{size}.json")
        results.append(gloo_pool.run(all_measures, size, [*words, "--json", file], file)[0])
    one, two = results
    for name in ("rankme", "alignment", "uniformity", "std"):
        assert two["measures"].pop(name) == pytest.approx(one["measures"].pop(name), rel=1e-9)
    assert two == one


def test_a_rank_without_images(run, labelled, tmp_path, gloo_pool):
    file = str(tmp_path / "out.json")
    words = [str(run), "--data", str(labelled), "--device", "cpu", "--json", file]
    two = gloo_pool.run(all_measures, 2, words, file)[0]
    one = evaluate(run, "--data", labelled, file=tmp_path / "one.json")
    assert two["measures"]["knn"] == one["measures"]["knn"]
    assert two["measures"]["rankme"] == pytest.approx(one["measures"]["rankme"], rel=1e-4)


def test_digits_with_few_labels(run, tmp_path, capsys):
    words = [run, "--data", "digits", "--measures", "low-shot", "--seeds", 0]
    words += ["--labels-per-class", 1, 5, 1000, "--fractions", 0.1]
    got = evaluate(*words, file=tmp_path / "out.json")
    rows = got["measures"]["low-shot"]
    every = "1000 per class (all, 146 at most)"
    assert list(rows) == ["1 per class", "5 per class", every, "10 %"]
    means = [rows[name]["linear"]["mean"] for name in ("1 per class", "5 per class", "10 %", every)]
    assert means == sorted(means) and means[-1] > 25, "more labels, more known"
    assert rows["10 %"]["linear"]["std"] is None, "one seed has no deviation, and JSON no nan"
    assert "low-shot, 5 per class, prototype" in capsys.readouterr().out


def test_batches_of_fine_tuning_are_new_each_epoch_and_shared_by_ranks(labelled):
    train = build_labelled(labelled, image_size=16)[0].seen_through([View((16, 16))])
    options = Options(fine_tune=FineTuneOptions(batch_size=20))

    def epochs(size):
        """[epoch][rank][batch] of images and labels."""
        worlds = [World(rank, size, torch.device("cpu")) for rank in range(size)]
        of_ranks = [ShuffledBatches(train, options, world) for world in worlds]
        return [[list(batches) for batches in of_ranks] for _ in range(2)]

    alone, shared = epochs(1), epochs(3)
    for one, many in zip(alone, shared, strict=True):
        assert sum(len(labels) for _, labels in one[0]) == 48, "all but the broken file"
        for i, whole in enumerate(one[0]):
            for part, expected in zip(
                zip(*(rank[i] for rank in many), strict=True), whole, strict=True
            ):
                assert torch.equal(torch.cat(part), expected)
    first, second = (torch.cat([labels for _, labels in one[0]]) for one in alone)
    assert not torch.equal(first, second), "another order"
    sums = [{x.sum().item() for images, _ in one[0] for x in images} for one in alone]
    assert not sums[0] & sums[1], "other crops"


def test_broken_files_of_fine_tuning_are_reported_and_keep_step(labelled, run, tmp_path):
    root = tmp_path / "labelled"
    for part, numbers in (("train", range(4)), ("val", range(4, 8))):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for i in numbers:
                (root / part / name / f"{i}.png").write_bytes(
                    (labelled / name / f"{i}.png").read_bytes()
                )
    for i in range(2):
        (root / "train" / "ant" / f"{i}.png").write_bytes(b"not a picture")
    words = [run, "--data", root, "--measures", "fine-tune", "--fine-tune-args"]
    words += ["{epochs: 1, warmup_epochs: 0, batch_size: 1}"]
    got = evaluate(*words, file=tmp_path / "out.json")
    assert sorted(Path(path).name for path in got["skipped"]) == ["0.png", "1.png"]
    train = build_labelled(root, image_size=16)[0].seen_through([View((16, 16))])
    for size in (1, 2):
        worlds = [World(rank, size, torch.device("cpu")) for rank in range(size)]
        options = Options(fine_tune=FineTuneOptions(batch_size=1))
        counts = [
            [len(labels) for _, labels in ShuffledBatches(train, options, world)]
            for world in worlds
        ]
        assert [len(of_rank) for of_rank in counts] == [8] * size
        assert sum(map(sum, counts)) == 6


def test_fine_tuning_learns_and_leaves_the_frozen_encoder(run, labelled, tmp_path):
    words = [run, "--data", labelled, "--fine-tune-args"]
    words += ["{epochs: 5, warmup_epochs: 0, lr: 0.01, layer_decay: 1.0, batch_size: 8}"]
    words += ["--measures", "fine-tune", "knn"]
    got = evaluate(*words, file=tmp_path / "out.json")["measures"]
    assert got["fine-tune"] > 55
    alone = evaluate(*words[:-2], "knn", file=tmp_path / "out.json")["measures"]
    assert alone["knn"] == got["knn"]


@pytest.fixture
def released(tmp_path):
    """Weights without position or head for a tiny ViT."""
    from fastssl.models import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    return model.eval(), tmp_path / "vit.pth"


def test_released_weights(released, labelled, tmp_path):
    model, weights = released
    words = ["--model", "VisionTransformer", "--weights", weights, "--model-args", MODEL]
    words += ["--image-size", 16, "--data", labelled]
    got = evaluate(*words, file=tmp_path / "out.json")
    sets = list(sets_by_hand(model, labelled))
    assert got["measures"]["knn"] == {str(k): v for k, v in knn_accuracies(*sets).items()}
    of_patches = list(sets_by_hand(model.features, labelled))
    assert knn_accuracies(*of_patches) != knn_accuracies(*sets), "the class token, not patches"
    assert list(got["measures"]) == ["knn", "linear", "rankme", "std"]


def test_released_masked_autoencoders_need_no_decoder(run, labelled, tmp_path, capsys):
    state = torch.load(run / "weights.pth")["model"]
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save(encoder, tmp_path / "mae.pth")
    args = json.dumps(load(str(run / "config.yaml")).model.args)
    words = ["--model", "MaskedAutoencoderViT", "--weights", tmp_path / "mae.pth"]
    words += ["--model-args", args, "--image-size", 16, "--data", labelled, "--measures", "knn"]
    got = evaluate(*words, file=tmp_path / "out.json")["measures"]
    own = evaluate(run, "--data", labelled, "--measures", "knn", file=tmp_path / "own.json")
    assert got == own["measures"]
    # What is judged must be there.
    del encoder["norm.weight"]
    torch.save(encoder, tmp_path / "mae.pth")
    capsys.readouterr()
    assert cli_eval.main([*map(str, words), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "--weights must hold all of the encoder" in error and "norm.weight" in error


def test_precision_is_that_of_the_run(run, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "weights.pth").write_bytes((run / "weights.pth").read_bytes())
    text = (run / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("precision: fp32", "precision: bf16"))
    parser = cli_eval.build_parser()
    world = World(0, 1, torch.device("cpu"))
    half, full = (
        cli_eval.load_subject(parser.parse_args([]), str(path), world).encoder
        for path in (folder, run)
    )
    assert (half.dtype, full.dtype) == (torch.bfloat16, None)
    images = torch.randn(3, 3, 16, 16)
    assert not (half.training or full.training)
    a, b = half(images), full(images)
    assert a.dtype == torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def test_missing_parts_are_named(run, tmp_path, capsys):
    def fails(*words):
        assert cli_eval.main([str(word) for word in words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastssl-eval: error: ") and len(error.splitlines()) == 1
        return error

    assert "has no config.yaml" in fails(tmp_path, "--data", "digits")
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "has no weights.pth" in fails(tmp_path, "--data", "digits")
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 4)}}, tmp_path / "weights.pth")
    assert "weights.pth does not fit" in fails(tmp_path, "--data", "digits")
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 16)}}, tmp_path / "weights.pth")
    assert "is not exactly MaskedAutoencoderViT" in fails(tmp_path, "--data", "digits")
    assert "one of RUN and --model must be given, got neither" in fails("--data", "digits")
    assert "got both" in fails(run, "--data", "digits", "--model", "vit_tiny")
    assert "--model needs --weights" in fails("--data", "digits", "--model", "vit_tiny")
    assert "--data must be given" in fails(run)
    assert "measures must be among knn" in fails(run, "--data", "digits", "--measures", "nn")
    assert "--data must be a folder of labelled images, digits or photos, got /nowhere" in fails(
        run, "--data", "/nowhere"
    )
    assert "unrecognized arguments: --bad" in fails(run, "--data", "digits", "--bad")
    assert "batch_size must be at least 1" in fails(run, "--data", "digits", "--batch-size", 0)
    assert "epoch" in fails(run, "--data", "digits", "--probe-args", "{epoch: 1}")
    assert "--fine-tune-args must be" in fails(run, "--data", "digits", "--fine-tune-args", "[1]")
    fine_tune = [run, "--data", "digits", "--fine-tune-args"]
    assert "betas must be two numbers, got 3" in fails(*fine_tune, "{betas: 3}")
    assert "dtype must be a torch.dtype" in fails(*fine_tune, "{dtype: bfloat16}")
    assert "--json must be a file in a folder" in fails(run, "--data", "digits", "--json", tmp_path)
    low_shot = [run, "--data", "digits"]
    assert "labels_per_class must be at" in fails(*low_shot, "--labels-per-class", 0)
    assert "fractions must be in (0, 1], got 1.5" in fails(*low_shot, "--fractions", 1.5)
    for text, said in (
        ("a: [", "config.yaml is not YAML"),
        ("- a", "config.yaml must hold keys and values"),
        ("model: {args: {depth: many}}", "model.args.depth must be int, got 'many'"),
        ("method: {args: {mask_ratio: x}}", "config.yaml must describe a method"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert said in fails(tmp_path, "--data", "digits"), text
    assert "--device" in cli_eval.build_parser().format_help()
    with pytest.raises(ValueError, match="must be given"):
        cli_eval.main([str(run), "--traceback"])


def test_ranks_say_it_once(run, gloo_pool, monkeypatch, capfd):
    """Before the group exists, and in it."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli_eval.main([str(run)]) == 1
    assert capfd.readouterr().err == ""
    words = [str(run), "--data", "digits", "--device", "cpu", "--json", "/nowhere/out.json"]
    assert sorted(gloo_pool.run(error_of, 2, words))[0] == ""
    assert "--json must be" in sorted(gloo_pool.run(error_of, 2, words))[1]


def error_of(words):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert cli_eval.main(words) == 1
    return err.getvalue()


def test_the_encoder_is_all_that_is_built_in_full(run, tmp_path, monkeypatch):
    """A run on millions of samples needs no bank for them, and more prototypes than usual fit."""
    from fastssl.training import setup, trained

    build, numbers = setup.build_method, []

    def watched(*args, num_samples, **kwargs):
        numbers.append(num_samples)
        return build(*args, num_samples=num_samples, **kwargs)

    monkeypatch.setattr(setup, "build_method", watched)
    for name in ("config.yaml", "weights.pth"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    state = tmp_path / "checkpoints" / "latest" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"position": {"the number of samples in data": 10**9}}))
    parser = cli_eval.build_parser()
    cli_eval.load_subject(parser.parse_args([]), str(tmp_path), World(0, 1, torch.device("cpu")))
    assert numbers == [1 << 16]
    assert trained._num_samples({"n_prototypes": 10**5}) == 10**5


def test_image_size_is_that_of_all_views(run):
    world = World(0, 1, torch.device("cpu"))
    arguments = cli_eval.build_parser().parse_args(["--image-size", "24"])
    subject = cli_eval.load_subject(arguments, str(run), world)
    assert subject.image_size == 24
    assert {view.size for view in subject.views} == {(24, 24)}


def test_missing_packages_are_named_with_the_remedy(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastssl.training", None)
    assert cli_eval.main([str(run), "--data", "digits"]) == 1
    assert 'pip install "fastssl[train]"' in capsys.readouterr().err


class Map(nn.Module):
    """An encoder whose tokens are a map, [B, 3, 2, 2]."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1), requires_grad=False)

    def forward_features(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2) * self.scale

    def forward(self, images):
        return self.forward_features(images).mean((2, 3))


def test_encoder():
    images = torch.randn(2, 3, 4, 4)
    encoder = Encoder(Map())
    tokens = encoder.tokens(images)
    assert tokens.shape == (2, 4, 3)
    torch.testing.assert_close(tokens.mean(1), encoder(images))
    torch.testing.assert_close(tokens[:, 1], images[:, :, :2, 2:].mean((2, 3)))
    # A teacher is frozen; its copy is trained, without it.
    copied = encoder.trainable_copy()
    copied(images).sum().backward()
    with torch.no_grad():
        copied.model.scale.zero_()
    assert copied.model.scale.grad.abs().sum() > 0 and not copied(images).any()
    assert encoder(images).any() and not encoder.model.scale.requires_grad
    with pytest.raises(ValueError, match="Flatten has no forward_features"):
        Encoder(nn.Flatten()).check_tokens()
    with pytest.raises(ValueError, match=r"shape \[B, D\], got \[2, 3, 4, 4\]"):
        Encoder(nn.Identity())(images)


def test_features_that_are_not_finite(run, labelled, tmp_path, capsys):
    state = torch.load(run / "weights.pth")
    state["model"]["norm.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert cli_eval.main([str(tmp_path), "--data", str(labelled), "--device", "cpu"]) == 1
    assert "features must be finite" in capsys.readouterr().err
