"""Pixel loss of a masked autoencoder, straight from the images (He et al. 2021, arXiv 2111.06377).

With B images, N patches, p values in a patch, and patch n of an image flattened in the layout of
the prediction::

    target = x                                        # norm_pix_loss=False
    target = (x - mean(x)) / sqrt(var(x) + 1e-6)      # norm_pix_loss=True, unbiased variance
    per_token[b, n] = mean over p of (pred[b, n] - target[b, n]) ** 2
    loss = sum(mask * per_token) / sum(mask)          # 0, with zero gradient, where sum(mask) = 0

Statistics and differences are float32 whatever the inputs. Patches whose mask is 0 are not read,
and no patchified target exists in memory.

Bytes, with e per element of pred, i per pixel and M tokens in the loss: forward reads Mp(e + i) and
writes 4 per token, backward reads Mp(e + i) and writes BNpe (zeros included). Saved for backward:
the inputs and, with norm_pix_loss, two floats per token (mean and 1/std). Peak extra memory: 12
bytes per token, and on a CPU one float32 patch per thread. The gradient goes to pred only; images
that require one are served by the reference.
"""

from fastssl.kernels.masked_patch_mse.op import masked_patch_mse

__all__ = ["masked_patch_mse"]
