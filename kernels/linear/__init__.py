"""A linear layer in mixed precision, with gradients in the dtypes of what they belong to.

With M rows, K inputs and N outputs, and the casts to and from the product's dtype included::

    y = x weight^T + bias
    dx = dy weight, dweight = dy^T x, dbias = sum of the rows of dy

In float32 and float64 without autocast this is F.linear, on every backend. Otherwise on cpp, in
bfloat16 on a processor with AVX-512 BF16 and without AMX: the products are the library's own
(csrc/cpu/linear_bf16.h), those with the weight where N and K are even. They round a float32 weight
while they pack it, so that no cast of it is stored, sum dbias while they pack dy, and write dweight
from its float32 sums, never rounded. What is packed next is fetched while products are summed.
Elsewhere on cpp they are torch's: the bias is added inside the product; dweight comes from a
product whose smaller operand is transposed beforehand, which takes half the time of one that reads
it transposed, and is turned back by the cast to the weight's dtype. Large results are written into
huge pages. On triton the products are torch's, that of dweight with a float32 result; a kernel sums
dbias.

FLOPs: 2 MNK forward, 4 MNK backward. Saved for backward: x in the product's dtype, and weight
likewise or, with the library's own products, as it is. Peak extra memory: on cpp backward holds x
and dy once more (own products; instead 10 MB at most for a narrow weight and 1,024 rows or more),
or dweight, the smaller of x and dy and, where x has another dtype, dx in the product's dtype; on
both, dbias takes partial sums, N floats per 32 rows on cpp. Of what own products take, a thread
keeps 64 MB at most for its next ones.
"""

from fastssl.kernels.linear.op import linear

__all__ = ["linear"]
