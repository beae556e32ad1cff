"""What papers ask for in views, and what a configuration changes of it."""

import pytest

from fastssl.data.views import View
from fastssl.methods import METHODS, Method, make_views, views


def kinds(groups, size=224):
    class Asking(Method):
        views = groups

    return make_views(Asking, size)


def strengths(view):
    return view.brightness, view.contrast, view.saturation, view.hue


def test_views_of_the_papers():
    (simclr,), (moco,) = kinds(views.SIMCLR), kinds(views.MOCO_V2)
    assert strengths(simclr) == (0.8, 0.8, 0.8, 0.2) and simclr.scale == (0.08, 1.0)
    assert strengths(moco) == (0.4, 0.4, 0.4, 0.1) and moco.scale == (0.2, 1.0)
    for view in (simclr, moco):
        assert (view.jitter, view.grey, view.blur, view.solarize) == (0.8, 0.2, 0.5, 0.0)
    scales = []
    for groups in (views.BYOL, views.DINO, views.DINOV2):
        first, second, *local = chosen = kinds(groups)
        assert [(v.blur, v.solarize) for v in (first, second)] == [(1.0, 0.0), (0.1, 0.2)]
        assert [(v.blur, v.solarize, v.size) for v in local] == [(0.5, 0.0, (96, 96))] * len(local)
        for view in chosen:
            assert strengths(view) == (0.4, 0.4, 0.2, 0.1)
            assert (view.jitter, view.grey, view.sigma) == (0.8, 0.2, (0.1, 2.0))
        scales.append([view.scale for view in chosen])
    assert scales == [
        [(0.08, 1.0), (0.08, 1.0)],
        [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)],
        [(0.32, 1.0), (0.32, 1.0), (0.05, 0.32)],
    ]
    numbers = [sum(v.number for v in kinds(g)) for g in (views.SWAV, views.DINO, views.BYOL)]
    assert numbers == [8, 10, 2]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_asks_for_views_that_exist(name):
    for size in (224, (96, 64)):
        first = make_views(METHODS[name], size)[0]
        assert first.size == ((224, 224) if size == 224 else (96, 64))


def test_a_configuration_changes_what_all_kinds_share():
    (view,) = make_views(METHODS["simclr"], 32, base={"scale": [0.5, 1.0]})
    assert view.scale == (0.5, 1.0) and view.jitter == 0.8
    with pytest.raises(ValueError, match=r"views.scale must be given in views.groups, .*\[0.5, 1"):
        kinds_with = type("Asking", (Method,), {"views": views.DINO})
        make_views(kinds_with, 32, base={"scale": [0.5, 1.0]})


def test_groups_of_a_configuration_replace_the_methods_own():
    groups = [{"number": 2, "blur": 0.3}, {"size": [8, 12], "scale": [0.1, 0.2]}]
    first, second = make_views(METHODS["simclr"], 16, groups, {"scale": [0.5, 1.0], "flip": 0.0})
    assert first == View((16, 16), (0.5, 1.0), flip=0.0, blur=0.3, number=2)
    assert second == View((8, 12), (0.1, 0.2), flip=0.0)


@pytest.mark.parametrize(
    "groups, message",
    [
        ([], "views.groups must have at least one kind of views"),
        ([{"blurr": 1.0}], "views.groups: .*blurr"),
        ([{"blur": 2.0}], "views.groups: blur must be a probability, got 2.0"),
    ],
)
def test_mistakes_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        make_views(METHODS["mae"], 16, groups)
