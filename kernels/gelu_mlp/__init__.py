"""The transformer's feed-forward layer with exact GELU (Hendrycks and Gimpel 2016, arXiv
1606.08415), as one op.

With M rows, K inputs, H hidden and N output features, and Phi the normal distribution function::

    h = x fc1_weight^T
    a = gelu(h + fc1_bias), gelu(v) = v Phi(v)
    y = a fc2_weight^T + fc2_bias

    da = dy fc2_weight
    dh = da gelu'(h + fc1_bias), gelu'(v) = Phi(v) + v phi(v)      # in place of da
    dfc1_bias = sum of the rows of dh
    dfc2_weight = dy^T a, dfc1_weight = dh^T x, dx = dh fc1_weight

Bias and GELU are one pass over h, and backward's second pass over h makes a again, dh and the sums
of dfc1_bias at once. Products and casts are those of `fastssl.kernels.linear`. On cpp Phi and gelu'
of bfloat16 are polynomials within 8e-6 and 1e-4, otherwise within 3e-7.

FLOPs: 2 MH(K + N) forward, twice that backward. Bytes beside the products, with e per element of
the product's dtype: forward reads and writes MHe, backward reads and writes 2 MHe. Saved for
backward: x, h and both weights as `linear` saves them; h, MHe bytes, only once, where eager saves
the activation as well. Peak extra memory: MHe forward (0 without gradients), 2 MHe backward, and
what linear needs.
"""

from fastssl.kernels.gelu_mlp.op import gelu_mlp

__all__ = ["gelu_mlp"]
