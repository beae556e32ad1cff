"""covariance_loss: its reference is the published formula, and bad input is named.

The backends are held to the reference in test_gram.py.
"""

import pytest
import torch

from fastssl import functional as F
from tests.kernels.gram_cases import make_views


def published(z):
    covariance = torch.cov(z.T)
    covariance.fill_diagonal_(0)
    return covariance.pow(2).sum() / z.shape[1]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=str)
def test_reference_is_the_published_definition(shape):
    views = make_views(1, shape, torch.float64)
    expected = published(*views)
    torch.testing.assert_close(F.covariance_loss(*views), expected, rtol=1e-12, atol=1e-14)


BAD = {
    "z must have 2 dimensions, got shape (4,)": {"z": torch.zeros(4)},
    "z must have at least one row and one column, got [0, 5]": {"z": torch.zeros(0, 5)},
    "z must be a Tensor, got list": {"z": [1.0]},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {"z": torch.zeros(3, 5), **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        F.covariance_loss(**arguments)
    assert message in str(error.value)
