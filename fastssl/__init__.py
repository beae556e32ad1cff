"""Fast self-supervised pretraining of vision encoders: fused kernels behind drop-in modules."""

from fastssl import functional, optim
from fastssl.losses import (
    BarlowTwinsLoss,
    DINOLoss,
    GramLoss,
    InfoNCELoss,
    KoLeoLoss,
    MSNLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwAVLoss,
    VICRegLoss,
    iBOTPatchLoss,
)
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
from fastssl.nn import DINOHead, SyncBatchNorm
from fastssl.version import __version__

__all__ = [
    "BarlowTwinsLoss",
    "DINOHead",
    "DINOLoss",
    "GramLoss",
    "Hiera",
    "HieraB",
    "HieraBPlus",
    "HieraH",
    "HieraL",
    "HieraS",
    "HieraT",
    "InfoNCELoss",
    "KoLeoLoss",
    "MSNLoss",
    "MaskedAutoencoderHiera",
    "MaskedAutoencoderViT",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SwAVLoss",
    "SyncBatchNorm",
    "VICRegLoss",
    "VisionTransformer",
    "__version__",
    "functional",
    "iBOTPatchLoss",
    "load_pretrained",
    "optim",
]
