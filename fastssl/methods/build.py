"""From names to an encoder and a method around it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastssl import models
from fastssl.data.views import View
from fastssl.methods.base import Method, Setting
from fastssl.models.vit import pair
from fastssl.names import nearest

Size = int | Sequence[int]
# The keyword by which a factory whose name begins so takes the size of the images.
_SIZE_KEYWORDS = {
    "mae_vit": "img_size",
    "MaskedAutoencoderViT": "img_size",
    "vit": "img_size",
    "VisionTransformer": "img_size",
    "mae_hiera": "input_size",
    "MaskedAutoencoderHiera": "input_size",
    "hiera": "input_size",
    "Hiera": "input_size",
}
_AUTOENCODERS = (models.MaskedAutoencoderViT, models.MaskedAutoencoderHiera)
# What has a classifier unless told otherwise.
_CLASSIFIERS = ("hiera", "Hiera", "resnet", "ResNet", "xcit", "XCiT")


def find_method(name: str, known: Mapping[str, type[Method]]) -> type[Method]:
    """The method called so, or the class `path/to/file.py:Class` or `package.module:Class`."""
    if name in known:
        return known[name]
    found = import_named("method.name", name, f"one of {', '.join(known)}, or file.py:Class")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"method.name must be a class derived from Method, got {name!r}")
    return found


def make_views(
    method: type[Method],
    image_size: Size = 224,
    groups: Sequence[Mapping[str, Any]] | None = None,
    base: Mapping[str, Any] | None = None,
) -> tuple[View, ...]:
    """The kinds of views of a run.

    Args:
        method: whose own kinds hold where `groups` is None.
        image_size: of the kinds that name no `size`.
        groups: of each kind, keywords of `View`.
        base: keywords of `View` that hold in all kinds, unless they say otherwise.
    """
    own = groups is None
    groups, base = method.views if own else groups, base or {}
    for name, value in base.items():
        if own and len({str(group.get(name)) for group in groups}) > 1:
            raise ValueError(
                f"views.{name} must be given in views.groups, since the views of this method "
                f"differ in it, got {value}"
            )
    views = []
    for group in groups:
        keywords = {**group, **base} if own else {**base, **group}
        keywords = {k: tuple(v) if isinstance(v, list) else v for k, v in keywords.items()}
        try:
            keywords["size"] = pair("size", keywords.get("size", image_size))
            views.append(View(**keywords))
        except (TypeError, ValueError) as error:
            raise ValueError(f"views.groups: {error}") from error
    if not views:
        raise ValueError("views.groups must have at least one kind of views, got none")
    return tuple(views)


def build_encoder(
    name: str, args: Mapping[str, Any] | None = None, *, image_size: Size = 224
) -> nn.Module:
    """An encoder, [B, C, H, W] -> [B, D]: a factory or class of fastssl.models, `timm:name`, or
    `path/to/file.py:factory` or `package.module:factory`.

    `args` are its keywords, which may be lists where it wants tuples. ValueError for names and
    keywords that do not exist.
    """
    keywords = {k: tuple(v) if isinstance(v, list) else v for k, v in (args or {}).items()}
    if name.startswith("timm:"):
        factory, keywords = _timm(name.removeprefix("timm:")), {"num_classes": 0} | keywords
    elif ":" in name:
        factory = import_named("model.name", name, "file.py:factory")
    elif name in models.FACTORIES:
        factory = getattr(models, name)
        # torch's own error is a RuntimeError, as are others that must not be taken for this one.
        _check_not_negative("model.args", keywords, factory)
        _check_kinds("model.args", keywords, factory)
        if name.startswith(_CLASSIFIERS):
            keywords = {"num_classes": 0} | keywords
        for prefix, keyword in _SIZE_KEYWORDS.items():
            if name.startswith(prefix):
                keywords = {keyword: pair("image_size", image_size)} | keywords
                break
    else:
        names = ", ".join(models.FACTORIES)
        raise ValueError(
            f"model.name must be one of {names}, or file.py:factory, got {name!r}; "
            f"the nearest is {nearest(name, models.FACTORIES)}"
        )
    try:
        return factory(**keywords)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.args do not fit {name}: {error}") from error


def construct(method: type[Method], name: str, setting: Setting, args: Mapping[str, Any]) -> Method:
    """`method(setting, **args)`, with errors that speak of the configuration."""
    allowed = _keywords(method)
    unknown = sorted(set(args) - set(allowed))
    if unknown:
        names = ", ".join(allowed) or "none"
        raise ValueError(f"method.args of {name} are {names}; got {', '.join(unknown)}")
    if not isinstance(setting.encoder, method.encoder_type):
        types = method.encoder_type
        types = types if isinstance(types, tuple) else (types,)
        raise ValueError(
            f"model.name must build a {' or '.join(t.__name__ for t in types)} for method {name}, "
            f"got a {type(setting.encoder).__name__}"
        )
    if method.encoder_type is nn.Module and isinstance(setting.encoder, _AUTOENCODERS):
        raise ValueError(
            f"model.name must build an encoder that returns a feature vector [B, D] for method "
            f"{name}, got a {type(setting.encoder).__name__}"
        )
    _check_kinds("method.args", args, method)
    grid_size = getattr(getattr(setting.encoder, "patch_embed", None), "grid_size", None)
    for view in setting.views if callable(grid_size) else ():
        try:
            grid_size(view.size)
        except ValueError as error:
            raise ValueError(
                f"views.groups: the encoder does not take {view.size}: {error}"
            ) from error
    try:
        made = method(setting, **args)
    # A list where a number belongs, an encoder without blocks.
    except (TypeError, IndexError) as error:
        raise ValueError(f"method.args do not fit {name}: {error}") from error
    except RuntimeError:
        # torch's, of a tensor of negative size.
        _check_not_negative("method.args", args, method)
        raise
    # What the method itself did not refuse.
    _check_not_negative("method.args", args, method)
    return made


def _check_kinds(key: str, args: Mapping[str, Any], made_by: Callable) -> None:
    """ValueError for a word where a number belongs and the like."""
    hints = _hints(_unwrapped(made_by))
    for name, value in args.items():
        if not _fits(value, hints.get(name, Any)):
            kind = hints[name]
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            raise ValueError(f"{key}.{name} must be {wanted}, got {value!r}")


def _check_not_negative(key: str, args: Mapping[str, Any], made_by: Callable) -> None:
    """ValueError for numbers below 0, which no method or model of this library takes."""
    is_ours = _unwrapped(made_by).__module__.startswith("fastssl.")
    for name, value in args.items():
        if is_ours and isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"{key}.{name} must not be negative, got {value}")


def _unwrapped(made_by: Callable) -> Callable:
    while isinstance(made_by, functools.partial):
        made_by = made_by.func
    return made_by


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a configuration is of a kind; of one that is not plain it may be."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str, types.NoneType) else True


def _hints(factory: Callable) -> dict[str, Any]:
    """The kinds of a class's or a factory's keywords, those of what it passes others on to too."""
    if not isinstance(factory, type):
        hints = _own_hints(factory)
        made = hints.pop("return", None)
        return (_hints(made) if isinstance(made, type) else {}) | hints
    hints = {}
    for cls in factory.__mro__:
        if "__init__" in vars(cls):
            hints = _own_hints(cls.__init__) | hints
    return hints


def _own_hints(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:
        # Names that a user's file has for type checkers only.
        return {}


def _keywords(method: type[Method]) -> list[str]:
    """Keywords of a method, and of what it derives from where it passes others on."""
    names: list[str] = []
    for cls in method.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        names += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _timm(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"model.name timm:{name} needs timm: {error}") from error

    def create(**keywords: Any) -> nn.Module:
        try:
            return timm.create_model(name, **keywords)
        except RuntimeError as error:
            raise ValueError(f"model.name timm:{name}: {error}") from error

    return create


def import_named(key: str, name: str, expected: str) -> Any:
    """What `module:attribute` or `file.py:attribute` names."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(f"{key} must be {expected}, got {name!r}")
    try:
        module = (
            _module_of(Path(place).expanduser().resolve())
            if place.endswith(".py")
            else importlib.import_module(place)
        )
    except (ImportError, OSError) as error:
        raise ValueError(f"{key}: {place} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{key}: {place} has no {attribute}")
    return getattr(module, attribute)


@functools.cache
def _module_of(path: Path) -> types.ModuleType:
    """A file as a module, executed once, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(str(path.with_suffix("")), path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
