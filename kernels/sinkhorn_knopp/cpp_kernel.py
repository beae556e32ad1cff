"""The passes of sinkhorn_knopp in C++: scratch memory and calls of csrc/cpu/sinkhorn_knopp.cpp."""

import torch
from torch import Tensor

# Rows whose column sums are kept apart: enough pieces for the processors of a large machine, few
# enough that they take a sixteenth of the logits at most. Never a function of the number of
# threads.
MAX_CHUNKS = 64
ROWS_PER_CHUNK = 16
# Prototypes per tile of the first pass.
BLOCK = 512
# Exponentials that a thread keeps between the two halves of an iteration: half a MB, in its own
# cache.
KEPT = 1 << 17
MAX_KEPT_ROWS = 4


def num_chunks(batch: int) -> int:
    return max(1, min(MAX_CHUNKS, batch // ROWS_PER_CHUNK))


def columns(
    logits: Tensor, num_rows: Tensor | None, factor: float, anchor: Tensor, sums: Tensor
) -> None:
    """Fill anchor [K], the largest logits, and sums [K] of 2^((logit - anchor) * factor)."""
    batch, num_prototypes = logits.shape
    blocks = -(-num_prototypes // BLOCK)
    slices = max(1, min(num_chunks(batch) // 2, MAX_CHUNKS // blocks))
    parts = anchor.new_empty((2, slices, num_prototypes))
    torch.ops.fastssl_csrc.sinkhorn_knopp_columns(logits, num_rows, factor, parts, anchor, sums)


def move(old: Tensor, new: Tensor, factor: float, sums: Tensor) -> None:
    """Move sums from one anchor to a larger one."""
    torch.ops.fastssl_csrc.sinkhorn_knopp_move(old, new, factor, sums)


def iterate(
    logits: Tensor,
    num_rows: Tensor | None,
    factor: float,
    anchor: Tensor,
    offset: Tensor,
    log2_mass: Tensor,
    sums: Tensor,
) -> None:
    """Divide prototypes by sums, then samples by theirs; sums [K] become the new column sums."""
    batch, num_prototypes = logits.shape
    chunks = num_chunks(batch)
    tasks = min(chunks, torch.get_num_threads())
    rows = max(1, min(MAX_KEPT_ROWS, KEPT // num_prototypes))
    scratch = anchor.new_empty((tasks, rows, num_prototypes))
    parts = anchor.new_empty((chunks, num_prototypes))
    torch.ops.fastssl_csrc.sinkhorn_knopp_iterate(
        logits, num_rows, factor, anchor, offset, log2_mass, scratch, parts, sums
    )


def assign(
    logits: Tensor,
    num_rows: Tensor | None,
    factor: float,
    anchor: Tensor,
    offset: Tensor,
    sums: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    assignment: Tensor | None,
) -> None:
    """Divide both a last time; log_v comes in as log2_mass."""
    torch.ops.fastssl_csrc.sinkhorn_knopp_assign(
        logits, num_rows, factor, anchor, offset, sums, log_u, log_v, assignment
    )
