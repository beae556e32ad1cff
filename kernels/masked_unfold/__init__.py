"""Patches of the visible mask units only, straight from the image: the input of the matrix product
that a patch embedding is (MAE, arXiv 2111.06377; Hiera, arXiv 2306.00989).

With B images of C channels, a convolution's kernel k, stride s and padding p, mask units of m
tokens per dimension (u = prod(m) in all) and K units kept, in one dimension for brevity::

    U = ((S + 2p - k) // s + 1) // m                 # units of an image of S pixels
    unit(y) = min(y // (m s), U - 1)                 # the unit that pixel y belongs to
    token = ids_keep[b, i] m + unit_order[j]         # token j of kept unit i
    y = token s - p + q                              # 0 <= q < k, the window of that token
    out[b, i u + j, c k + q] = images[b, c, y] if 0 <= y < S and unit(y) in ids_keep[b] else 0

so that `out @ weight.flatten(1).T` is `conv(images * mask)` at the kept tokens. The ids of a row
must be unique; ids outside 0 .. U-1 are an error (on a GPU: undefined).

Images are read by their strides. Bytes, with e per pixel of images and o per element of out, n =
C prod(k) columns: forward writes B K u n o and reads B K C prod((m - 1) s + k) e, plus B K ids.
Backward sums, for each pixel of a kept unit, the windows that hold it, in float32 and in row-major
order of their tokens: it reads B K u n o and writes the whole of dimages. Where a window can reach
into another unit (p > 0 or k > s, and K < U), and in backward, the rank of each unit is tabled:
B U int32, written once and read from cache. Saved for backward: ids_keep (and unit_order, one
small tensor per process).

Peak extra memory: the table; on the CPU also one unit's pixels per thread in forward (only if
u > 1) and C W float32 per thread in backward.
"""

from fastssl.kernels.masked_unfold.op import masked_unfold

__all__ = ["masked_unfold"]
