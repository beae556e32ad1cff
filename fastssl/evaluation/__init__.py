"""Features judged: k-NN, probes, few labels, fine-tuning, and measures that need no labels.

Under torch.distributed each rank gives its share of the samples, of any size, and all get the
number that one process with all samples would. `evaluate`, `knn_accuracy`, `linear_probe_accuracy`
and, unless they get a group, `rankme` and `feature_std` are of the process's own samples alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

# Splits of the low-shot measure: which samples are the few makes more of a difference than most.
LOW_SHOT_SEEDS = range(10)


def evaluate(
    features_fn: Callable[[Tensor], Tensor],
    eval_train: CropsDataset,
    eval_test: CropsDataset,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    labels_per_class: Sequence[int] = (),
) -> dict[str, float]:
    """Judge frozen features on held-out crops.

    Args:
        features_fn: normalised images [B, 3, H, W] on `device` -> [B, D]; in evaluation mode.
        eval_train: what k-NN and the probe learn from.
        eval_test: what they are tested on.
        labels_per_class: how few labels of each class a probe more each learns from.

    Returns:
        knn, linear: accuracy in percent on `eval_test`; rankme, feature_std: of its features;
        low_shot_<n>: of a linear probe with n labels of each class, the mean over `LOW_SHOT_SEEDS`.
        All are nan where a feature is not finite.
    """
    where = {"device": device, "num_workers": num_workers}
    train, train_labels = extract_features(features_fn, eval_train, batch_size, **where)
    test, test_labels = extract_features(features_fn, eval_test, batch_size, **where)
    if not (train.isfinite().all() and test.isfinite().all()):
        few = [f"low_shot_{n}" for n in labels_per_class]
        return dict.fromkeys(("knn", "linear", "rankme", "feature_std", *few), float("nan"))
    sets = (train, train_labels, test, test_labels)
    return {
        "knn": knn_accuracy(*sets),
        "linear": linear_probe_accuracy(*sets),
        "rankme": rankme(test),
        "feature_std": feature_std(test),
        **{f"low_shot_{n}": _low_shot(sets, n) for n in labels_per_class},
    }


def _low_shot(sets: tuple[Tensor, Tensor, Tensor, Tensor], per_class: int) -> float:
    few = {"per_class": per_class, "seeds": LOW_SHOT_SEEDS, "group": ""}
    return low_shot_accuracy(*sets, **few)["linear"].mean
