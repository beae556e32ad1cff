"""The passes of sinkhorn_knopp in CUDA C++: plans and calls of csrc/cuda/sinkhorn_knopp.cu.

B samples, K prototypes. An iteration reads the logits once where the blocks of a cluster hold whole
rows: up to 262,144 prototypes on sm_90 and sm_100, and 8,192, which is one block, where there are
no clusters. Longer rows, and rows that are no multiple of 16 bytes, are read twice.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.kernels.common import libraries
from fastssl.kernels.common.cuda_device import (
    BLOCKS_PER_PROCESSOR,
    CLUSTER_SIZES,
    Device,
    device_facts,
)

# Threads of a block and columns of each thread, from the most wanted on: the fewer columns, the
# more rows a cluster exchanges at once.
SIZES = ((256, 8), (256, 16), (256, 32), (512, 32))
# Logits that a thread holds: of its columns, as many rows as these make.
HELD = 32
# More columns than these, and a thread's sums of them are in shared memory.
MAX_REGISTER_COLUMNS = 16
# The column passes: threads of a block, blocks for each processor, rows of a slice at the least,
# so that a slice's sums are a small part of its logits.
THREADS = 256
BLOCKS = 4
MIN_ROWS = 32


@dataclass(frozen=True)
class Plan:
    """A cluster of `cluster` blocks of `width` prototypes each."""

    cluster: int
    width: int
    threads: int
    columns: int

    def arguments(self) -> tuple[int, int, int, int]:
        return self.cluster, self.width, self.threads, self.columns


def shared_bytes(threads: int, columns: int, cluster: int) -> int:
    """Shared memory of a block: RowMemory in sinkhorn_knopp.cuh."""
    vectors = 3 if columns > MAX_REGISTER_COLUMNS else 2
    rows = HELD // columns
    return 4 * (vectors * columns * threads + rows * (threads // 32 + 2 * cluster))


def cluster_plan(num_prototypes: int, itemsize: int, device: Device) -> Plan | None:
    """The blocks that hold whole rows, None where none do."""
    if num_prototypes * itemsize % 16 != 0:
        return None
    for threads, columns in SIZES:
        for cluster in CLUSTER_SIZES if device.clusters else (1,):
            width = -(-num_prototypes // (8 * cluster)) * 8
            size = shared_bytes(threads, columns, cluster)
            if width <= threads * columns and size <= device.bytes_per_block:
                return Plan(cluster, width, threads, columns)
    return None


def row_slices(batch: int, plan: Plan, device: Device) -> int:
    """Clusters that run at once, each with rows of its own."""
    size = shared_bytes(plan.threads, plan.columns, plan.cluster)
    two = plan.threads <= THREADS and size <= device.bytes_for_two
    running = device.processors * (BLOCKS_PER_PROCESSOR if two else 1) // plan.cluster
    groups = -(-batch // (HELD // plan.columns))
    return max(1, min(groups, running))


def column_slices(logits: Tensor, device: Device) -> int:
    batch, num_prototypes = logits.shape
    vector = 1 if num_prototypes * logits.itemsize % 16 else 16 // logits.itemsize
    blocks = -(-num_prototypes // (THREADS * vector))
    return max(1, min(-(-BLOCKS * device.processors // blocks), batch // MIN_ROWS))


def _plan_for(logits: Tensor) -> Plan | None:
    if logits.data_ptr() % 16 != 0:
        return None
    return cluster_plan(logits.shape[1], logits.itemsize, device_facts(logits.device))


def columns(
    logits: Tensor, num_rows: Tensor | None, factor: float, anchor: Tensor, sums: Tensor
) -> None:
    """Fill anchor [K], the largest logits, and sums [K] of 2^((logit - anchor) * factor)."""
    reason = libraries.why_no_cuda_library()
    if reason is not None:
        raise RuntimeError(f"sinkhorn_knopp: {reason}")
    slices = column_slices(logits, device_facts(logits.device))
    parts = anchor.new_empty((2, slices, logits.shape[1]))
    torch.ops.fastssl_cuda.sinkhorn_knopp_columns(logits, num_rows, factor, parts, anchor, sums)


def move(old: Tensor, new: Tensor, factor: float, sums: Tensor) -> None:
    """Move sums from one anchor to a larger one."""
    sums.mul_(((old - new) * factor).exp2())


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
    device, plan = device_facts(logits.device), _plan_for(logits)
    if plan is None:
        slices, numbers = column_slices(logits, device), (0,) * 4
        stats = anchor.new_empty((2, batch))
    else:
        slices, numbers = row_slices(batch, plan, device), plan.arguments()
        stats = None
    parts = anchor.new_empty((slices, num_prototypes))
    torch.ops.fastssl_cuda.sinkhorn_knopp_iterate(
        logits, num_rows, factor, anchor, offset, log2_mass, stats, parts, *numbers, sums
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
    # Without a matrix to write, a block for each row reads it once, and there is no exchange.
    plan = None if assignment is None else _plan_for(logits)
    numbers, slices = (0,) * 4, 0
    if plan is not None:
        slices = row_slices(logits.shape[0], plan, device_facts(logits.device))
        numbers = plan.arguments()
    torch.ops.fastssl_cuda.sinkhorn_knopp_assign(
        *(logits, num_rows, factor, anchor, offset, sums, *numbers, slices, log_v, assignment)
    )
    log_u.copy_((offset.double() - anchor.double() * factor) * math.log(2))
