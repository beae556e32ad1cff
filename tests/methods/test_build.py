"""Methods and encoders by name, of the library and of a user."""

import sys

import pytest
import torch
from torch import nn

from fastssl.data.views import View
from fastssl.methods import Method, Setting, SimCLR, build_encoder, build_method, method_class
from fastssl.methods.common import encode, num_features
from tests.methods.checks import TinyEncoder

MINE = '''
from torch import nn
from fastssl.methods import Method

class Mine(Method):
    """Makes features small."""

    def __init__(self, setting, *, factor=1.0):
        super().__init__()
        self.model, self.factor = setting.encoder, factor

    def forward(self, batch):
        return {"loss": self.factor * self.model(batch.images).square().mean()}

def encoder(width=4):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width))

number = 3
'''


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_a_method_and_an_encoder_of_ones_own(mine):
    method = build_method(
        f"{mine}:Mine", model=f"{mine}:encoder", model_args={"width": 5}, args={"factor": 2.0}
    )
    assert isinstance(method, Method) and method.factor == 2.0
    assert method.features(torch.ones(2, 3, 8, 8)).shape == (2, 5)
    simclr = build_method("simclr", model=f"{mine}:encoder", image_size=8)
    assert isinstance(simclr, SimCLR) and simclr.head[0].in_features == 4


@pytest.mark.parametrize(
    "name, message",
    [
        ("simcrl", r"method.name must be one of mae, .*simclr.*, or file.py:Class, got 'simcrl'"),
        ("nowhere.at.all:Mine", "method.name: nowhere.at.all cannot be imported"),
        ("missing.py:Mine", "method.name: missing.py cannot be imported"),
        ("{mine}:Other", "has no Other"),
        ("{mine}:number", "method.name must be a class derived from Method"),
    ],
)
def test_a_method_that_cannot_be_found_is_named(mine, name, message):
    with pytest.raises(ValueError, match=message):
        method_class(name.format(mine=mine))


def test_encoders_are_vectors_of_images():
    for name, args, width in (
        ("vit_tiny", {"depth": 1}, 192),
        ("hiera_tiny_224", {}, 768),
        ("resnet18", {"width": 8, "small_images": True}, 64),
        ("xcit_nano_12", {"depth": 1}, 128),
    ):
        encoder = build_encoder(name, args, image_size=32).eval()
        images = torch.randn(2, 3, 32, 32)
        assert encoder(images).shape == (2, width)
        assert num_features(Setting(encoder, (View((32, 32)),))) == width


def test_the_width_of_an_unknown_encoder_is_found_out():
    encoder = TinyEncoder(batch_norm=True)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert num_features(Setting(encoder, (View((16, 16)),))) == 8
    assert encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_encoder_that_makes_maps_is_refused():
    with pytest.raises(ValueError, match=r"returns a feature vector .*got \[1, 4, 8, 8\]"):
        num_features(Setting(nn.Conv2d(3, 4, 1), (View((8, 8)),)))


def test_timm_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"model.name timm:resnet18 needs timm"):
        build_encoder("timm:resnet18")


def test_an_encoder_is_prepared_before_the_method_copies_it():
    def prepare(encoder):
        encoder.fc.bias.data.fill_(7.0)

    method = build_method("byol", model="tests.methods.checks:TinyEncoder", prepare=prepare)
    for network in (method.student, method.teacher):
        assert (network[0].fc.bias == 7.0).all()


def test_files_of_one_name_are_two_modules(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"{MINE}\nMine.place = {name!r}\n")
    classes = [method_class(f"{tmp_path / name / 'mine.py'}:Mine") for name in ("a", "b")]
    assert [c.place for c in classes] == ["a", "b"]
    assert len({c.__module__ for c in classes}) == 2
    assert method_class(f"{tmp_path / 'a' / 'mine.py'}:Mine") is classes[0]


def test_the_wrong_kind_of_encoder_is_named():
    with pytest.raises(ValueError, match=r"a VisionTransformer for method ibot, got a ResNet"):
        build_method("ibot", model="resnet18")
    with pytest.raises(ValueError, match=r"model.args do not fit vit_tiny: .*'deph'"):
        build_method("ibot", model="vit_tiny", model_args={"deph": 2})


def test_views_of_one_size_go_through_together():
    calls = []

    def network(images):
        calls.append(tuple(images.shape))
        return images.mean(dim=(2, 3))

    large, small = torch.randn(2, 2, 3, 8, 8), torch.randn(3, 2, 3, 4, 4)
    out = encode(network, [*large, *small])
    assert calls == [(4, 3, 8, 8), (6, 3, 4, 4)]
    expected = [view.mean(dim=(2, 3)) for view in (*large, *small)]
    torch.testing.assert_close(out, torch.cat(expected))


class Own(Method):
    """A user's method, whose arguments are its own affair."""

    def __init__(self, setting: Setting, *, shift: float = 0.0, flag: bool = False) -> None:
        super().__init__()
        self.model, self.shift, self.flag = setting.encoder, shift, flag


def test_arguments_of_a_users_method_may_be_negative_but_not_of_another_kind():
    name, model = "tests.methods.test_build:Own", "vit_tiny"
    options = {"model": model, "model_args": {"depth": 1}, "image_size": 32}
    assert build_method(name, args={"shift": -1}, **options).shift == -1
    with pytest.raises(ValueError, match=r"method.args.flag must be bool, got 'no_way'"):
        build_method(name, args={"flag": "no_way"}, **options)
