"""barlow_twins: its reference is the published formula, and bad input is named.

The backends are held to the reference in test_gram.py.
"""

import pytest
import torch

from fastssl import functional as F
from tests.kernels.gram_cases import make_views


def published(z0, z1):
    """Algorithm 1 of the paper, with a batch normalisation's eps."""
    y0, y1 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z0, z1))
    c = y0.T @ y1 / len(z0)
    c_diff = (c - torch.eye(len(c), dtype=c.dtype)).pow(2)
    off_diagonal = ~torch.eye(len(c), dtype=torch.bool)
    c_diff[off_diagonal] *= 5e-3
    return c_diff.sum()


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=str)
def test_reference_is_the_published_definition(shape):
    views = make_views(2, shape, torch.float64)
    expected = published(*views)
    torch.testing.assert_close(F.barlow_twins(*views), expected, rtol=1e-12, atol=1e-14)


BAD = {
    "z0 must have 2 dimensions, got shape (4,)": {"z0": torch.zeros(4)},
    "z0 must have at least one row and one column, got [0, 5]": {"z0": torch.zeros(0, 5)},
    "z1 must have shape [N, D] as z0 = [3, 5], got [4, 5]": {"z1": torch.zeros(4, 5)},
    "z1 must have z0's dtype torch.float32, got torch.float64": {"z1": torch.zeros(3, 5).double()},
    "eps must be positive and finite, got 0": {"eps": 0},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
    "lambd must be at least 0 and finite, got -1": {"lambd": -1},
    "lambd must be a float, got Tensor": {"lambd": torch.tensor(1.0)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {"z0": torch.zeros(3, 5), "z1": torch.zeros(3, 5), **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        F.barlow_twins(**arguments)
    assert message in str(error.value)
