"""The kernels of masked autoencoding at ViT-B sizes (and Hiera's patch embedding).

B images, N patches, K visible ones, D embedding, P = 16 * 16 * 3 pixels in a patch; one prefix
token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Case, op_case
from fastssl import functional as F

N, K, D, DECODER_D, P = 196, 49, 768, 512, 768
DTYPES = (torch.float32, torch.bfloat16)
# Hiera: 7x7 kernel, stride 4, mask units of 8x8 tokens, 40 % of 49 units kept.
HIERA = {"stride": 4, "padding": 3, "unit_size": 8}
HIERA_KEPT, HIERA_DIM, HIERA_TOKENS = 19, 96, 64


def cases(quick: bool) -> list[Case]:
    batch = 2 if quick else 64
    made = [keyed_uniform(batch), random_masking(batch)]
    for dtype in DTYPES:
        made += [masked_gather(batch, dtype), masked_scatter(batch, dtype)]
        made += [patch_embed_vit(batch, dtype), patch_embed_hiera(batch, dtype)]
        made += [masked_patch_mse(batch, dtype)]
    return made


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _permutations(batch: int, tokens: int, device: torch.device) -> Tensor:
    return torch.rand(batch, tokens, device=device).argsort(1).int()


def keyed_uniform(batch: int) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        return (torch.randint(0, 1 << 40, (batch,), device=device),)

    def function(samples: Tensor, backend: str | None) -> Tensor:
        return F.keyed_uniform(samples, N, seed=1, epoch=2, backend=backend)

    return op_case(
        "keyed_uniform",
        function,
        make_inputs,
        op="keyed_uniform",
        shape=f"B={batch} N={N}",
        dtype=torch.float32,
        direction=FORWARD,
        bytes_moved=batch * (8 + 4 * N),
    )


def random_masking(batch: int) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        return (torch.rand(batch, N, device=device),)

    def function(noise: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        return F.random_masking(noise, K, backend=backend)

    return op_case(
        "random_masking",
        function,
        make_inputs,
        op="random_masking",
        shape=f"B={batch} N={N} K={K}",
        dtype=torch.float32,
        direction=FORWARD,
        bytes_moved=batch * 4 * (N + 2 * N + K),
    )


def masked_gather(batch: int, dtype: torch.dtype) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        ids = _permutations(batch, N, device)
        x = torch.randn(batch, 1 + N, D, device=device, dtype=dtype, requires_grad=True)
        pos = torch.randn(1 + N, D, device=device, dtype=dtype)
        dout = torch.randn(batch, 1 + K, D, device=device, dtype=dtype)
        return x, ids[:, :K].contiguous(), ids.argsort(1).int(), pos, dout

    def function(x, ids_keep, ids_restore, pos, backend: str | None) -> Tensor:
        return F.masked_gather(
            x, ids_keep, pos, ids_restore=ids_restore, num_prefix_tokens=1, backend=backend
        )

    return op_case(
        "masked_gather",
        function,
        make_inputs,
        op="masked_gather",
        shape=f"B={batch} N={N} K={K} D={D}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        bytes_moved=_size(dtype) * batch * D * (3 * (1 + K) + (1 + N)),
    )


def masked_scatter(batch: int, dtype: torch.dtype) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        def random(*shape: int, grad: bool = False) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

        x = random(batch, 1 + K, DECODER_D, grad=True)
        mask_token = random(DECODER_D, grad=True)
        ids_restore = _permutations(batch, N, device)
        return x, mask_token, ids_restore, random(1 + N, DECODER_D), random(batch, 1 + N, DECODER_D)

    def function(x, mask_token, ids_restore, pos, backend: str | None) -> Tensor:
        return F.masked_scatter(
            x, mask_token, ids_restore, pos, num_prefix_tokens=1, backend=backend
        )

    return op_case(
        "masked_scatter",
        function,
        make_inputs,
        op="masked_scatter",
        shape=f"B={batch} N={N} K={K} D={DECODER_D}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        bytes_moved=2 * _size(dtype) * batch * DECODER_D * (2 + K + N),
    )


def masked_patch_mse(batch: int, dtype: torch.dtype) -> Case:
    """float32 images beside a prediction of `dtype`, as under autocast."""

    def make_inputs(device: torch.device) -> tuple:
        pred = torch.randn(batch, N, P, device=device, dtype=dtype, requires_grad=True)
        images = torch.randn(batch, 3, 224, 224, device=device)
        mask = (_permutations(batch, N, device) >= K).float()
        return pred, images, mask, torch.ones((), device=device)

    def function(pred, images, mask, backend: str | None) -> Tensor:
        return F.masked_patch_mse(
            pred, images, mask, patch_size=16, norm_pix_loss=True, backend=backend
        )

    size, in_loss = _size(dtype), batch * (N - K) * P
    return op_case(
        "masked_patch_mse",
        function,
        make_inputs,
        op="masked_patch_mse",
        shape=f"B={batch} N={N} masked={N - K} p={P}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        bytes_moved=2 * in_loss * (size + 4) + batch * N * P * size,
    )


def patch_embed_vit(batch: int, dtype: torch.dtype) -> Case:
    """The rival embeds every patch and gathers the visible ones, as MAE's own code does."""

    def function(images, weight, bias, ids_keep, backend: str | None) -> Tensor:
        return F.masked_patch_embed(images, weight, bias, ids_keep, stride=16, backend=backend)

    def rival(images, weight, bias, ids_keep) -> Tensor:
        tokens = conv2d(images.to(weight.dtype), weight, bias, stride=16).flatten(2).transpose(1, 2)
        return tokens.gather(1, ids_keep.long().unsqueeze(-1).expand(-1, -1, D))

    return _patch_embed("vit_b", batch, dtype, (D, 16), (N, K, 1), function, rival)


def patch_embed_hiera(batch: int, dtype: torch.dtype) -> Case:
    """The rival convolves the masked image and picks the kept tokens, as Hiera's code does."""

    def function(images, weight, bias, ids_keep, backend: str | None) -> Tensor:
        return F.masked_patch_embed(images, weight, bias, ids_keep, **HIERA, backend=backend)

    def rival(images, weight, bias, ids_keep) -> Tensor:
        ids = ids_keep.long()
        units = torch.zeros(len(images), 49, device=images.device, dtype=weight.dtype)
        mask = units.scatter(1, ids, 1.0).view(-1, 1, 7, 7)
        pixels = mask.repeat_interleave(32, 2).repeat_interleave(32, 3)
        x = conv2d(images.to(weight.dtype) * pixels, weight, bias, stride=4, padding=3)
        x = x.unflatten(3, (7, 8)).unflatten(2, (7, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)
        x = x.flatten(1, 2)
        index = ids[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return x.gather(1, index).flatten(1, 2)

    units = (49, HIERA_KEPT, HIERA_TOKENS)
    return _patch_embed("hiera", batch, dtype, (HIERA_DIM, 7), units, function, rival)


def _patch_embed(
    name: str,
    batch: int,
    dtype: torch.dtype,
    weight_size: tuple[int, int],  # output width, kernel side
    units: tuple[int, int, int],  # units of an image, units kept, tokens in each
    function: Callable,
    rival: Callable,
) -> Case:
    """float32 images; weights (and with them the product) of `dtype`, as under autocast."""
    (dim, kernel), (num_units, kept, tokens) = weight_size, units
    columns, rows = 3 * kernel * kernel, batch * kept * tokens

    def make_inputs(device: torch.device) -> tuple:
        weight = torch.randn(dim, 3, kernel, kernel, device=device) * columns**-0.5
        return (
            torch.randn(batch, 3, 224, 224, device=device),
            weight.to(dtype).requires_grad_(),
            torch.randn(dim, device=device).to(dtype).requires_grad_(),
            _permutations(batch, num_units, device)[:, :kept].contiguous(),
            torch.randn(batch, kept * tokens, dim, device=device).to(dtype),
        )

    pixels = batch * 3 * 224 * 224 * kept // num_units
    return op_case(
        f"masked_patch_embed/{name}",
        function,
        make_inputs,
        op="masked_unfold",
        shape=f"B={batch} kept={kept * tokens} of {num_units * tokens} k={kernel} D={dim}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        # Images twice (forward and the weight's gradient), output and its gradient once each.
        bytes_moved=8 * pixels + 2 * rows * dim * _size(dtype),
        flops=2 * 2 * rows * columns * dim,
        rival=rival,
    )
