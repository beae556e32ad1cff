"""The Triton kernels of triton_view_cross_entropy.py.

S student views, T teacher views, B images, K prototypes, C chunks of prototypes; scores are logits
over temperature in units of log 2. The rows of `parts` [B, width, C] are described in
csrc/cpu/view_cross_entropy.h.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_teacher(
    teacher_ptr, scale_ptr, t, b, k, inside, B, K, HAS_SCALE: tl.constexpr
):  # [BLOCK_K] float32 logits
    x = tl.load(teacher_ptr + (t * B + b) * K + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        x *= tl.load(scale_ptr + k, mask=inside, other=0.0)
    return x


@triton.jit
def _teacher_scores(
    x,  # [BLOCK_K] float32 logits
    center_ptr,
    log_u_ptr,
    t,
    k,
    inside,
    factor,
    log_u_stride,
    HAS_CENTER: tl.constexpr,
    HAS_LOG_U: tl.constexpr,
):  # [BLOCK_K] float32, anything outside
    if HAS_CENTER:
        x -= tl.load(center_ptr + k, mask=inside, other=0.0)
    x *= factor
    if HAS_LOG_U:
        row = log_u_ptr + t * log_u_stride
        x += tl.load(row + k, mask=inside, other=0.0) * _LOG2E
    return x


@triton.jit
def _exponentials(x, inside):
    """max, 2^(x - max) and x - max of a row of scores; the last two are 0 outside."""
    top = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    below = tl.where(inside, x - top, 0.0)
    return top, tl.where(inside, tl.exp2(below), 0.0), below


@triton.jit
def _temperatures(temps_ptr, student_temp, teacher_temp, HAS_TEMPS: tl.constexpr):
    if HAS_TEMPS:
        student_temp = tl.load(temps_ptr)
        teacher_temp = tl.load(temps_ptr + 1)
    return student_temp, teacher_temp


@triton.jit
def _rows_in_use(num_rows_ptr, B, HAS_NUM_ROWS: tl.constexpr):
    rows = B
    if HAS_NUM_ROWS:
        rows = tl.minimum(tl.maximum(tl.load(num_rows_ptr), 0), B).to(tl.int32)
    return rows


@triton.jit
def _teacher_cell(
    teacher_ptr,
    center_ptr,
    log_u_ptr,
    scale_ptr,
    to,  # the view's first number in `parts`
    t,
    b,
    k,
    inside,
    B,
    K,
    C,
    log_u_stride,
    factor,
    HAS_CENTER: tl.constexpr,
    HAS_LOG_U: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # the view's logits and 2^(score - max), [BLOCK_K] each
    logits = _load_teacher(teacher_ptr, scale_ptr, t, b, k, inside, B, K, HAS_SCALE)
    scores = _teacher_scores(
        logits,
        center_ptr,
        log_u_ptr,
        t,
        k,
        inside,
        factor,
        log_u_stride,
        HAS_CENTER,
        HAS_LOG_U,
    )
    top, e, below = _exponentials(scores, inside)
    tl.store(to, top)
    tl.store(to + C, tl.sum(e, axis=0))
    tl.store(to + 2 * C, tl.sum(e * below, axis=0))
    return logits, e


@triton.jit
def view_cross_entropy_parts_kernel(
    student_ptr,  # [S, B, K]
    teacher_ptr,  # [T, B, K]
    temps_ptr,  # [2] float32, unused unless HAS_TEMPS
    center_ptr,  # [K] float32, unused unless HAS_CENTER
    log_u_ptr,  # [1 or T, K] float32, unused unless HAS_LOG_U
    student_scale_ptr,  # [K] float32, unused unless HAS_SCALE
    teacher_scale_ptr,  # [K] float32, unused unless HAS_SCALE
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    parts_ptr,  # [B, width, C] float32
    sums_ptr,  # [slices, K] float32, unused unless WANTS_SUMS
    S,
    T,
    B,
    K,
    C,
    chunks,
    first_chunk,
    images_per_slice,
    log_u_stride,
    student_temp,
    teacher_temp,
    BLOCK_K: tl.constexpr,
    HAS_TEMPS: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_LOG_U: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NUM_ROWS: tl.constexpr,
    WANTS_SUMS: tl.constexpr,
    ONE_TEACHER: tl.constexpr,
):
    part = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    rows = _rows_in_use(num_rows_ptr, B, HAS_NUM_ROWS)
    width = 2 * S + 3 * T + S * T
    student_temp, teacher_temp = _temperatures(temps_ptr, student_temp, teacher_temp, HAS_TEMPS)
    student_factor, teacher_factor = _LOG2E / student_temp, _LOG2E / teacher_temp
    sums = tl.zeros((BLOCK_K,), tl.float32)
    for b in range(part * images_per_slice, tl.minimum(rows, (part + 1) * images_per_slice)):
        cell = parts_ptr + b * width * C + first_chunk + chunk
        # Teacher views come in twos: with DINO's two, every logit is read once.
        for t in range(0, T, 2):
            logits, e0 = _teacher_cell(
                teacher_ptr,
                center_ptr,
                log_u_ptr,
                teacher_scale_ptr,
                cell + (2 * S + 3 * t) * C,
                t,
                b,
                k,
                inside,
                B,
                K,
                C,
                log_u_stride,
                teacher_factor,
                HAS_CENTER,
                HAS_LOG_U,
                HAS_SCALE,
            )
            if WANTS_SUMS:
                sums += logits
            if not ONE_TEACHER:
                # An odd number of views takes the last one twice, once without effect.
                other = tl.minimum(t + 1, T - 1)
                logits, e1 = _teacher_cell(
                    teacher_ptr,
                    center_ptr,
                    log_u_ptr,
                    teacher_scale_ptr,
                    cell + (2 * S + 3 * other) * C,
                    other,
                    b,
                    k,
                    inside,
                    B,
                    K,
                    C,
                    log_u_stride,
                    teacher_factor,
                    HAS_CENTER,
                    HAS_LOG_U,
                    HAS_SCALE,
                )
                if WANTS_SUMS:
                    sums += tl.where(t + 1 < T, logits, 0.0)
            pairs = cell + (2 * S + 3 * T + t) * C
            for s in range(S):
                y = tl.load(student_ptr + (s * B + b) * K + k, mask=inside, other=0.0)
                y = y.to(tl.float32)
                if HAS_SCALE:
                    y *= tl.load(student_scale_ptr + k, mask=inside, other=0.0)
                top, e, below = _exponentials(y * student_factor, inside)
                tl.store(cell + 2 * s * C, top)
                tl.store(cell + (2 * s + 1) * C, tl.sum(e, axis=0))
                tl.store(pairs + s * T * C, tl.sum(e0 * below, axis=0))
                if not ONE_TEACHER:
                    # The last of an odd number of views is second too, at its own place.
                    tl.store(pairs + (s * T + other - t) * C, tl.sum(e1 * below, axis=0))
    if WANTS_SUMS:
        tl.store(sums_ptr + part * K + k, sums, mask=inside)


@triton.jit
def view_cross_entropy_collapse_kernel(
    parts_ptr,  # [B, width, C] float32
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    S,
    T,
    B,
    C,
    columns,
    HAS_NUM_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if b >= _rows_in_use(num_rows_ptr, B, HAS_NUM_ROWS):
        return
    parts = parts_ptr + b * (2 * S + 3 * T + S * T) * C
    c = tl.arange(0, BLOCK_C)
    valid = c < columns
    # Pairs first: they need the maxima of the columns, which the first column is about to lose.
    for t in range(T):
        row = parts + (2 * S + 3 * t) * C + c
        max_t = tl.load(row, mask=valid, other=float("-inf"))
        sum_t = tl.load(row + C, mask=valid, other=0.0)
        weighted = tl.load(row + 2 * C, mask=valid, other=0.0)
        top_t, rescale, below_t = _exponentials(max_t, valid)
        for s in range(S):
            max_s = tl.load(parts + 2 * s * C + c, mask=valid, other=float("-inf"))
            top_s, _, below_s = _exponentials(max_s, valid)
            pair = parts + (2 * S + 3 * T + s * T + t) * C
            pairs = tl.load(pair + c, mask=valid, other=0.0)
            tl.debug_barrier()
            tl.store(pair, tl.sum(rescale * (pairs + below_s * sum_t), axis=0))
        tl.debug_barrier()
        to = parts + (2 * S + 3 * t) * C
        tl.store(to, top_t)
        tl.store(to + C, tl.sum(rescale * sum_t, axis=0))
        tl.store(to + 2 * C, tl.sum(rescale * (weighted + below_t * sum_t), axis=0))
    tl.debug_barrier()
    for s in range(S):
        row = parts + 2 * s * C
        max_s = tl.load(row + c, mask=valid, other=float("-inf"))
        sum_s = tl.load(row + C + c, mask=valid, other=0.0)
        top_s, rescale_s, _ = _exponentials(max_s, valid)
        tl.debug_barrier()
        tl.store(row, top_s)
        tl.store(row + C, tl.sum(rescale_s * sum_s, axis=0))


@triton.jit
def view_cross_entropy_combine_kernel(
    parts_ptr,  # [B, width, C] float32
    log_v_ptr,  # [T, B] float32, unused unless HAS_LOG_V
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    images_ptr,  # [B, 2] float32: loss over pairs, entropy over teacher views
    student_stats_ptr,  # [S, B, 2] float32
    teacher_stats_ptr,  # [T, B, 2] float32
    S,
    B,
    C,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SKIP: tl.constexpr,
    HAS_LOG_V: tl.constexpr,
    HAS_NUM_ROWS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if b >= _rows_in_use(num_rows_ptr, B, HAS_NUM_ROWS):
        return
    parts = parts_ptr + b * (2 * S + 3 * T + S * T) * C
    c = tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    is_view = t < T
    tile = is_view[:, None] & (c < C)[None, :]
    at = parts + (2 * S + 3 * t)[:, None] * C + c[None, :]
    cell_max = tl.load(at, mask=tile, other=float("-inf"))
    cell_sum = tl.load(at + C, mask=tile, other=0.0)
    weighted = tl.load(at + 2 * C, mask=tile, other=0.0)
    top = tl.where(is_view, tl.max(cell_max, axis=1), 0.0)
    below = tl.where(tile, cell_max - top[:, None], 0.0)
    rescale = tl.where(tile, tl.exp2(below), 0.0)
    z = tl.where(is_view, tl.sum(rescale * cell_sum, axis=1), 1.0)
    entropy = tl.log2(z) - tl.sum(rescale * (weighted + below * cell_sum), axis=1) / z
    factor = 1.0 / z
    if HAS_LOG_V:
        log_v = tl.load(log_v_ptr + t * B + b, mask=is_view, other=0.0)
        factor = tl.exp2(top + log_v * _LOG2E)
    mass = tl.where(is_view, factor * z, 0.0)
    stats = teacher_stats_ptr + (t * B + b) * 2
    tl.store(stats, top, mask=is_view)
    tl.store(stats + 1, factor, mask=is_view)
    rescale *= factor[:, None]
    cell_mass = rescale * cell_sum
    loss = 0.0
    for s in range(S):
        row = parts + 2 * s * C + c
        max_s = tl.load(row, mask=c < C, other=float("-inf"))
        top_s = tl.max(max_s, axis=0)
        below_s = tl.where(c < C, max_s - top_s, 0.0)
        z_s = tl.sum(tl.load(row + C, mask=c < C, other=0.0) * tl.exp2(below_s), axis=0)
        at_pairs = parts + (2 * S + 3 * T + s * T + t)[:, None] * C + c[None, :]
        pairs = tl.load(at_pairs, mask=tile, other=0.0)
        # Sum of p * (score - max): no term is positive, so nothing cancels, whatever the logits.
        cross = tl.sum(rescale * pairs + below_s[None, :] * cell_mass, axis=1)
        counted = is_view
        if SKIP:
            counted = is_view & (t != s)
        loss += tl.sum(tl.where(counted, mass * tl.log2(z_s) - cross, 0.0), axis=0)
        stats_s = student_stats_ptr + (s * B + b) * 2
        tl.store(stats_s, top_s)
        tl.store(stats_s + 1, tl.sum(tl.where(counted, mass, 0.0), axis=0) / z_s)
    tl.store(images_ptr + 2 * b, loss * _LN2)
    tl.store(images_ptr + 2 * b + 1, tl.sum(tl.where(is_view, entropy, 0.0), axis=0) * _LN2)


@triton.jit
def view_cross_entropy_total_kernel(
    images_ptr,  # [B, 2] float32
    weights_ptr,  # [B] float32, unused unless HAS_WEIGHTS
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    loss_ptr,
    entropy_ptr,
    norm_ptr,
    B,
    num_pairs,
    num_teacher,
    MEAN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_NUM_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    rows = _rows_in_use(num_rows_ptr, B, HAS_NUM_ROWS)
    losses = tl.zeros((BLOCK_B,), tl.float32)
    entropies = tl.zeros((BLOCK_B,), tl.float32)
    weights = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, rows, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        valid = b < rows
        weight = tl.where(valid, 1.0, 0.0)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + b, mask=valid, other=0.0)
        weights += weight
        losses += weight * tl.load(images_ptr + 2 * b, mask=valid, other=0.0)
        entropies += tl.load(images_ptr + 2 * b + 1, mask=valid, other=0.0)
    norm = 1.0
    if MEAN:
        total = tl.sum(weights, axis=0) * num_pairs
        norm = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(loss_ptr, tl.sum(losses, axis=0) * norm)
    tl.store(entropy_ptr, tl.sum(entropies, axis=0) / tl.maximum(rows * num_teacher, 1))
    tl.store(norm_ptr, norm)


@triton.jit
def _probabilities(
    total,  # [BLOCK_K], what they are added to
    skipped,  # the teacher view that does not count, -1 for none
    teacher_ptr,
    center_ptr,
    log_u_ptr,
    scale_ptr,
    stats_ptr,
    b,
    k,
    inside,
    T,
    B,
    K,
    log_u_stride,
    factor,
    HAS_CENTER: tl.constexpr,
    HAS_LOG_U: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    for t in range(T):
        x = _load_teacher(teacher_ptr, scale_ptr, t, b, k, inside, B, K, HAS_SCALE)
        x = _teacher_scores(
            x,
            center_ptr,
            log_u_ptr,
            t,
            k,
            inside,
            factor,
            log_u_stride,
            HAS_CENTER,
            HAS_LOG_U,
        )
        stats = stats_ptr + (t * B + b) * 2
        p = tl.exp2(tl.where(inside, x - tl.load(stats), 0.0)) * tl.load(stats + 1)
        total += tl.where(t == skipped, 0.0, p)
    return total


@triton.jit
def view_cross_entropy_gradient_kernel(
    dloss_ptr,  # [] float32
    student_ptr,  # [S, B, K]
    teacher_ptr,  # [T, B, K]
    temps_ptr,  # [2] float32, unused unless HAS_TEMPS
    center_ptr,  # [K] float32, unused unless HAS_CENTER
    log_u_ptr,  # [1 or T, K] float32, unused unless HAS_LOG_U
    student_scale_ptr,  # [K] float32, unused unless HAS_SCALE
    teacher_scale_ptr,  # [K] float32, unused unless HAS_SCALE
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    weights_ptr,  # [B] float32, unused unless HAS_WEIGHTS
    student_stats_ptr,  # [S, B, 2] float32
    teacher_stats_ptr,  # [T, B, 2] float32
    norm_ptr,  # [] float32
    dstudent_ptr,  # [S, B, K], may be the student
    S,
    T,
    B,
    K,
    chunks,
    log_u_stride,
    student_temp,
    teacher_temp,
    BLOCK_K: tl.constexpr,
    HAS_TEMPS: tl.constexpr,
    SKIP: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_LOG_U: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NUM_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    b = (tl.program_id(0) // chunks).to(tl.int64)
    k = (tl.program_id(0) % chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    student_temp, teacher_temp = _temperatures(temps_ptr, student_temp, teacher_temp, HAS_TEMPS)
    student_factor, teacher_factor = _LOG2E / student_temp, _LOG2E / teacher_temp
    gain = tl.load(dloss_ptr) * tl.load(norm_ptr) / student_temp
    if HAS_WEIGHTS:
        gain *= tl.load(weights_ptr + b)
    if (b >= _rows_in_use(num_rows_ptr, B, HAS_NUM_ROWS)) | (gain == 0.0):
        for s in range(S):
            zeros = tl.zeros((BLOCK_K,), dstudent_ptr.dtype.element_ty)
            tl.store(dstudent_ptr + (s * B + b) * K + k, zeros, mask=inside)
        return
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(student_scale_ptr + k, mask=inside, other=0.0)
    zeros = tl.zeros((BLOCK_K,), tl.float32)
    target = zeros
    for s in range(S):
        # The sum over teacher views stays the same once there is no same view to leave out.
        if s == 0 or (SKIP and s <= T):
            skipped = -1
            if SKIP:
                skipped = s
            target = _probabilities(
                zeros,
                skipped,
                teacher_ptr,
                center_ptr,
                log_u_ptr,
                teacher_scale_ptr,
                teacher_stats_ptr,
                b,
                k,
                inside,
                T,
                B,
                K,
                log_u_stride,
                teacher_factor,
                HAS_CENTER,
                HAS_LOG_U,
                HAS_SCALE,
            )
        row = (s * B + b) * K + k
        y = tl.load(student_ptr + row, mask=inside, other=0.0).to(tl.float32) * scale
        stats = student_stats_ptr + (s * B + b) * 2
        y = tl.where(inside, y * student_factor - tl.load(stats), 0.0)
        q = tl.exp2(y) * tl.load(stats + 1)
        dstudent = (q - target) * (gain * scale)
        tl.store(dstudent_ptr + row, dstudent.to(dstudent_ptr.dtype.element_ty), mask=inside)
