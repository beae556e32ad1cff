"""Non-parametric instance discrimination (Wu et al., 2018, arXiv:1805.01978)."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl import functional as F
from fastssl.data import Batch
from fastssl.methods.bank_contrast import BankContrast
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, num_features
from fastssl.methods.views import NPID as VIEWS


class NPID(Method):
    """Every sample is a class, and its vector in a memory bank the classifier's weight::

        loss = -log(exp(v . bank[i] / t) / sum_j exp(v . bank[j] / t))

    v is the normalised output of a linear head, bank[i] the running mean of sample i's. j runs over
    i and num_negatives others drawn anew at each visit or, with num_negatives None, over the whole
    dataset, which is the paper's softmax. For many samples the paper estimates that softmax by
    noise-contrastive estimation, M + 1 binary decisions with a fixed normalisation constant; the
    softmax over the drawn samples, as later methods have it, has the same minimum, needs no
    constant, and becomes the whole one as their number grows.
    """

    views = VIEWS

    def __init__(
        self,
        setting: Setting,
        *,
        output_dim: int = 128,
        num_negatives: int | None = 4096,
        temperature: float = 0.07,
        bank_momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_views(setting, "npid", 1)
        self.model, self.seed = setting.encoder, setting.seed
        self.head = nn.Linear(num_features(setting), output_dim)
        self.bank = BankContrast(
            setting.num_samples,
            output_dim,
            momentum=bank_momentum,
            temperature=temperature,
            num_negatives=num_negatives,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.model(batch.images)
        embedding = self.head(features)
        uniforms = batch.uniforms(self.bank.num_uniforms, seed=self.seed, stream=F.STREAM_METHOD)
        (loss,) = self.bank(batch.index, uniforms, embedding)
        self.bank.collect(batch.index, embedding)
        return {"loss": loss, "features": features.detach(), **self.bank.stats(loss)}
