"""Linear and attentive probes on frozen features, trained at several learning rates at once.

N training and M test samples, T tokens, D feature dimensions, L learning rates, B samples of a
step, H attention heads, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.evaluation.sgd import ProbeResult, SGDOptions, train_probes
from fastssl.evaluation.shares import check_sets, num_classes
from fastssl.kernels.common.checks import check_int
from fastssl.kernels.common.collectives import Group

_DEFAULT = SGDOptions()


def sgd_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    options: SGDOptions = _DEFAULT,
    *,
    group: Group = None,
) -> ProbeResult:
    """Linear classifiers, one per learning rate, from zero (Oquab et al. 2023, arXiv:2304.07193).

    Args:
        train_features: [N, D], this rank's share.
        train_labels: [N] int64, from 0 on.
        test_features: [M, D], this rank's share.
        test_labels: [M] int64.
        group: the ranks that hold shares; None is the default group, "" this process alone.
    """
    check_sets(train_features, train_labels, test_features, test_labels, group)
    shape = (len(options.lrs), num_classes(group, train_labels, test_labels))
    weight = torch.zeros(*shape, train_features.shape[1], device=train_features.device)
    bias = torch.zeros(shape, device=train_features.device)
    return train_probes(
        _linear_heads,
        [weight, bias],
        (train_features, train_labels),
        (test_features, test_labels),
        options,
        group,
    )


def attentive_probe(
    train_tokens: Tensor,
    train_labels: Tensor,
    test_tokens: Tensor,
    test_labels: Tensor,
    options: SGDOptions = _DEFAULT,
    *,
    num_heads: int = 8,
    group: Group = None,
) -> ProbeResult:
    """Tokens pooled by the cross-attention of one learned query, then a linear classifier.

    As in V-JEPA (Bardes et al. 2024, arXiv:2404.08471), without its MLP and residual block, one
    per learning rate. It starts as the mean over tokens: a query of zeros, keys and values that
    are the tokens.

    Args:
        train_tokens: [N, T, D], this rank's share; D divisible by num_heads.
        train_labels: [N] int64, from 0 on.
        test_tokens: [M, T, D], this rank's share.
        test_labels: [M] int64.
        group: the ranks that hold shares; None is the default group, "" this process alone.
    """
    check_sets(train_tokens, train_labels, test_tokens, test_labels, group, dim=3)
    check_int("num_heads", num_heads, 1)
    dim, num_rates = train_tokens.shape[2], len(options.lrs)
    if dim % num_heads:
        raise ValueError(f"num_heads must divide D = {dim}, got {num_heads}")
    device = train_tokens.device
    identity = torch.eye(dim, device=device).view(num_heads, dim // num_heads, dim)
    classes = num_classes(group, train_labels, test_labels)
    parameters = [
        torch.zeros(num_rates, num_heads, dim // num_heads, device=device),
        identity.repeat(num_rates, 1, 1, 1),
        identity.repeat(num_rates, 1, 1, 1),
        torch.zeros(num_rates, classes, dim, device=device),
        torch.zeros(num_rates, classes, device=device),
    ]
    return train_probes(
        _attentive_heads,
        parameters,
        (train_tokens, train_labels),
        (test_tokens, test_labels),
        options,
        group,
    )


def _linear_heads(parameters: Sequence[Tensor], x: Tensor) -> Tensor:  # [B, D] -> [L, B, C]
    weight, bias = parameters  # [L, C, D], [L, C]
    logits = x @ weight.flatten(0, 1).T + bias.flatten()
    return logits.unflatten(1, bias.shape).transpose(0, 1)


def _attentive_heads(parameters: Sequence[Tensor], x: Tensor) -> Tensor:  # [B, T, D] -> [L, B, C]
    query, key, value, weight, bias = parameters
    # Keys and values are linear in the tokens: the query goes to the tokens' space, and the
    # tokens are pooled first, so that nothing is projected token by token.
    query = torch.einsum("lhe,lhed->lhd", query, key) * query.shape[2] ** -0.5
    scores = x @ query.flatten(0, 1).T  # [B, T, L * H]
    pooled = scores.softmax(dim=1).transpose(1, 2) @ x  # [B, L * H, D]
    pooled = pooled.unflatten(1, query.shape[:2])
    features = torch.einsum("blhd,lhed->lbhe", pooled, value).flatten(2)  # [L, B, D]
    return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
