"""Frozen features judged: k-NN, a linear probe, and measures that need no labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.data.crops import EvaluationCrops
from fastssl.evaluation.features import extract_features, feature_std, rankme
from fastssl.evaluation.knn import knn_accuracy
from fastssl.evaluation.linear import linear_probe_accuracy

__all__ = [
    "evaluate",
    "extract_features",
    "feature_std",
    "knn_accuracy",
    "linear_probe_accuracy",
    "rankme",
]


def evaluate(
    features_fn: Callable[[Tensor], Tensor],
    eval_train: EvaluationCrops,
    eval_test: EvaluationCrops,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> dict[str, float]:
    """Judge frozen features on held-out crops.

    Args:
        features_fn: normalised images [B, 3, H, W] on `device` -> [B, D]; in evaluation mode.
        eval_train: what k-NN and the probe learn from.
        eval_test: what they are tested on.

    Returns:
        knn, linear: accuracy in percent on `eval_test`; rankme, feature_std: of its features. All
        are nan where a feature is not finite.
    """
    where = {"device": device, "num_workers": num_workers}
    train, train_labels = extract_features(features_fn, eval_train, batch_size, **where)
    test, test_labels = extract_features(features_fn, eval_test, batch_size, **where)
    if not (train.isfinite().all() and test.isfinite().all()):
        return dict.fromkeys(("knn", "linear", "rankme", "feature_std"), float("nan"))
    sets = (train, train_labels, test, test_labels)
    return {
        "knn": knn_accuracy(*sets),
        "linear": linear_probe_accuracy(*sets),
        "rankme": rankme(test),
        "feature_std": feature_std(test),
    }
