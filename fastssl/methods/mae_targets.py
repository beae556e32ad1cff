"""What MAE predicts (He et al., 2021, arXiv:2111.06377, table 1d): pixels, components, tokens.

B images, N patches, p pixels of a patch in all channels, k components. Each target is a module:
`num_outputs` numbers are predicted of a patch, `target(model, images, pred, mask)` is the loss of
pred [B, N, num_outputs] where mask [B, N] is 1, and `target.patches(pred)` are the patches
[B, N, p] that a prediction stands for, None if there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.methods.build import import_named
from fastssl.models import MaskedAutoencoderViT
from fastssl.nn import Linear

TARGETS = ("pixel", "norm_pixel", "pca", "tokens")


def build_target(
    target: str | None,
    model: MaskedAutoencoderViT,
    *,
    num_components: int,
    tokenizer: str | nn.Module | None,
    num_tokens: int,
) -> nn.Module:
    """The target called so; None is what `model.norm_pix_loss` says. The model is made to fit."""
    if target is not None and target not in TARGETS:
        raise ValueError(f"method.args.target must be one of {', '.join(TARGETS)}, got {target!r}")
    if tokenizer is not None and target != "tokens":
        raise ValueError(f"method.args.tokenizer needs target tokens, got target {target}")
    if target == "pca":
        module = PCATarget(model.decoder_pred.out_features, num_components)
    elif target == "tokens":
        module = TokenTarget(tokenizer, num_tokens)
    else:
        if target is not None:
            model.norm_pix_loss = target == "norm_pixel"
        return PixelTarget()
    model.norm_pix_loss = False
    model.decoder_pred = Linear(model.decoder_pred.in_features, module.num_outputs)
    nn.init.xavier_uniform_(model.decoder_pred.weight)
    nn.init.zeros_(model.decoder_pred.bias)
    return module


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of values [B, N] where mask [B, N] is 1."""
    return (values * mask).sum() / mask.sum()


class PixelTarget(nn.Module):
    """The pixels of a patch, as the model's `norm_pix_loss` says."""

    def forward(
        self, model: MaskedAutoencoderViT, images: Tensor, pred: Tensor, mask: Tensor
    ) -> Tensor:
        return model.forward_loss(images, pred, mask)

    def patches(self, pred: Tensor) -> Tensor:
        return pred


class PCATarget(nn.Module):
    """The first k principal components of a patch, by squared error::

        target = (patch - mean) @ basis

    mean [p] and basis [p, k] are those of all patches of the first micro-batch of all ranks. They
    are in the state dict, and kept from the first step that is made on.
    """

    mean: Tensor
    basis: Tensor
    is_fitted: Tensor

    def __init__(self, num_pixels: int, num_components: int = 96) -> None:
        super().__init__()
        check_int("method.args.num_components", num_components, 1, num_pixels)
        self.num_outputs = num_components
        self.register_buffer("mean", torch.zeros(num_pixels))
        self.register_buffer("basis", torch.zeros(num_pixels, num_components))
        self.register_buffer("is_fitted", torch.tensor(False))
        # What `is_fitted` says, without waiting for its device; None: to be read.
        self._fitted: bool | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = self._found = None

    def forward(
        self, model: MaskedAutoencoderViT, images: Tensor, pred: Tensor, mask: Tensor
    ) -> Tensor:
        true = model.patchify(images)
        mean, basis = self._components(true)
        target = (true.to(mean.dtype) - mean) @ basis
        error = (pred.to(target.dtype) - target).square().mean(2)
        return masked_mean(error, mask)

    def patches(self, pred: Tensor) -> Tensor | None:
        if not self._is_fitted():
            return None
        return pred.to(self.mean.dtype) @ self.basis.T + self.mean

    def _is_fitted(self) -> bool:
        if self._fitted is None:
            self._fitted = bool(self.is_fitted)
        return self._fitted

    def _components(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_fitted():
            return self.mean, self.basis
        if self._found is None:
            mean, basis = principal_components(patches.flatten(0, 1), self.num_outputs)
            self._found = mean.to(self.mean), basis.to(self.basis)
        return self._found

    @torch.no_grad()
    def step(self) -> None:
        """Keep what was found in the first step."""
        if self._found is not None:
            self.mean.copy_(self._found[0])
            self.basis.copy_(self._found[1])
            self.is_fitted.fill_(True)
            self._fitted, self._found = True, None

    def discard(self) -> None:
        """Forget it, as after a step that was not made."""
        self._found = None


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def principal_components(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Mean [p] and first components [p, number] of the rows x [n, p] of all ranks: float64, on the
    CPU. Components have length 1, and their largest entry is positive."""
    x = x.detach().double()
    with torch.autocast(x.device.type, enabled=False):
        sums = torch.cat([x.sum(0), (x.T @ x).flatten(), x.new_tensor([len(x)])])
    sums = collectives.all_reduce_sum(sums).cpu()
    p = x.shape[1]
    mean = sums[:p] / sums[-1]
    covariance = sums[p:-1].view(p, p) / sums[-1] - torch.outer(mean, mean)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :number]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return mean, basis * largest.sign()


class TokenTarget(nn.Module):
    """The id that a tokenizer gives a patch, by cross-entropy, as in BEiT (arXiv 2106.08254).

    tokenizer: a module, or `file.py:factory` or `package.module:factory` which makes it: images
        [B, C, H, W] -> int64 [B, N], below `num_tokens`. It is not trained and stays in eval mode.
    """

    def __init__(self, tokenizer: str | nn.Module | None, num_tokens: int = 8192) -> None:
        super().__init__()
        check_int("method.args.num_tokens", num_tokens, 2)
        expected = "file.py:factory of a module [B, C, H, W] -> [B, N]"
        if isinstance(tokenizer, str):
            tokenizer = import_named("method.args.tokenizer", tokenizer, expected)()
        if not isinstance(tokenizer, nn.Module):
            raise ValueError(f"method.args.tokenizer must be {expected}, got {tokenizer!r}")
        self.num_outputs = num_tokens
        self.tokenizer = tokenizer.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> TokenTarget:
        return super().train(False)

    def forward(
        self, model: MaskedAutoencoderViT, images: Tensor, pred: Tensor, mask: Tensor
    ) -> Tensor:
        with torch.no_grad():
            ids = self.tokenizer(images)
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != mask.shape:
            came = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids)
            raise ValueError(
                f"method.args.tokenizer must return int64 {list(mask.shape)}, got {came}"
            )
        error = nn.functional.cross_entropy(pred.flatten(0, 1), ids.flatten(), reduction="none")
        return masked_mean(error.view_as(mask), mask)

    def patches(self, pred: Tensor) -> None:
        """None: tokens are no picture."""
        return None
