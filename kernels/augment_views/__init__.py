"""Random views of decoded images: crop, resize, flip, colour jitter, grey, blur, solarise and
normalise (SimCLR, arXiv 2002.05709; BYOL, arXiv 2006.07733; DINO, arXiv 2104.14294), all views of
one size in one call.

The pixels of B images of different sizes lie one after the other, each [H, W, 3] as decoders give
them; view r is of image[r]. It is, in this order::

    x = resize(pixels of boxes[r], size) / 255              # to 8 bits, as Pillow's resize does
    x = mirrored x                                         if flip
    for i in order: x = (brightness, contrast, saturation, hue)[i](x, factors[i])     if jitter
        brightness:  clip(f x)
        contrast:    clip(f x + (1 - f) mean(luma(x)))     # the mean over the pixels of the view
        saturation:  clip(f x + (1 - f) luma(x))
        hue:         HSV(H + f mod 1, S, V)                # f in turns, at most half of one
    x = luma(x)                                            if grey
    x = Gaussian of sigma, kernel_size x kernel_size, reflected at borders            if sigma > 0
    x = 1 - x where x >= 1/2                               if solarize
    out[r] = (x - mean) / std

with luma = 0.2989 R + 0.587 G + 0.114 B and clip to [0, 1]: torchvision's definitions.

The resize is Pillow's, to the bit: horizontal first, a cubic (a = -1/2) or triangular filter made
wider by the factor of reduction, weights of 22 binary digits normalised over the pixels of the box
(those outside do not enter), both passes rounded to 8 bits. From there on numbers are float32, and
none is rounded before the result.

`params` [R, 13] float32 has the columns `COLUMNS`: flip, jitter, grey and solarize are 0 or 1;
first .. fourth are the order, a permutation of 0 .. 3, where 0 is brightness, 1 contrast, 2
saturation and 3 hue; sigma is in pixels, 0 for no blur. A row of the result depends on the same row
of the arguments only.

Bytes: reads every box (3 bytes a pixel) and writes the result. On the CPU one thread works on one
view at a time, in scratch that its cache holds: with h x w the largest box, 192 w bytes and 3 h W
for the resize, 12 H W for the colours, 4 (H + kernel_size) W for the blur. Not differentiable.
"""

from fastssl.kernels.augment_views.op import augment_views
from fastssl.kernels.augment_views.reference import COLUMNS

__all__ = ["COLUMNS", "augment_views"]
