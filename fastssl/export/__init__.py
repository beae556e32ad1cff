"""A run's model for use elsewhere: safetensors, one checkpoint, transformers, ONNX."""

from fastssl.export.formats import FORMATS, export
from fastssl.export.run import TrainedRun, open_run

__all__ = ["FORMATS", "TrainedRun", "export", "open_run"]
