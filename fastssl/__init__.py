"""Fast self-supervised pretraining of vision encoders: fused kernels behind drop-in modules."""

from fastssl import functional
from fastssl.losses import DINOLoss
from fastssl.models.hiera import (
    Hiera,
    HieraB,
    HieraBPlus,
    HieraH,
    HieraL,
    HieraS,
    HieraT,
)
from fastssl.models.mae_hiera import MaskedAutoencoderHiera
from fastssl.models.mae_vit import MaskedAutoencoderViT
from fastssl.models.pretrained import load_pretrained
from fastssl.models.vit import VisionTransformer
from fastssl.version import __version__

__all__ = [
    "DINOLoss",
    "Hiera",
    "HieraB",
    "HieraBPlus",
    "HieraH",
    "HieraL",
    "HieraS",
    "HieraT",
    "MaskedAutoencoderHiera",
    "MaskedAutoencoderViT",
    "VisionTransformer",
    "__version__",
    "functional",
    "load_pretrained",
]
