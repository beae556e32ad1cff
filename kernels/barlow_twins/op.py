"""The public op fastssl::barlow_twins: its checks; the rest is common/gram_op.py."""

from torch import Tensor

from fastssl.kernels.barlow_twins import reference
from fastssl.kernels.common import gram
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.gram_checks import check_number, check_pair
from fastssl.kernels.common.gram_op import GramOp

OP = GramOp("barlow_twins", 2, ("lambd", "eps"), gram.BarlowTwins, reference)


def barlow_twins(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    lambd: float = 5e-3,
    eps: float = 1e-5,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where z0 and z1 are
    """Redundancy reduction between two views (Zbontar et al. 2021, arXiv 2103.03230).

    With C the D x D cross-correlation of the columns of z0 and z1, standardised over the batch
    (biased variance + eps, as a batch normalisation without parameters), the loss is
    sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2. Both views get gradients.

    Several processes: the rows of all ranks of `group` (None: the default group), equally many on
    each, are one batch; every rank returns the loss of the whole batch, and the mean over ranks of
    the gradients is what one process has.

    Autocast does not touch z0 and z1. Raises ValueError or TypeError for arguments that do not
    fit, naming them.
    """
    check_pair(z0, z1)
    check_number("lambd", lambd)
    check_number("eps", eps, positive=True)
    return OP(z0, z1, numbers=(lambd, eps), group=group, backend=backend)
