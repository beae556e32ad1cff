"""What tests of encoders share."""

import torch
from torch import Tensor, nn


def randomise(model: nn.Module) -> None:
    """Random numbers in every parameter, also in those that start at zero, one, or fixed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(std=0.1).add_(offset)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Norm of the difference at most `tolerance` times that of `expected`."""
    assert actual.shape == expected.shape, name
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"
