"""How the Triton kernels of mask_unit_attention cut their work: tables, and what follows of them.

D channels of a head, units of U tokens and U / S queries, P units in a tile.
"""

import functools
from dataclasses import dataclass

from fastssl.kernels.common.triton_utils import cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Blocks of at most BLOCK_Q queries and BLOCK_K keys, for heads of up to `limit` channels."""

    limit: int
    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 1


# By bytes per element: what needs no stack on sm_80, sm_90 and sm_100, but for float32 heads of
# more than 128 channels.
FORWARD = {
    2: (Config(64, 64, 32, 4, 3), Config(128, 64, 64, 4, 2), Config(256, 32, 32, 8)),
    4: (Config(64, 32, 64, 4), Config(128, 16, 32, 4), Config(256, 16, 16, 8)),
}
# For tiles of up to BLOCK_K keys; the others go through the two kernels below.
BACKWARD_TILE = {
    2: (
        *(Config(64, 64, 64, 4), Config(128, 64, 64, 8)),
        *(Config(64, 32, 128, 8), Config(128, 16, 128, 8), Config(64, 16, 256, 8)),
    ),
    4: (),
}
BACKWARD_QUERIES = {
    2: (Config(128, 64, 64, 4, 2), Config(256, 16, 32, 8)),
    4: (Config(128, 16, 32, 8), Config(256, 16, 16, 8)),
}
BACKWARD_KEYS = {
    2: (Config(64, 64, 64, 4, 2), Config(128, 32, 64, 8), Config(256, 16, 32, 8)),
    4: (Config(64, 32, 32, 8), Config(128, 16, 16, 4), Config(256, 16, 16, 8)),
}
# Three TF32 products for a float32 one; the exact ones of "ieee" take all registers and more.
PRECISION = "tf32x3"
# Tokens of a tile of small units, by bytes per element.
TILE = {2: 64, 4: 32}
# tl.dot takes no smaller blocks. A second part of 16 channels would take more registers than 32.
SMALLEST_BLOCK, SMALLEST_PART = 16, 32


@dataclass(frozen=True)
class Plan:
    """The compile-time sizes of a kernel, and how to launch it."""

    sizes: dict[str, object]
    launch: dict[str, int]

    @property
    def units(self) -> int:
        return self.sizes["P"]

    @property
    def query_blocks(self) -> int:
        queries = self.units * self.sizes["U"] // self.sizes["S"]
        return cdiv(queries, self.sizes["BLOCK_Q"])

    @property
    def key_blocks(self) -> int:
        return cdiv(self.units * self.sizes["U"], self.sizes["BLOCK_K"])


def _parts(head_dim: int) -> tuple[int, int]:
    """The powers of two that hold a head's channels, the second 0 where it would spare nothing."""
    whole = max(SMALLEST_BLOCK, next_power_of_2(head_dim))
    rest = max(SMALLEST_PART, next_power_of_2(max(1, head_dim - whole // 2)))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


@functools.cache
def _plan(config: Config, tile: int, head_dim: int, unit_size: int, q_stride: int) -> Plan:
    parts, units = _parts(head_dim), max(1, tile // unit_size)
    queries = max(SMALLEST_BLOCK, next_power_of_2(units * unit_size // q_stride))
    keys = max(SMALLEST_BLOCK, next_power_of_2(units * unit_size))
    sizes = {"U": unit_size, "S": q_stride, "P": units}
    sizes |= {"D": head_dim, "D1": parts[0], "D2": parts[1], "PRECISION": PRECISION}
    sizes |= {"BLOCK_Q": min(queries, config.BLOCK_Q), "BLOCK_K": min(keys, config.BLOCK_K)}
    # A tile of few tokens leaves nothing to load ahead.
    num_stages = config.num_stages if unit_size > tile else 1
    return Plan(sizes, {"num_warps": config.num_warps, "num_stages": num_stages})


def forward_plan(element_size: int, *shape: int) -> Plan:
    channels = sum(_parts(shape[0]))
    config = next(c for c in FORWARD[element_size] if channels <= c.limit)
    return _plan(config, TILE[element_size], *shape)


def backward_plans(element_size: int, *shape: int) -> list[Plan]:
    """One kernel where a block can hold all keys of a tile, else one for queries, one for keys."""
    channels, tile = sum(_parts(shape[0])), TILE[element_size]
    for config in BACKWARD_TILE[element_size]:
        plan = _plan(config, tile, *shape)
        if channels <= config.limit and plan.key_blocks == 1:
            return [plan]
    tables = (BACKWARD_QUERIES[element_size], BACKWARD_KEYS[element_size])
    configs = [next(c for c in table if channels <= c.limit) for table in tables]
    return [_plan(config, tile, *shape) for config in configs]
