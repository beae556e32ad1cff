"""The features of a run as an ONNX graph, for any number of images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.export.card import Usage
from fastssl.export.run import TrainedRun
from fastssl.methods import Method

# Protobuf holds less than 2 GB: the weights of larger models lie in a file beside the graph.
_LARGEST_FILE = 1_800_000_000
_TOLERANCE = 1e-3
_BATCHES = (1, 3)


class _Features(nn.Module):
    """Normalised images [B, 3, H, W] -> float32 features [B, D], those that the run was judged by.

    The method is kept out of the modules: banks and heads are no part of the graph.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.model = method.model
        self._features = method.features

    def forward(self, images: Tensor) -> Tensor:
        return self._features(images).float()


def write_onnx(run: TrainedRun, folder: Path) -> Usage:
    """Write model.onnx, and compare it with the model where onnxruntime is installed.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ArithmeticError: onnxruntime computes other features.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"format onnx needs onnx and onnxscript ({error}): pip install 'fastssl[onnx]'"
        ) from error
    features = _Features(run.method).eval()
    file = folder / "model.onnx"
    size = sum(p.numel() * p.element_size() for p in features.parameters())
    # Two images: one is taken for a size that never changes.
    images = torch.zeros(2, 3, *run.image_size)
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            features,
            (images,),
            file,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}},
            external_data=size > _LARGEST_FILE,
            dynamo=True,
            verbose=False,
        )
    code = """
import onnxruntime

session = onnxruntime.InferenceSession("PATH_OF_THIS_FOLDER/model.onnx")
(features,) = session.run(None, {"images": images})  # float32 [B, 3, H, W] -> [B, D]
"""
    return Usage("onnx", code, [_compare(features, file, run.image_size)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself and of packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _compare(features: nn.Module, file: Path, image_size: tuple[int, int]) -> str:
    """A sentence on how far onnxruntime's features are from ours."""
    try:
        import onnxruntime
    except ImportError:
        return "The graph was not compared with the model: onnxruntime was not installed."
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in _BATCHES:
        images = torch.randn(batch, 3, *image_size, generator=generator)
        with torch.no_grad():
            expected = features(images)
        (came,) = session.run(None, {"images": images.numpy()})
        error = (torch.from_numpy(came) - expected).abs().max() / expected.abs().max()
        largest = max(largest, float(error))
    # Not a number is no small difference.
    if not largest <= _TOLERANCE:
        raise ArithmeticError(
            f"onnxruntime's features differ from the model's by {largest:.1e} of the largest, "
            f"which must be at most {_TOLERANCE:g}"
        )
    return (
        f"onnxruntime {onnxruntime.__version__} gives the model's features of random images up to "
        f"{largest:.1e} of the largest."
    )
