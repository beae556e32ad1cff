"""Optimizers, parameter groups, schedules by optimizer step, and the average of a teacher."""

from fastssl.optim.adamw import build_adamw, set_hyperparameters
from fastssl.optim.clip import clip_gradients
from fastssl.optim.ema import EMA
from fastssl.optim.lamb import LAMB, build_lamb
from fastssl.optim.lars import LARS, build_lars
from fastssl.optim.param_groups import param_groups
from fastssl.optim.schedules import Schedule, scale_lr
from fastssl.optim.sgd import build_sgd

__all__ = [
    "EMA",
    "LAMB",
    "LARS",
    "Schedule",
    "build_adamw",
    "build_lamb",
    "build_lars",
    "build_sgd",
    "clip_gradients",
    "param_groups",
    "scale_lr",
    "set_hyperparameters",
]
