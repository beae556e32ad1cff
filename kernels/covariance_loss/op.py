"""The public op fastssl::covariance_loss: its checks; the rest is common/gram_op.py."""

from torch import Tensor

from fastssl.kernels.common import gram
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.gram_checks import check_batch
from fastssl.kernels.common.gram_op import GramOp
from fastssl.kernels.covariance_loss import reference

OP = GramOp("covariance_loss", 1, (), lambda: gram.VICReg(0.0, 0.0, 1.0, 1.0), reference)


def covariance_loss(
    z: Tensor,  # [N, D]
    *,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where z is
    """Sum of the squared off-diagonal entries of the unbiased covariance of z's columns, over D:
    the covariance term of VICReg (Bardes et al. 2022, arXiv 2105.04906).

    Several processes: the rows of all ranks of `group` (None: the default group), equally many on
    each, are one batch; every rank returns the loss of the whole batch, and the mean over ranks of
    the gradients is what one process has.

    Autocast does not touch z. Raises ValueError or TypeError for arguments that do not fit.
    """
    check_batch("z", z)
    return OP(z, numbers=(), group=group, backend=backend)
