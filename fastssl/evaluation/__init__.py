"""Features judged: k-NN, probes, few labels, fine-tuning, and measures that need no labels.

Under torch.distributed each rank gives its share of the samples, of any size, and all get the
number that one process with all samples would. `evaluate`, `knn_accuracy`, `linear_probe_accuracy`
and, unless they get a group, `rankme` and `feature_std` are of the process's own samples alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.data.loader import CropsDataset
from fastssl.evaluation.features import extract_features
from fastssl.evaluation.finetune import FineTuneOptions, fine_tune
from fastssl.evaluation.knn import knn_accuracies, knn_accuracy
from fastssl.evaluation.linear import linear_probe_accuracy
from fastssl.evaluation.low_shot import Spread, low_shot_accuracy, low_shot_split
from fastssl.evaluation.measures import (
    TeacherEntropy,
    alignment,
    feature_std,
    rankme,
    teacher_entropy,
    uniformity,
)
from fastssl.evaluation.sgd import ProbeResult, SGDOptions
from fastssl.evaluation.sgd_probes import attentive_probe, sgd_probe

__all__ = [
    "FineTuneOptions",
    "ProbeResult",
    "SGDOptions",
    "Spread",
    "TeacherEntropy",
    "alignment",
    "attentive_probe",
    "evaluate",
    "extract_features",
    "feature_std",
    "fine_tune",
    "knn_accuracies",
    "knn_accuracy",
    "linear_probe_accuracy",
    "low_shot_accuracy",
    "low_shot_split",
    "rankme",
    "sgd_probe",
    "teacher_entropy",
    "uniformity",
]


def evaluate(
    features_fn: Callable[[Tensor], Tensor],
    eval_train: CropsDataset,
    eval_test: CropsDataset,
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
