"""The last layer of a DINO head and its loss in one (Caron et al. 2021, arXiv 2104.14294).

With features of D (student) and E (teacher) dimensions and K prototypes in each layer::

    student = student_features @ student_prototypes.T        # [S, B, K], never in memory
    teacher = teacher_features @ teacher_prototypes.T        # [T, B, K], never in memory
    loss = dino_cross_entropy(student, teacher, ...)

and with normalize_prototypes each logit divided by the length of its prototype, times a learned
length l where there is one, which multiplies the product: with g the product of the features with
the gradient of what is multiplied, dprototype = g - (g . w) w / |w|^2 and dl = (g . w) / l.

The prototypes pass in blocks: one matrix product into a buffer that stays in the cache, then the
kernels of dino_cross_entropy on it; backward computes the products again. FLOPs: 2(SD + TE)BK
forward, 2(3SD + TE)BK backward, against 2(SD + TE)BK and 4SDBK for stored logits. Bytes: the
prototypes of both layers once forward and once backward, and the gradient of the student's, written
once.

Saved for backward: features, prototypes, 8(S + T)B bytes and with normalize_prototypes 8K. Peak
extra memory: a block of logits, (S + T)B times 1,024 or 2,048 prototypes on a CPU
(`blocks.CPU_BLOCKS`), float32 sums of the features' gradient, and copies of the features, and of a
block of prototypes, where the products run in another dtype. Nothing grows with B x K.
"""

from fastssl.kernels.linear_dino_cross_entropy.op import linear_dino_cross_entropy

__all__ = ["linear_dino_cross_entropy"]
