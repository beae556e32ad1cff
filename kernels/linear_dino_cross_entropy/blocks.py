"""linear_dino_cross_entropy block by block of prototypes: a matrix product into a small buffer of
logits, then the kernels of common/view_cross_entropy.py on that buffer.

S student views, T teacher views, B images, K prototypes, n of them in a block, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastssl.kernels.common import view_cross_entropy as views
from fastssl.kernels.linear_dino_cross_entropy.reference import SMALLEST_NORM

# Prototypes per block by rows of logits (up to the limit): wide blocks save calls, narrow ones keep
# the buffer in the second-level cache of a CPU or of a GPU.
CPU_BLOCKS = ((512, 2048), (None, 1024))
GPU_BLOCKS = ((1024, 16384), (4096, 8192), (None, 4096))
# The namespaces of the ops of compiled backends.
COMPILED = {"cpp": "fastssl_csrc", "cuda": "fastssl_cuda"}

# Of student and teacher, [K] each: the inverse of the prototypes' lengths, and learned lengths.
Scales = Sequence[Tensor] | None
Lengths = Sequence[Tensor] | None
# A learned length of 0 would end its prototype's gradients, and be divided by.
SMALLEST_LENGTH = 1e-20


@dataclass(frozen=True)
class Block:
    """Logits of some prototypes, in buffers that the next block uses again."""

    prototypes: slice
    student_logits: Tensor  # [S, B, n]
    teacher_logits: Tensor  # [T, B, n]
    student_features: Tensor  # [S * B, D], in the dtype of the products
    student_prototypes: Tensor  # [n, D], in the dtype of the products
    student_inverse: Tensor | None  # [n], of the prototypes' lengths
    student_lengths: Tensor | None  # [n], learned, none of them 0
    terms: views.Terms  # of these prototypes


def block_size(rows: int, num_prototypes: int, device: torch.device) -> int:
    table = GPU_BLOCKS if device.type == "cuda" else CPU_BLOCKS
    size = next(size for limit, size in table if limit is None or rows <= limit)
    return min(size, num_prototypes)


class Side:
    """Student or teacher: features ready for the products, and buffers for a block of logits and,
    where the products run in another dtype, of prototypes."""

    def __init__(
        self,
        features: Tensor,  # [V, B, D]
        prototypes: Tensor,  # [K, D]
        num_rows: Tensor | None,  # []
        dtype: torch.dtype,
        size: int,  # prototypes per block
    ) -> None:
        self.num_views, self.batch, dim = features.shape
        features = features.to(dtype)
        if num_rows is not None:
            # Zero gradients of unused rows are about to be multiplied by what these rows hold.
            valid = torch.arange(self.batch, device=features.device) < num_rows
            features = torch.where(valid[:, None], features, 0.0)
        self.features = features.view(-1, dim)
        self.prototypes = prototypes
        self.logits = self.features.new_empty(self.features.shape[0] * size)
        self.cast = None
        if prototypes.dtype != dtype:
            self.cast = self.features.new_empty((size, dim))

    def block(self, here: slice) -> tuple[Tensor, Tensor]:  # prototypes [n, D], logits [V, B, n]
        prototypes = self.prototypes[here]
        rows, width = self.features.shape[0], prototypes.shape[0]
        if self.cast is not None:
            prototypes = self.cast[:width].copy_(prototypes)
        logits = self.logits[: rows * width].view(rows, width)
        torch.mm(self.features, prototypes.t(), out=logits)
        return prototypes, logits.view(self.num_views, self.batch, width)


def prototype_scale(backend: str, prototypes: Tensor, scale: Tensor) -> None:
    """Fill scale [n] with the prototypes' inverse lengths."""
    if backend in COMPILED:
        getattr(torch.ops, COMPILED[backend]).linear_dino_prototype_scale(prototypes, scale)
        return
    norm = torch.linalg.vector_norm(prototypes, dim=1, dtype=torch.float32)
    torch.reciprocal(norm.clamp_(min=SMALLEST_NORM), out=scale)


def take(value: Tensor | None, prototypes: slice) -> Tensor | None:
    return None if value is None else value[..., prototypes]


def take_lengths(lengths: Lengths, here: slice) -> list[Tensor | None]:
    """Those of these prototypes, float32 and kept from 0."""
    if lengths is None:
        return [None, None]
    values = (length[here].float() for length in lengths)
    return [torch.where(v.abs() < SMALLEST_LENGTH, SMALLEST_LENGTH, v) for v in values]


def scaled(inverse: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """By what products become logits."""
    return inverse if lengths is None else inverse * lengths


def each_block(
    backend: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    terms: views.Terms,
    dtype: torch.dtype,
    scales: Scales,
    lengths: Lengths,
    scales_are_known: bool,
) -> Iterator[Block]:
    student_features, student_prototypes, teacher_features, _ = tensors
    num_prototypes, batch = student_prototypes.shape[0], student_features.shape[1]
    rows = (student_features.shape[0] + teacher_features.shape[0]) * batch
    size = block_size(rows, num_prototypes, student_features.device)
    student = Side(*tensors[:2], terms.num_rows, dtype, size)
    teacher = Side(*tensors[2:], terms.num_rows, dtype, size)
    for start in range(0, num_prototypes, size):
        here = slice(start, min(num_prototypes, start + size))
        if scales is not None and not scales_are_known:
            for side, scale in zip((student, teacher), scales, strict=True):
                prototype_scale(backend, side.prototypes[here], scale[here])
        prototypes, student_logits = student.block(here)
        _, teacher_logits = teacher.block(here)
        inverses = [take(scale, here) for scale in scales or (None, None)]
        learned = take_lengths(lengths, here)
        yield Block(
            here,
            student_logits,
            teacher_logits,
            student.features,
            prototypes,
            inverses[0],
            learned[0],
            replace(
                terms,
                center=take(terms.center, here),
                log_u=take(terms.log_u, here),
                student_scale=scaled(inverses[0], learned[0]),
                teacher_scale=scaled(inverses[1], learned[1]),
            ),
        )


def forward(
    backend: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    terms: views.Terms,
    dtype: torch.dtype,
    scales: Scales,  # filled
    lengths: Lengths,
    results: views.Results,  # filled
    teacher_mean: Tensor | None,  # [K], filled
) -> None:
    num_student, batch = tensors[0].shape[:2]
    num_teacher = tensors[2].shape[0]
    parts = None
    first_chunk = 0
    sides = (scales, lengths)
    for block in each_block(backend, tensors, terms, dtype, *sides, scales_are_known=False):
        width = block.student_logits.shape[2]
        chunks = views.num_chunks(backend, block.student_logits, num_teacher)
        if parts is None:
            # One column for everything before this block, behind the first block.
            parts = views.empty_parts(tensors[0], num_teacher, chunks + 1)
        sums = None
        if teacher_mean is not None:
            slices = views.num_slices(backend, block.student_logits, chunks)
            sums = parts.new_empty((slices, width))
        views.fill_parts(
            backend,
            block.student_logits,
            block.teacher_logits,
            block.terms,
            first_chunk,
            parts,
            sums,
        )
        columns = first_chunk + chunks
        views.collapse(backend, num_student, num_teacher, terms.num_rows, columns, parts)
        first_chunk = 1
        if teacher_mean is not None:
            mean = views.teacher_mean(sums, num_teacher, batch, terms.num_rows)
            teacher_mean[block.prototypes] = mean
    views.combine(backend, parts[..., :1].contiguous(), terms, results)


def backward(
    backend: str,
    dloss: Tensor,  # []
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    terms: views.Terms,
    dtype: torch.dtype,
    scales: Scales,
    lengths: Lengths,
    stats: tuple[Tensor, Tensor, Tensor],
    dfeatures: Tensor | None,  # [S, B, D], filled
    dprototypes: Tensor | None,  # [K, D], filled; without it no dlengths
    dlengths: Tensor | None,  # [K], filled
) -> None:
    sums = None
    if dfeatures is not None:
        shape = (dfeatures.shape[0] * dfeatures.shape[1], dfeatures.shape[2])
        sums = dfeatures.new_zeros(shape, dtype=torch.float32)
    product = None
    if dprototypes is not None and backend == "cpp":
        torch.ops.fastssl_csrc.linear_dino_prepare_gradient(dprototypes)
    for block in each_block(backend, tensors, terms, dtype, scales, lengths, scales_are_known=True):
        logits = block.student_logits
        views.gradient(backend, dloss, logits, block.teacher_logits, block.terms, *stats, logits)
        dlogits = logits.view(-1, logits.shape[2])
        if sums is not None:
            add_product(sums, dlogits, block.student_prototypes)
        if dprototypes is not None:
            if product is None and dprototypes.dtype != dtype:
                product = torch.empty_like(block.student_prototypes)
            here = block.prototypes
            prototypes, of_lengths = tensors[1][here], take(dlengths, here)
            prototype_gradient(
                backend, dlogits, block, prototypes, product, dprototypes[here], of_lengths
            )
    if sums is not None:
        dfeatures.copy_(sums.view(dfeatures.shape))


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a @ b, in float32 over the blocks."""
    if a.dtype == torch.float32:
        sums.addmm_(a, b)
    else:
        sums += torch.mm(a, b)


def prototype_gradient(
    backend: str,
    dlogits: Tensor,  # [S * B, n]
    block: Block,
    prototypes: Tensor,  # [n, D]
    product: Tensor | None,  # [n or more, D], a buffer where dprototypes has another dtype
    dprototypes: Tensor,  # [n, D], filled
    dlengths: Tensor | None,  # [n], filled
) -> None:
    direct = product is None
    product = dprototypes if direct else product[: prototypes.shape[0]]
    torch.mm(dlogits.t(), block.student_features, out=product)
    inverse = block.student_inverse
    if inverse is None and direct:
        return
    if backend == "cpp":
        torch.ops.fastssl_csrc.linear_dino_prototype_gradient(
            *(product, prototypes, inverse, block.student_lengths, dprototypes, dlengths)
        )
        return
    if backend == "cuda" and dlengths is None:
        torch.ops.fastssl_cuda.linear_dino_prototype_gradient(
            product, prototypes, inverse, dprototypes
        )
        return
    if inverse is not None:
        # Without the part along the prototype, which does not change a logit over its length.
        wide = prototypes.float()
        inner = torch.linalg.vecdot(product.float(), wide)
        along = inner * inverse.square()
        product = torch.addcmul(product.float(), wide, along[:, None], value=-1)
        if dlengths is not None:
            torch.div(inner, block.student_lengths, out=dlengths)
    dprototypes.copy_(product)
