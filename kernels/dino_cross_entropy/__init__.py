"""Cross-entropy between teacher and student views (DINO: Caron et al. 2021, arXiv 2104.14294; iBOT:
Zhou et al. 2021, arXiv 2111.07832; with Sinkhorn's vectors SwAV: Caron et al. 2020, arXiv
2006.09882).

With S student views, T teacher views, B images and K prototypes::

    p[t, b] = softmax((teacher[t, b] - center) / teacher_temp)
              or exp(teacher[t, b] / teacher_temp + log_u + log_v[t, b])
    q[s, b] = softmax(student[s, b] / student_temp)
    pair[t, s, b] = -sum_k p[t, b, k] log q[s, b, k]
    loss = sum over pairs (t != s with skip_same_view) and b of row_weights[b] * pair[t, s, b]
    loss = loss / (number of pairs * sum of row_weights)                       # reduction="mean"
    dstudent[s, b] = row_weights[b] / student_temp * sum_t (mass[t, b] q[s, b] - p[t, b])

where mass is the sum of p, 1 but for a log_v that makes it otherwise. Statistics are float32
(float64 where sums are small) whatever the logits. No probability is ever written: the forward pass
takes each chunk of prototypes once for all views of an image and keeps, per chunk, maxima, sums of
exponentials and their products with the student's scores less their maximum, so that nothing
cancels however large the logits; backward makes the probabilities again from two numbers per row.

Bytes, with e per logit: forward reads (S + T)BKe, backward reads as much and writes SBKe. The
gradient made in forward would save a second reading of what the last-level cache often still holds;
on a CPU that was measured to gain nothing, and it would hold the gradient from forward to backward.
Saved for backward: the logits, and 8(S + T)B bytes. Peak extra memory: 4B(2S + 3T + ST) bytes per
chunk of 1,024 prototypes, and with return_teacher_mean one row [K] float32 for each slice of the
batch (up to 64 chunks' worth of rows on a CPU, `triton_view_cross_entropy.num_slices` on a GPU).

backend="cuda" on sm_90 and later makes the gradient with the forward pass in eager mode, from the
shared memory of a cluster, and reads each logit once: see cuda_kernel.py. It then holds the
gradient, SBKe bytes, beside the logits from forward to backward.
"""

from fastssl.kernels.dino_cross_entropy.op import dino_cross_entropy

__all__ = ["dino_cross_entropy"]
