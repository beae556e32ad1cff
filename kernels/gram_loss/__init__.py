"""Gram anchoring of DINOv3 (Simeoni et al. 2025, arXiv 2508.10104).

With the N patches' features of an image (img_level) or of the batch as rows of length 1::

    loss = mean over pairs of patches of (student student^T - teacher teacher^T)^2
    d loss / d student = 4 / pairs * (student student^T - teacher teacher^T) student

On cpp (img_level only) tiles of both matrices of an image are made, subtracted and squared in
place, and multiplied with the student for the gradient while they are in the cache; the matrices
are symmetric, so tiles below the diagonal are those above. An image is one thread's. The gradient
comes with the forward, which spares backward the products; without a gradient it is not made.

FLOPs, with D and E features of B N patches: B N^2 (D + E) forward for many tiles, 2 B N^2 D more
with the gradient; the reference takes 2 B N^2 (D + E) and 4 B N^2 D. Bytes, with e per feature:
reads B N (D + E) e, writes 4 B N (D + E) (unit rows), reads them, writes and reads 8 B N D of the
gradient; backward reads 4 B N D and writes B N D e. Saved for backward: 4 B N D. Peak extra memory
beyond that: 4 B N (D + E) and per thread two tiles of 128 x 128 floats. The reference, which also
serves img_level=False, other devices and float64, stores both N x N matrices per image, and their
difference for backward.
"""

from fastssl.kernels.gram_loss.op import gram_loss

__all__ = ["gram_loss"]
