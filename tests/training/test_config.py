"""Configuration: what is read, and how mistakes are named."""

import dataclasses

import pytest
import torch

from fastssl.training import recipes
from fastssl.training.config import Config, check, describe, dump, keys, load, nearest
from fastssl.training.setup import method_of, scheduled


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("train: {steps: 7}\nmodel:\n  args: {depth: 2, sizes: [1, 2]}\n")
    return str(path)


def test_file_then_overrides_then_defaults(recipe):
    config = load(recipe, ["train.accumulation=2", "schedules.lr.base=1e-3", "data=/some/where"])
    assert config.name == "small"
    assert (config.train.steps, config.train.accumulation) == (7, 2)
    assert config.schedules.lr.base == 1e-3
    assert config.schedules.lr.final == 0.0, "the rest of a group keeps its defaults"
    assert config.train.global_batch_size == Config().train.global_batch_size
    assert config.data == "/some/where"
    assert isinstance(config, Config)


def test_free_arguments_are_merged(recipe):
    config = load(recipe, ["model.args.depth=3", "model.args.width=8"])
    assert config.model.args == {"depth": 3, "width": 8, "sizes": [1, 2]}


def test_optional_group_appears_with_its_first_key(recipe):
    assert load(recipe).schedules.teacher_temp is None
    schedule = load(recipe, ["schedules.teacher_temp.base=0.07"]).schedules.teacher_temp
    assert (schedule.base, schedule.kind) == (0.07, "cosine")
    back = load(recipe, ["schedules.teacher_temp.base=0.07", "schedules.teacher_temp=null"])
    assert back.schedules.teacher_temp is None


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.step=3", ["train.step;", "nearest is train.steps"]),
        ("trian.steps=3", ["trian;", "nearest is train"]),
        ("learning_rate.warmup_steps=3", ["learning_rate;", "nearest is"]),
        ("schedules.lr.warmup=3", ["schedules.lr.warmup;", "nearest is schedules.lr.warmup_steps"]),
        ("train.steps=abc", ["train.steps must be int", "'abc' (str)"]),
        ("train.steps=1.5", ["train.steps must be int", "1.5 (float)"]),
        ("train.steps=null", ["train.steps must be int", "None"]),
        ("train.compile=maybe", ["train.compile must be bool", "'maybe' (str)"]),
        ("optim.betas=3", ["optim.betas must be list[float]", "3 (int)"]),
        ("optim.betas=[a, b]", ["optim.betas must be list[float]", "['a', 'b'] (list)"]),
        ("optim.clip_grad=x", ["optim.clip_grad must be float | null", "'x' (str)"]),
        ("model.args=3", ["model.args must be dict[str, Any]", "3 (int)"]),
        ("train=3", ["train must be a group of keys (steps, ", "got 3"]),
        ("train.precision=fp16", ["train.precision must be one of fp32, bf16, auto", "'fp16'"]),
        ("train.precision=b16", ["nearest is bf16"]),
        ("schedules.lr.kind=cosin", ["schedules.lr.kind must be one of", "nearest is cosine"]),
        ("train.steps", ["must look like key.sub=value", "'train.steps'"]),
        ("views.scale=[0.2", ["'views.scale=[0.2'", "YAML"]),
        ("views.image_size=big", ["views.image_size must be", "'big'"]),
        ("views.image_size=[8, 8, 8]", ["views.image_size must be", "[8, 8, 8]"]),
        ("views.scale=[0.2]", ["views.scale must have 2 values", "[0.2]"]),
        ("log.every=0", ["log.every must be at least 1", "got 0"]),
        ("train.steps=-1", ["train.steps must not be negative", "got -1"]),
        ("views.crops_per_image=0", ["views.crops_per_image must be at least 1", "got 0"]),
        ("views.scale=[0.9, 0.1]", ["views.scale must be [min, max]", "[0.9, 0.1]"]),
        ("eval.scale=[0, 1]", ["eval.scale must be [min, max]", "[0.0, 1.0]"]),
        ("views.std=[1, 0, 1]", ["views.std must be positive", "[1.0, 0.0, 1.0]"]),
        ("method.mask_ratio=1.0", ["unknown key method.mask_ratio"]),
        ("views.groups=3", ["views.groups must be a list of groups", "3"]),
        ("name=a/b", ["name must be the name of a folder", "'a/b'"]),
    ],
)
def test_mistakes_are_named(recipe, override, parts):
    with pytest.raises(ValueError) as error:
        load(recipe, [override])
    for part in parts:
        assert part in str(error.value)


def test_unknown_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("optim: {beta: [0.9, 0.95]}\n")
    with pytest.raises(ValueError, match=r"optim\.beta; the nearest is optim\.betas"):
        load(str(path))


def test_unknown_recipe_lists_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match=r"one of .*photos.*; got 'fotos'"):
        load("fotos")
    with pytest.raises(ValueError, match=r"none\.yaml does not exist; recipes: .*photos"):
        load(str(tmp_path / "none.yaml"))


def test_a_file_that_is_not_yaml_or_not_keys(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("train: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        load(str(path))
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold keys and values"):
        load(str(path))


def test_nearest_is_by_whole_or_by_last_part():
    candidates = ["train.steps", "schedules.lr.base", "train.global_batch_size"]
    assert nearest("batch_size", candidates) == "train.global_batch_size"
    assert nearest("optim.base", candidates) == "schedules.lr.base"
    assert nearest("train.stesp", candidates) == "train.steps"


def test_dump_is_read_back(recipe, tmp_path):
    config = load(recipe, ["schedules.teacher_temp.base=0.07", "optim.clip_grad=3", "name=other"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(str(path)) == config


def test_help_lists_every_key_with_type_default_and_help():
    lines = describe().splitlines()

    def walk(value, prefix=""):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield prefix + field.name, inner, field.metadata["help"]
            if dataclasses.is_dataclass(inner):
                yield from walk(inner, f"{prefix}{field.name}.")

    for name, default, text in walk(Config()):
        if dataclasses.is_dataclass(default):
            assert any(line.startswith(f"{name}: {text}") for line in lines), name
            continue
        shown = "null" if default is None else default
        match = [line for line in lines if line.startswith((f"  {name}={shown} ", f"{name}: "))]
        assert len(match) == 1 and text in match[0], name
    assert "  schedules.teacher_temp.base=0.0  [float] value at the end of the warm-up" in lines


def test_every_key_is_documented():
    for key in keys(Config()):
        assert len(key.help) > 3, key.name


def test_every_recipe_is_a_valid_configuration():
    assert "photos" in recipes.names()
    for name in recipes.names():
        config = load(name)
        assert config.name == name
        assert config.schedules.lr.warmup_steps < config.train.steps


@pytest.mark.parametrize("name", recipes.names())
def test_the_model_of_every_recipe_can_be_built(name):
    config = load(name)
    with torch.device("meta"):
        method = method_of(config, num_samples=2**14)
    assert sum(p.numel() for p in method.parameters()) > 1e5


@pytest.mark.parametrize("name", [n for n in recipes.names() if n.startswith("mae_vit")])
def test_mae_recipes_have_the_numbers_of_the_paper(name):
    config = load(name)
    assert max(scheduled(config, s)["lr"] for s in range(12000, 13000)) == pytest.approx(2.4e-3)
    assert scheduled(config, 12480 // 2)["lr"] == pytest.approx(1.2e-3)
    assert scheduled(config, 400_000)["weight_decay"] == 0.05
    assert config.train.steps == 1600 * (1281167 // config.train.global_batch_size)
    assert (config.optim.betas, config.method.args) == ([0.9, 0.95], {"mask_ratio": 0.75})
    assert config.model.args["norm_pix_loss"] is True


def test_recipes_are_found_in_a_wheel(tmp_path, monkeypatch):
    (tmp_path / "fastssl" / "recipes").mkdir(parents=True)
    (tmp_path / "fastssl" / "recipes" / "only.yaml").write_text("{}")
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "fastssl")
    assert recipes.names() == ["only"]
    assert load("only").name == "only"


def test_configurations_share_nothing():
    first, second = Config(), Config()
    first.views.mean[0] = 0.9
    first.model.args["depth"] = 1
    first.schedules.lr.base = 9.0
    assert second == Config()
    assert second.views.mean[0] == 0.485


def test_a_configuration_made_in_python_is_checked():
    with pytest.raises(ValueError, match="name must be the name of a folder"):
        check(Config())


def test_arguments_are_added_one_by_one_or_replaced_as_a_whole():
    before = load("photos_simclr").method.args
    assert len(before) > 1
    added = load("photos_simclr", ["method.args.temperature=0.7"])
    assert added.method.args == before | {"temperature": 0.7}
    replaced = load("photos_simclr", ["method.args={temperature: 0.7}"])
    assert replaced.method.args == {"temperature": 0.7}
    other = load("photos_simclr", ["method={name: byol, args: {}}", "model.args={}"])
    assert (other.method.name, other.method.args, other.model.args) == ("byol", {}, {})
