"""The public op fastssl::vicreg: its checks; the rest is common/gram_op.py."""

from torch import Tensor

from fastssl.kernels.common import gram
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.gram_checks import check_number, check_pair
from fastssl.kernels.common.gram_op import GramOp
from fastssl.kernels.vicreg import reference

OP = GramOp("vicreg", 2, ("sim_coeff", "std_coeff", "cov_coeff", "eps"), gram.VICReg, reference)


def vicreg(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    eps: float = 1e-4,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where z0 and z1 are
    """Variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv 2105.04906).

    The sum of sim_coeff * mean (z0 - z1)^2 and, for each view with the unbiased covariance C of its
    columns, std_coeff / 2 * mean_j max(0, 1 - sqrt(C_jj + eps)) and cov_coeff / D *
    sum_{i != j} C_ij^2. The half is the authors' code's, not the paper's. A batch of one has
    variance 0. Both views get gradients.

    Several processes: the rows of all ranks of `group` (None: the default group), equally many on
    each, are one batch; every rank returns the loss of the whole batch, and the mean over ranks of
    the gradients is what one process has.

    Autocast does not touch z0 and z1. Raises ValueError or TypeError for arguments that do not
    fit, naming them.
    """
    check_pair(z0, z1)
    coefficients = {"sim_coeff": sim_coeff, "std_coeff": std_coeff, "cov_coeff": cov_coeff}
    for name, value in coefficients.items():
        check_number(name, value)
    check_number("eps", eps, positive=True)
    return OP(z0, z1, numbers=(sim_coeff, std_coeff, cov_coeff, eps), group=group, backend=backend)
