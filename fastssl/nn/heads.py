"""Projection and prediction heads of the published methods: [B, input_dim] -> [B, output_dim].

Each is an nn.Sequential, so that its keys are the numbers that the official codes have. Their
batch normalisations are torch's; `SyncBatchNorm.convert_sync_batchnorm` turns them into those of
all processes.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels.common.checks import check_int


class _MLP(nn.Sequential):
    """Linear layers of these widths, each but the last followed by normalisation and activation.

    bias: of the hidden layers; last_bias: of the last. last_norm: None for no normalisation of the
    output, else whether it is affine.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        norm: bool,
        bias: bool,
        last_bias: bool,
        last_norm: bool | None = None,
        activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True),
    ) -> None:
        names = ["input_dim", *["hidden_dim"] * (len(widths) - 2), "output_dim"]
        for name, width in zip(names, widths, strict=True):
            check_int(name, width, 1)
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths[:-1]):
            layers.append(nn.Linear(width, following, bias=bias))
            if norm:
                layers.append(nn.BatchNorm1d(following))
            layers.append(activation())
        layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
        if last_norm is not None:
            layers.append(nn.BatchNorm1d(widths[-1], affine=last_norm))
        super().__init__(*layers)


def _widths(input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> list[int]:
    check_int("num_layers", num_layers, 1)
    return [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]


class SimCLRProjectionHead(_MLP):
    """SimCLR (arXiv 2002.05709); three layers are v2's (arXiv 2006.10029)."""

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        batch_norm: bool = True,
    ) -> None:
        super().__init__(
            _widths(input_dim, hidden_dim, output_dim, num_layers),
            norm=batch_norm,
            bias=not batch_norm,
            last_bias=not batch_norm,
            last_norm=True if batch_norm else None,
        )


class MoCoProjectionHead(_MLP):
    """MoCo v2 (arXiv 2003.04297) by default; v3's (arXiv 2104.02057) is (in, 4096, 256, 3, True).

    With batch_norm the layers have no bias and the output is normalised without parameters.
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(
            _widths(input_dim, hidden_dim, output_dim, num_layers),
            norm=batch_norm,
            bias=not batch_norm,
            last_bias=not batch_norm,
            last_norm=False if batch_norm else None,
        )


class MoCoPredictionHead(_MLP):
    """The predictor of MoCo v3 (arXiv 2104.02057); last_norm False for its ResNets."""

    def __init__(
        self,
        input_dim: int = 256,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        last_norm: bool = True,
    ) -> None:
        super().__init__(
            [input_dim, hidden_dim, output_dim],
            norm=True,
            bias=False,
            last_bias=False,
            last_norm=False if last_norm else None,
        )


class BYOLProjectionHead(_MLP):
    """BYOL (arXiv 2006.07733)."""

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 4096, output_dim: int = 256
    ) -> None:
        super().__init__([input_dim, hidden_dim, output_dim], norm=True, bias=True, last_bias=False)


class BYOLPredictionHead(_MLP):
    """BYOL (arXiv 2006.07733)."""

    def __init__(self, input_dim: int = 256, hidden_dim: int = 4096, output_dim: int = 256) -> None:
        super().__init__([input_dim, hidden_dim, output_dim], norm=True, bias=True, last_bias=False)


class SimSiamProjectionHead(_MLP):
    """SimSiam (arXiv 2011.10566): three layers, the output normalised without parameters."""

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 2048, output_dim: int = 2048
    ) -> None:
        super().__init__(
            [input_dim, hidden_dim, hidden_dim, output_dim],
            norm=True,
            bias=False,
            last_bias=False,
            last_norm=False,
        )


class SimSiamPredictionHead(_MLP):
    """SimSiam (arXiv 2011.10566)."""

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 512, output_dim: int = 2048
    ) -> None:
        super().__init__([input_dim, hidden_dim, output_dim], norm=True, bias=False, last_bias=True)


class BarlowTwinsProjectionHead(_MLP):
    """Barlow Twins (arXiv 2103.03230): three layers without bias."""

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192
    ) -> None:
        super().__init__(
            [input_dim, hidden_dim, hidden_dim, output_dim],
            norm=True,
            bias=False,
            last_bias=False,
        )


class VICRegProjectionHead(_MLP):
    """VICReg (arXiv 2105.04906)."""

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        num_layers: int = 3,
    ) -> None:
        super().__init__(
            _widths(input_dim, hidden_dim, output_dim, num_layers),
            norm=True,
            bias=True,
            last_bias=False,
        )


class SwAVProjectionHead(_MLP):
    """SwAV (arXiv 2006.09882); its output goes through F.normalize before the prototypes."""

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 2048, output_dim: int = 128
    ) -> None:
        super().__init__([input_dim, hidden_dim, output_dim], norm=True, bias=True, last_bias=True)


class SwAVPrototypes(nn.Linear):
    """SwAV's prototypes: scores [B, n_prototypes] of normalised embeddings [B, input_dim].

    `normalize_()`, once before each step, gives every prototype length 1. `loss` computes the loss
    inside this layer's forward, where FSDP2 has the weight whole: it is called with the scores and
    the weight and its result returned.
    """

    def __init__(self, input_dim: int = 128, n_prototypes: int = 3000) -> None:
        super().__init__(input_dim, n_prototypes, bias=False)

    @torch.no_grad()
    def normalize_(self) -> None:
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(
        self, x: Tensor, *, loss: Callable[[Tensor, Tensor], object] | None = None
    ) -> object:
        scores = super().forward(x)
        return scores if loss is None else loss(scores, self.weight)


class MSNProjectionHead(_MLP):
    """MSN (arXiv 2204.07141): three layers with GELU."""

    def __init__(self, input_dim: int = 768, hidden_dim: int = 2048, output_dim: int = 256) -> None:
        super().__init__(
            [input_dim, hidden_dim, hidden_dim, output_dim],
            norm=True,
            bias=True,
            last_bias=True,
            activation=nn.GELU,
        )
