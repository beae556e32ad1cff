"""add_layer_norm in Triton. Rows of D values; b is the sample of a row."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, cdiv, device_properties, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Tile of a program: whole rows, as many as make `values` of them; one warp to each
    `values_per_warp`. `programs_per_processor` bounds the partial sums of backward."""

    values: int
    values_per_warp: int
    programs_per_processor: int = 4

    def tile(self, dim: int) -> tuple[int, int, int]:
        """BLOCK_R, BLOCK_D and num_warps."""
        block_d = next_power_of_2(dim)
        block_r = max(1, self.values // block_d)
        return block_r, block_d, max(1, min(32, block_r * block_d // self.values_per_warp))


FORWARD = Config(values=2048, values_per_warp=512)
# Three tiles of sums stay in registers beside the inputs.
BACKWARD = Config(values=1024, values_per_warp=256)


@dataclass(frozen=True)
class ReduceConfig:
    """Partial sums by columns that one program holds at a time."""

    BLOCK_P: int = 32
    BLOCK_D: int = 64
    num_warps: int = 4


REDUCE = ReduceConfig()


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr,  # [rows, D]
    branch_ptr,  # [rows, D], unused unless HAS_BRANCH
    weight_ptr,  # [D] float32
    bias_ptr,  # [D] float32
    gamma_ptr,  # [D] float32, unused unless HAS_GAMMA
    scale_ptr,  # [B] float32, unused unless HAS_SCALE
    residual_ptr,  # [rows, D], unused unless HAS_BRANCH
    normed_ptr,  # [rows, D]
    stats_ptr,  # [rows, 2] float32: mean, 1 / std
    num_rows,
    rows_per_sample,
    eps,
    D: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    tile = (row < num_rows)[:, None] & inside[None, :]
    at = row[:, None] * D + d[None, :]
    x = tl.load(x_ptr + at, mask=tile, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + at, mask=tile, other=0.0).to(tl.float32)
        if HAS_GAMMA:
            branch *= tl.load(gamma_ptr + d, mask=inside, other=0.0)[None, :]
        if HAS_SCALE:
            factor = tl.load(scale_ptr + row // rows_per_sample, mask=row < num_rows, other=0.0)
            branch *= factor[:, None]
        # The statistics are those of the values that are stored and that backward reads.
        residual = (x + branch).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, residual, mask=tile)
        x = residual.to(tl.float32)
    mean = tl.sum(x, axis=1) / D
    # What the rounded mean leaves over corrects it and the variance (corrected two-pass).
    centered = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rest = tl.sum(centered, axis=1)
    var = (tl.sum(centered * centered, axis=1) - rest * rest / D) / D
    mean += rest / D
    rstd = 1.0 / tl.sqrt(tl.maximum(var, 0.0) + eps)
    tl.store(stats_ptr + 2 * row, mean, mask=row < num_rows)
    tl.store(stats_ptr + 2 * row + 1, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0)[None, :]
    bias = tl.load(bias_ptr + d, mask=inside, other=0.0)[None, :]
    normed = (x - mean[:, None]) * rstd[:, None] * weight + bias
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=tile)


@triton.jit
def _add_layer_norm_bwd_kernel(
    dresidual_ptr,  # [rows, D], unused unless HAS_DRESIDUAL
    dnormed_ptr,  # [rows, D]
    residual_ptr,  # [rows, D]
    stats_ptr,  # [rows, 2] float32: mean, 1 / std
    weight_ptr,  # [D] float32
    branch_ptr,  # [rows, D], unused unless WANTS_DGAMMA
    gamma_ptr,  # [D] float32, unused unless HAS_GAMMA
    scale_ptr,  # [B] float32, unused unless HAS_SCALE
    dx_ptr,  # [rows, D]
    dbranch_ptr,  # [rows, D], unused unless WANTS_DBRANCH
    partial_ptr,  # [programs, 3, D] float32: sums for dweight, dbias, dgamma
    num_rows,
    rows_per_sample,
    rows_per_program,  # a multiple of BLOCK_R
    D: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANTS_DBRANCH: tl.constexpr,
    WANTS_AFFINE: tl.constexpr,
    WANTS_DGAMMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns a span of rows, so every sum has one fixed order and nothing is atomic.
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0)[None, :]
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dgamma = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, rows_per_program, BLOCK_R):
        row = program * rows_per_program + start + tl.arange(0, BLOCK_R)
        valid = row < num_rows
        tile = valid[:, None] & inside[None, :]
        at = row[:, None] * D + d[None, :]
        dnormed = tl.load(dnormed_ptr + at, mask=tile, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + at, mask=tile, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + 2 * row, mask=valid, other=0.0)
        rstd = tl.load(stats_ptr + 2 * row + 1, mask=valid, other=0.0)[:, None]
        xhat = (residual - mean[:, None]) * rstd
        g = dnormed * weight
        if WANTS_AFFINE:
            dweight += dnormed * xhat
            dbias += dnormed
        # g is 0 in the lanes past D.
        along = (tl.sum(g * xhat, axis=1) / D)[:, None]
        dx = (g - (tl.sum(g, axis=1) / D)[:, None] - xhat * along) * rstd
        if HAS_DRESIDUAL:
            dx += tl.load(dresidual_ptr + at, mask=tile, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=tile)
        if WANTS_DBRANCH or WANTS_DGAMMA:
            if HAS_SCALE:
                dx *= tl.load(scale_ptr + row // rows_per_sample, mask=valid, other=0.0)[:, None]
            if WANTS_DGAMMA:
                dgamma += dx * tl.load(branch_ptr + at, mask=tile, other=0.0).to(tl.float32)
            if HAS_GAMMA:
                dx *= tl.load(gamma_ptr + d, mask=inside, other=0.0)[None, :]
            if WANTS_DBRANCH:
                tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=tile)
    sums = partial_ptr + program * 3 * D + d
    if WANTS_AFFINE:
        tl.store(sums, tl.sum(dweight, axis=0), mask=inside)
        tl.store(sums + D, tl.sum(dbias, axis=0), mask=inside)
    if WANTS_DGAMMA:
        tl.store(sums + 2 * D, tl.sum(dgamma, axis=0), mask=inside)


@triton.jit
def _add_layer_norm_reduce_kernel(
    partial_ptr,  # [programs, 3, D] float32
    dweight_ptr,  # [D] float32, unused unless WANTS_AFFINE
    dbias_ptr,  # [D] float32, unused unless WANTS_AFFINE
    dgamma_ptr,  # [D] float32, unused unless WANTS_DGAMMA
    num_programs,
    D,
    WANTS_AFFINE: tl.constexpr,
    WANTS_DGAMMA: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    which = tl.program_id(1) + (0 if WANTS_AFFINE else 2)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, num_programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = (p[:, None].to(tl.int64) * 3 + which) * D + d[None, :]
        tile = (p < num_programs)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + at, mask=tile, other=0.0)
    out = tl.sum(total, axis=0)
    if which == 2:
        if WANTS_DGAMMA:
            tl.store(dgamma_ptr + d, out, mask=inside)
    elif WANTS_AFFINE:
        tl.store((dweight_ptr if which == 0 else dbias_ptr) + d, out, mask=inside)


def _rows_per_sample(num_rows: int, scale: Tensor | None) -> int:
    return num_rows if scale is None else max(1, num_rows // max(1, scale.shape[0]))


def add_layer_norm_fwd(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    scale: Tensor | None,
    eps: float,
    residual: Tensor | None,
    normed: Tensor,
    stats: Tensor,
) -> None:
    """Fill residual, where there is a branch, normed and stats."""
    dim = x.shape[-1]
    num_rows = x.numel() // dim
    if num_rows == 0:
        return
    block_r, block_d, num_warps = FORWARD.tile(dim)
    _add_layer_norm_fwd_kernel[(cdiv(num_rows, block_r),)](
        x,
        x if branch is None else branch,
        weight,
        bias,
        weight if gamma is None else gamma,
        weight if scale is None else scale,
        normed if residual is None else residual,
        normed,
        stats,
        num_rows,
        _rows_per_sample(num_rows, scale),
        eps,
        D=dim,
        HAS_BRANCH=branch is not None,
        HAS_GAMMA=gamma is not None,
        HAS_SCALE=scale is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )


def add_layer_norm_bwd(
    dresidual: Tensor | None,
    dnormed: Tensor,
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    dx: Tensor,
    dbranch: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dgamma: Tensor | None,
) -> None:
    """Fill dx and whatever else is a tensor; dweight and dbias go together."""
    dim = residual.shape[-1]
    num_rows = residual.numel() // dim
    block_r, block_d, num_warps = BACKWARD.tile(dim)
    most = BACKWARD.programs_per_processor * device_properties(dx.device).num_processors
    tiles_per_program = cdiv(cdiv(num_rows, block_r), most)
    rows_per_program = max(1, tiles_per_program) * block_r
    programs = cdiv(num_rows, rows_per_program)
    partial = dx.new_empty((programs, 3, dim), dtype=torch.float32)
    wants = {"WANTS_AFFINE": dweight is not None, "WANTS_DGAMMA": dgamma is not None}
    if programs > 0:
        _add_layer_norm_bwd_kernel[(programs,)](
            dnormed if dresidual is None else dresidual,
            dnormed,
            residual,
            stats,
            weight,
            residual if branch is None else branch,
            weight if gamma is None else gamma,
            weight if scale is None else scale,
            dx,
            dx if dbranch is None else dbranch,
            partial,
            num_rows,
            _rows_per_sample(num_rows, scale),
            rows_per_program,
            D=dim,
            HAS_DRESIDUAL=dresidual is not None,
            HAS_GAMMA=gamma is not None,
            HAS_SCALE=scale is not None,
            WANTS_DBRANCH=dbranch is not None,
            **wants,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    num_sums = 2 * (dweight is not None) + (dgamma is not None)
    if num_sums > 0:
        _add_layer_norm_reduce_kernel[(cdiv(dim, REDUCE.BLOCK_D), num_sums)](
            partial,
            partial if dweight is None else dweight,
            partial if dbias is None else dbias,
            partial if dgamma is None else dgamma,
            programs,
            dim,
            **wants,
            BLOCK_P=REDUCE.BLOCK_P,
            BLOCK_D=REDUCE.BLOCK_D,
            num_warps=REDUCE.num_warps,
        )


# Widths of Hiera-T, ViT-B and ViT-g blocks, and the widest whose backward stays in registers.
_AOT_DIMS = (96, 768, 1408, 4096)


def aot_cases() -> list[AotCase]:
    """A float32 residual stream with bf16 branches, LayerScale and stochastic depth."""
    sizes = {"num_rows": "i32", "rows_per_sample": "i32"}
    vectors = {"gamma_ptr": "*fp32", "scale_ptr": "*fp32"}
    forward = {"x_ptr": "*fp32", "branch_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32"}
    forward |= vectors | {"residual_ptr": "*fp32", "normed_ptr": "*bf16", "stats_ptr": "*fp32"}
    forward |= sizes | {"eps": "fp32"}
    backward = {"dresidual_ptr": "*fp32", "dnormed_ptr": "*bf16", "residual_ptr": "*fp32"}
    backward |= {"stats_ptr": "*fp32", "weight_ptr": "*fp32", "branch_ptr": "*bf16"} | vectors
    backward |= {"dx_ptr": "*fp32", "dbranch_ptr": "*bf16", "partial_ptr": "*fp32"}
    backward |= sizes | {"rows_per_program": "i32"}
    names = ("HAS_DRESIDUAL", "HAS_GAMMA", "HAS_SCALE", "WANTS_DBRANCH")
    wants = {"WANTS_AFFINE": True, "WANTS_DGAMMA": True}
    flags = {
        _add_layer_norm_fwd_kernel: dict.fromkeys(("HAS_BRANCH", "HAS_GAMMA", "HAS_SCALE"), True),
        _add_layer_norm_bwd_kernel: dict.fromkeys(names, True) | wants,
    }
    cases = []
    for dim in _AOT_DIMS:
        for kernel, signature, config in (
            (_add_layer_norm_fwd_kernel, forward, FORWARD),
            (_add_layer_norm_bwd_kernel, backward, BACKWARD),
        ):
            block_r, block_d, num_warps = config.tile(dim)
            tile = {"D": dim, "BLOCK_R": block_r, "BLOCK_D": block_d}
            case = (kernel, signature, flags[kernel] | tile, num_warps)
            cases.append(AotCase(*case, variant=str(dim)))
    sums = ("partial_ptr", "dweight_ptr", "dbias_ptr", "dgamma_ptr")
    signature = dict.fromkeys(sums, "*fp32") | {"num_programs": "i32", "D": "i32"}
    tile = {"BLOCK_P": REDUCE.BLOCK_P, "BLOCK_D": REDUCE.BLOCK_D}
    reduce = (_add_layer_norm_reduce_kernel, signature, wants | tile, REDUCE.num_warps)
    return [*cases, AotCase(*reduce)]
