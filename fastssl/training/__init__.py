"""The trainer: configuration, loop, checkpoints, metrics and report.

from fastssl.training import load_config, train

run_dir = train(load_config("photos", ["train.steps=100"]))
"""

from fastssl.training.config import Config
from fastssl.training.config import load as load_config
from fastssl.training.loop import train

__all__ = ["Config", "load_config", "train"]
