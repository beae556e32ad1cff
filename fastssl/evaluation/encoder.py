"""An encoder to be judged, and what it makes of a dataset that ranks share.

B images, T tokens, D feature dimensions, N samples of this rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastssl import distributed
from fastssl.data import Batch, NoReadableImage
from fastssl.data.labelled import rank_requests
from fastssl.data.loader import CropsDataset, Loader
from fastssl.distributed import World
from fastssl.kernels.common import collectives
from fastssl.models import MaskedAutoencoderHiera, MaskedAutoencoderViT
from fastssl.nn import SyncBatchNorm


class Encoder(nn.Module):
    """Called, normalised images [B, 3, H, W] -> float32 features [B, D].

    model: whose parameters these features come from.
    features: how; None: `model` itself, or `model.features` of a masked autoencoder, whose call is
        its loss.
    dtype: of autocast, None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        if features is None:
            is_mae = isinstance(model, (MaskedAutoencoderViT, MaskedAutoencoderHiera))
            features = model.features if is_mae else model.__call__
        # A bound method, so that no more than `model` is registered, and a copy has its own.
        self._features = features
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        features = self._run(self._features, images)
        if features.dim() != 2:
            raise ValueError(
                f"the encoder must give features of shape [B, D], got {list(features.shape)}"
            )
        return features

    def tokens(self, images: Tensor) -> Tensor:
        """`model.forward_features` as [B, T, D]; see `check_tokens`."""
        tokens = self._run(self.model.forward_features, images)
        if tokens.dim() == 4:
            # A map of features, [B, D, h, w].
            tokens = tokens.flatten(2).transpose(1, 2)
        if tokens.dim() != 3:
            raise ValueError(
                "the encoder's forward_features must give [B, T, D] or [B, D, h, w], got "
                f"{list(tokens.shape)}"
            )
        return tokens

    def check_tokens(self) -> None:
        """ValueError for an encoder without tokens."""
        if not hasattr(self.model, "forward_features"):
            raise ValueError(
                "measure attentive needs the tokens of an encoder: "
                f"{type(self.model).__name__} has no forward_features"
            )

    def trainable_copy(self) -> Encoder:
        """A copy of which all is trained if it is a teacher, of which nothing is; its batch
        normalisations are over all ranks."""
        encoder = copy.deepcopy(self)
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.requires_grad_(True)
        if collectives.world_size() > 1:
            SyncBatchNorm.convert_sync_batchnorm(encoder)
        return encoder

    def _run(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            return function(images).float()


@dataclass(frozen=True)
class Extracted:
    """outputs: each [N, ...], of this rank's samples, on its device; labels: [N], or None; index:
    [N], the samples in the dataset; skipped: {path: reason} of files that could not be read."""

    outputs: tuple[Tensor, ...]
    labels: Tensor | None
    index: Tensor
    skipped: dict[str, str]


@torch.no_grad()
def extract(
    function: Callable[[Batch], tuple[Tensor, ...]],
    dataset: CropsDataset,
    world: World,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Extracted:
    """`function` of all batches of a dataset, in its order; a rank has whole consecutive batches.

    Raises:
        NoReadableImage: there is nothing to extract from.
        ValueError: an output is not finite. Both are raised on all ranks.
    """
    requests = rank_requests(len(dataset), batch_size, world.rank, world.size)
    parts: list[tuple[Tensor, ...]] = []
    labels: list[Tensor] = []
    index = [torch.empty(0, dtype=torch.int64, device=world.device)]
    loader = Loader(dataset, requests, num_workers=num_workers, device=world.device)
    for batch in loader:
        if len(batch) == 0:
            continue
        parts.append(function(batch))
        index.append(batch.index)
        if batch.labels is not None:
            labels.append(batch.labels)
    own = [(output.shape[1:], output.dtype) for output in parts[0]] if parts else None
    skipped: dict[str, str] = {}
    for of_rank in distributed.gather(loader.skipped):
        skipped |= of_rank
    kinds = next((kind for kind in distributed.gather(own) if kind is not None), None)
    if kinds is None:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:5])
        raise NoReadableImage(f"data must hold at least one readable image, got none ({reasons})")
    if not parts:
        empty = partial(torch.empty, device=world.device)
        parts = [tuple(empty(0, *shape, dtype=dtype) for shape, dtype in kinds)]
    outputs = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    if distributed.any_rank(not all(output.isfinite().all() for output in outputs)):
        raise ValueError("the encoder's features must be finite, got nan or inf")
    has_labels = any(distributed.gather(bool(labels)))
    none = torch.empty(0, dtype=torch.int64, device=world.device)
    return Extracted(
        outputs, torch.cat([none, *labels]) if has_labels else None, torch.cat(index), skipped
    )
