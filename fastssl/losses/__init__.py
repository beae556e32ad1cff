"""Losses as modules: they hold state (centers, queues) and make one call."""

from fastssl.losses.dino_loss import DINOLoss

__all__ = ["DINOLoss"]
