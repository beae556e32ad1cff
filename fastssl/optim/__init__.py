"""Optimizer, parameter groups and schedules by optimizer step."""

from fastssl.optim.adamw import build_adamw, set_hyperparameters
from fastssl.optim.param_groups import param_groups
from fastssl.optim.schedules import Schedule, scale_lr

__all__ = ["Schedule", "build_adamw", "param_groups", "scale_lr", "set_hyperparameters"]
