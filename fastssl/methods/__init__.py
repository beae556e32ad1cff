"""Methods of self-supervised pretraining: an encoder with its objective, as the loop trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastssl.data.views import View
from fastssl.methods.barlow_twins import BarlowTwins
from fastssl.methods.base import Method, Setting
from fastssl.methods.build import build_encoder, construct, find_method, make_views
from fastssl.methods.byol import BYOL
from fastssl.methods.context_prediction import ContextPrediction
from fastssl.methods.cpc import CPC
from fastssl.methods.data2vec import Data2Vec
from fastssl.methods.deepcluster_v2 import DeepClusterV2
from fastssl.methods.dino import DINO
from fastssl.methods.dinov2 import DINOv2
from fastssl.methods.exemplar import Exemplar
from fastssl.methods.hiera_mae import HieraMAE
from fastssl.methods.ibot import iBOT
from fastssl.methods.ijepa import IJEPA
from fastssl.methods.mae import MAE
from fastssl.methods.moco import MoCo, MoCoV1
from fastssl.methods.moco_v3 import MoCoV3
from fastssl.methods.msn import MSN
from fastssl.methods.npid import NPID
from fastssl.methods.pirl import PIRL
from fastssl.methods.rotation import Rotation
from fastssl.methods.sela import SeLA
from fastssl.methods.simclr import SimCLR
from fastssl.methods.simsiam import SimSiam
from fastssl.methods.swav import SwAV
from fastssl.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "mae": MAE,
    "hiera_mae": HieraMAE,
    "simclr": SimCLR,
    "moco_v1": MoCoV1,
    "moco_v2": MoCo,
    "moco_v3": MoCoV3,
    "npid": NPID,
    "pirl": PIRL,
    "cpc": CPC,
    "swav": SwAV,
    "deepcluster_v2": DeepClusterV2,
    "sela": SeLA,
    "byol": BYOL,
    "simsiam": SimSiam,
    "dino": DINO,
    "ibot": iBOT,
    "dinov2": DINOv2,
    "msn": MSN,
    "ijepa": IJEPA,
    "data2vec": Data2Vec,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "rotation": Rotation,
    "context_prediction": ContextPrediction,
    "exemplar": Exemplar,
}

__all__ = [
    "BYOL",
    "CPC",
    "DINO",
    "IJEPA",
    "MAE",
    "METHODS",
    "MSN",
    "NPID",
    "PIRL",
    "BarlowTwins",
    "ContextPrediction",
    "DINOv2",
    "Data2Vec",
    "DeepClusterV2",
    "Exemplar",
    "HieraMAE",
    "Method",
    "MoCo",
    "MoCoV1",
    "MoCoV3",
    "Rotation",
    "SeLA",
    "Setting",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "VICReg",
    "build_encoder",
    "build_method",
    "iBOT",
    "make_views",
    "method_class",
]


def method_class(name: str) -> type[Method]:
    """The class of a method's name, or of `file.py:Class` or `package.module:Class`."""
    return find_method(name, METHODS)


def build_method(
    name: str,
    *,
    model: str,
    model_args: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
    image_size: int | Sequence[int] = 224,
    views: Sequence[View] | None = None,
    num_samples: int = 1,
    steps_per_epoch: int = 1,
    seed: int = 0,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Method:
    """The method `name` around the encoder `model`: see `method_class` and `build_encoder`.

    Args:
        args: the method's keywords.
        image_size: the images' side or (height, width).
        views: see `Setting`, like what follows. None: the method's own.
        prepare: called with the encoder, of which the method may make copies.

    Raises:
        ValueError: a name, a keyword or a combination that does not exist.
    """
    method = method_class(name)
    encoder = _encoder(method, model, dict(model_args or {}), image_size)
    if prepare is not None:
        prepare(encoder)
    setting = Setting(
        encoder,
        make_views(method, image_size) if views is None else tuple(views),
        num_samples,
        steps_per_epoch,
        seed,
    )
    return construct(method, name, setting, args or {})


def _encoder(
    method: type[Method], model: str, args: dict[str, Any], image_size: int | Sequence[int]
) -> nn.Module:
    """The encoder, with the keywords that the method needs of it."""
    try:
        return build_encoder(model, {**method.model_args, **args}, image_size=image_size)
    except ValueError:
        if not method.model_args:
            raise
        # Another kind of encoder, which `construct` refuses by name, may not know those keywords.
        encoder = build_encoder(model, args, image_size=image_size)
        if isinstance(encoder, method.encoder_type):
            raise
        return encoder
