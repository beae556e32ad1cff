"""Linear classification on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    c: float = 1.0,
    max_iter: int = 200,
) -> float:
    """Accuracy in percent of a multinomial logistic regression on standardised features.

    Minimises mean cross-entropy + |W|^2 / (2 c N) from zero by L-BFGS: no learning rate, no
    random numbers, the same result each time.

    Args:
        train_features: [N, D]; their mean and deviation standardise both sets.
        train_labels: [N] int64, from 0 on.
        test_features: [M, D].
        test_labels: [M] int64.
        c: inverse strength of the L2 penalty, as in scikit-learn.
        max_iter: of L-BFGS.
    """
    train, test = train_features.detach().float(), test_features.detach().float()
    mean = train.mean(dim=0)
    std = train.std(dim=0, correction=0)
    # A feature that is constant over the training set says nothing, whatever its rounding noise.
    scale = torch.where(std > 1e-6 * (mean.abs() + 1e-6), 1 / std, 0.0)
    train, test = (train - mean) * scale, (test - mean) * scale
    num_classes = int(torch.max(train_labels.max(), test_labels.max())) + 1
    weight = train.new_zeros(num_classes, train.shape[1]).requires_grad_()
    bias = train.new_zeros(num_classes).requires_grad_()
    penalty = 1 / (2 * c * len(train))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = linear(train, weight, bias)
        loss = cross_entropy(logits, train_labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        correct = (linear(test, weight, bias).argmax(dim=1) == test_labels).sum()
    return 100 * int(correct) / len(test_labels)
