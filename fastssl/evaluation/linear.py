"""Linear classification on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastssl.evaluation.standardize import Standardize


@dataclass(frozen=True)
class LinearClassifier:
    """Called, it predicts the labels [M] of features [M, D]."""

    standardize: Standardize
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        return linear(self.standardize(features), self.weight, self.bias).argmax(dim=1)


def logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, *, c: float = 1.0, max_iter: int = 200
) -> LinearClassifier:
    """Multinomial logistic regression on standardised features [N, D], in this process alone.

    Minimises mean cross-entropy + |W|^2 / (2 c N) from zero by L-BFGS: no learning rate, no
    random numbers, the same result each time.
    """
    standardize = Standardize.fit(features)
    train = standardize(features)
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
        loss = cross_entropy(logits, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearClassifier(standardize, weight.detach(), bias.detach())


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    c: float = 1.0,
    max_iter: int = 200,
) -> float:
    """Accuracy in percent of `logistic_regression`, of this process's sets alone.

    Args:
        train_features: [N, D]; their mean and deviation standardise both sets.
        train_labels: [N] int64, from 0 on.
        test_features: [M, D].
        test_labels: [M] int64.
        c: inverse strength of the L2 penalty, as in scikit-learn.
        max_iter: of L-BFGS.
    """
    num_classes = int(torch.max(train_labels.max(), test_labels.max())) + 1
    classifier = logistic_regression(
        train_features, train_labels, num_classes, c=c, max_iter=max_iter
    )
    return 100 * int((classifier(test_features) == test_labels).sum()) / len(test_labels)
