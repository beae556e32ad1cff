"""Layers that the models share."""

from fastssl.nn.attention import Attention
from fastssl.nn.block import LAYER_NORM, Block, LayerScale, NormLayer
from fastssl.nn.drop_path import DropPath
from fastssl.nn.mlp import Mlp
from fastssl.nn.patch_embed import PatchEmbed
from fastssl.nn.pos_embed import interpolate_pos_embed, sincos_pos_embed_2d

__all__ = [
    "LAYER_NORM",
    "Attention",
    "Block",
    "DropPath",
    "LayerScale",
    "Mlp",
    "NormLayer",
    "PatchEmbed",
    "interpolate_pos_embed",
    "sincos_pos_embed_2d",
]
