"""Residual add, LayerScale, stochastic depth and LayerNorm, in one pass.

With B samples, D channels, rows of D values and b the sample of a row::

    residual = x + branch * gamma * scale[b]
    normed = (residual - mean) / sqrt(var + eps) * weight + bias    # mean, var of the row

gamma is LayerScale (arXiv 2103.17239), scale stochastic depth (arXiv 1603.09382); both and the
branch itself are optional. Statistics are float32, from two passes over a row that lies in cache or
registers. Backward, with xhat = (residual - mean) / std and g = dnormed * weight::

    dx = dresidual + (g - mean(g) - xhat * mean(g * xhat)) / std
    dbranch = dx * gamma * scale[b]
    dweight = sum(dnormed * xhat);  dbias = sum(dnormed);  dgamma = sum(dx * branch * scale[b])

The sums over rows are float32: chunks of rows fixed by the shape (on a GPU: by the shape and the
number of processors), then chunk by chunk, so the same bits for any number of threads.

Bytes per value with a float32 stream, a bf16 branch and a bf16 result: forward 4 + 2 + 4 + 2,
backward 4 (dresidual) + 2 (dnormed) + 4 (residual) + 4 (dx) + 2 (dbranch), and 2 (branch) for
dgamma. Saved for backward: residual, which the stream keeps alive anyway, mean and 1 / std of each
row, weight, gamma, scale; branch only where gamma needs a gradient. Peak extra memory: backward
holds at most 256 (on a GPU: four times the number of processors) x 3 x D float32 partial sums.
"""

from fastssl.kernels.add_layer_norm.op import add_layer_norm

__all__ = ["add_layer_norm"]
