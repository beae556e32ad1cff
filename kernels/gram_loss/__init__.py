"""Gram anchoring of DINOv3 (Simeoni et al. 2025, arXiv 2508.10104).

With the N patches' features of an image (img_level) or of the batch as rows of length 1::

    loss = mean over pairs of patches of (student student^T - teacher teacher^T)^2
    d loss / d student = 4 / pairs * (student student^T - teacher teacher^T) student

The gradient comes with the forward, which spares backward the products; without a gradient it is
not made. A batch without img_level is one image of B N patches; of several processes, each takes
its own patches against those of one process after the other, gathered once. Neither N x N matrix
is stored, and no sum depends on the order in which threads or programs run.

cpp: tiles of both matrices are made, subtracted and squared in place, and multiplied with the
student while they are in the cache. The matrices are symmetric, so tiles below the diagonal are
those above; threads share out rounds of tiles that add to different rows of the gradient. Products
are float32 whatever the input, since bfloat16 ones, 4 to 8 times faster in torch, return rounded
similarities (students within 0.1 standard deviations of a teacher of related patches: 4 % off in
loss and gradient, within 0.01: 400 % and 57 %), and the gradient's product in bfloat16 alone makes
a tile 0.94 to 1.17 times as fast.

triton: products in the student's precision with float32 sums, three TF32 ones for float32. One
kernel makes tiles of differences and the sums of their squares, another multiplies a panel of them
with the student; differences are rounded to bfloat16 for that where the student is, and to TF32
where it is float16.

FLOPs, with P pairs of patches and D and E features: P (D + E) forward for many tiles on cpp, twice
that on triton and against another process, and 2 P D more with the gradient; the reference takes
2 P (D + E) and 4 P D. Bytes, with e per feature: reads B N (D + E) e, and B N D e of the gradient
are written in backward, which reads the 4 B N D that forward wrote; cpp writes and reads
4 B N (D + E) of unit rows, triton the panels (2 bytes for each pair from bfloat16, 4 from others),
from the cache where it holds them.

Saved for backward: 4 B N D, times the number of processes without img_level, for a pair's share in
the loss of either's process. Peak extra memory beyond that: on cpp 4 B N (D + E), and as much for
another process's rows, and per thread two tiles of 128 x 128 floats; on triton a panel of up to
128 x 128 x 1024 differences of 2 or 4 bytes. Without img_level also the gathered features,
e (D + E) for every patch. The reference, which also serves other devices and float64, stores both
N x N matrices per image, and their difference for backward.
"""

from fastssl.kernels.gram_loss.op import gram_loss

__all__ = ["gram_loss"]
