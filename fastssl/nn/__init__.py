"""Layers that the models share."""

from fastssl.nn.attention import Attention
from fastssl.nn.block import LAYER_NORM, Block, LayerScale, NormLayer
from fastssl.nn.dino_head import DINOHead, HeadOutput
from fastssl.nn.drop_path import DropPath, keyed_drops
from fastssl.nn.heads import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoPredictionHead,
    MoCoProjectionHead,
    MSNProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwAVProjectionHead,
    SwAVPrototypes,
    VICRegProjectionHead,
)
from fastssl.nn.linear import Linear
from fastssl.nn.mlp import Mlp
from fastssl.nn.patch_embed import PatchEmbed
from fastssl.nn.pos_embed import interpolate_pos_embed, sincos_pos_embed_2d
from fastssl.nn.swiglu import SwiGLU
from fastssl.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "LAYER_NORM",
    "Attention",
    "BYOLPredictionHead",
    "BYOLProjectionHead",
    "BarlowTwinsProjectionHead",
    "Block",
    "DINOHead",
    "DropPath",
    "HeadOutput",
    "LayerScale",
    "Linear",
    "MSNProjectionHead",
    "Mlp",
    "MoCoPredictionHead",
    "MoCoProjectionHead",
    "NormLayer",
    "PatchEmbed",
    "SimCLRProjectionHead",
    "SimSiamPredictionHead",
    "SimSiamProjectionHead",
    "SwAVProjectionHead",
    "SwAVPrototypes",
    "SwiGLU",
    "SyncBatchNorm",
    "VICRegProjectionHead",
    "interpolate_pos_embed",
    "keyed_drops",
    "sincos_pos_embed_2d",
]
