"""vicreg: its reference is the published formula, and bad input is named.

The backends are held to the reference in test_gram.py.
"""

import pytest
import torch

from fastssl import functional as F
from tests.kernels.gram_cases import make_views


def published(z0, z1):
    """Algorithm 1 of the paper, with the halved variance terms of its code."""
    loss = 25 * torch.nn.functional.mse_loss(z0, z1)
    for z in (z0, z1):
        loss += 25 * torch.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean() / 2
        covariance = torch.cov(z.T)
        covariance.fill_diagonal_(0)
        loss += covariance.pow(2).sum() / z.shape[1]
    return loss


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=str)
def test_reference_is_the_published_definition(shape):
    views = make_views(2, shape, torch.float64)
    expected = published(*views)
    torch.testing.assert_close(F.vicreg(*views), expected, rtol=1e-12, atol=1e-14)


BAD = {
    "z0 must have 2 dimensions, got shape (4,)": {"z0": torch.zeros(4)},
    "z0 must have at least one row and one column, got [0, 5]": {"z0": torch.zeros(0, 5)},
    "z1 must have shape [N, D] as z0 = [3, 5], got [4, 5]": {"z1": torch.zeros(4, 5)},
    "z1 must have z0's dtype torch.float32, got torch.float64": {"z1": torch.zeros(3, 5).double()},
    "eps must be positive and finite, got 0": {"eps": 0},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
    "sim_coeff must be at least 0 and finite, got -1": {"sim_coeff": -1},
    "cov_coeff must be a float, got Tensor": {"cov_coeff": torch.tensor(1.0)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {"z0": torch.zeros(3, 5), "z1": torch.zeros(3, 5), **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        F.vicreg(**arguments)
    assert message in str(error.value)
