"""What the plans of CUDA C++ kernels need to know about a GPU."""

import functools
from dataclasses import dataclass

import torch

CLUSTER_SIZES = (1, 2, 4, 8, 16)
# Blocks that run on one processor at the most.
BLOCKS_PER_PROCESSOR = 2
# What the driver keeps of each block's shared memory.
RESERVED_BYTES = 1 << 10


@dataclass(frozen=True)
class Device:
    processors: int
    clusters: bool
    bytes_per_processor: int
    bytes_per_block: int

    @property
    def bytes_for_two(self) -> int:
        """Shared memory of a block of which BLOCKS_PER_PROCESSOR run on a processor."""
        half = self.bytes_per_processor // BLOCKS_PER_PROCESSOR - RESERVED_BYTES
        return min(half, self.bytes_per_block)


@functools.cache
def device_facts(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    return Device(
        facts.multi_processor_count,
        # Those of sm_120 are smaller than what the plans count on.
        facts.major in (9, 10),
        facts.shared_memory_per_multiprocessor,
        facts.shared_memory_per_block_optin,
    )
