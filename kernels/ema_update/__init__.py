"""Exponential moving average of one list of tensors over another, in place, in one pass.

A teacher follows its student (MoCo, arXiv 1911.05722; DINO, arXiv 2104.14294)::

    target <- momentum * target + (1 - momentum) * source

computed as torch.lerp does, `target + (1 - momentum) * (source - target)`, or from the source's
side where 1 - momentum >= 1/2: equal tensors stay bit for bit what they are, momentum = 0 copies
and momentum = 1 keeps. Arithmetic is float32 (float64 where both tensors are) and rounds once. A
bfloat16 target stands still where a step is below half a unit in its last place: at a momentum of
0.996 wherever the source differs by less than about half of it. Teachers want float32.

Bytes, with t per element of a target and s of a source: 2t + s, against 5 t for a multiplication
and an addition in place. Nothing is saved, no gradient flows, and there is no extra memory beyond
a table of 24 bytes per 16,384 elements on a GPU.

Why it is not fused with AdamW: that step moves 7 tensors' bytes per parameter (parameter, gradient
and two moments read, three of them written), this one 3, and both in one pass 9. A tenth of the
optimizer's traffic, which is itself about a hundredth of a training step, is saved at the price of
an AdamW of our own in place of torch's fused one.
"""

from fastssl.kernels.ema_update.op import ema_update

__all__ = ["ema_update"]
