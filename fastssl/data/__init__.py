"""Images in: decoding, crops, and batches in an order that does not depend on who reads them."""

from fastssl.data.batch import Batch
from fastssl.data.build import build_datasets
from fastssl.data.decode import BrokenImage, decode_image
from fastssl.data.loader import build_loader, steps_per_epoch
from fastssl.data.pictures import NoReadableImage
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "BrokenImage",
    "NoReadableImage",
    "build_datasets",
    "build_loader",
    "decode_image",
    "steps_per_epoch",
]
