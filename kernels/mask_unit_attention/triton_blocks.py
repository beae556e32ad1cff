"""Blocks of rows in the Triton kernels of mask_unit_attention: loaded, pooled, multiplied, stored.

H heads of D channels, units of U tokens and U / S queries. A head's channels lie in two parts of a
power of two, D1 and D2 (96 = 64 + 32), so that little is padded; D2 is 0 where one part does.
"""

import math

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_part(ptr, rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (d < D)[None, :]
    return tl.load(ptr + (rows[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def load(ptr, rows, inside, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of a block of rows."""
    one = _load_part(ptr, rows, inside, 0, D1, D)
    two = one
    if D2 > 0:
        two = _load_part(ptr, rows, inside, D1, D2, D)
    return one, two


@triton.jit
def _store_part(
    ptr, rows, values, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    d = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(ptr + (rows[:, None] + d[None, :]), values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store(ptr, rows, one, two, inside, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    _store_part(ptr, rows, one, inside, 0, D1, D)
    if D2 > 0:
        _store_part(ptr, rows, two, inside, D1, D2, D)


@triton.jit
def _token(i, member, U: tl.constexpr, S: tl.constexpr):
    """The token of the tile that is this member of query i's pooling group."""
    return i // (U // S) * U + member * (U // S) + i % (U // S)


@triton.jit
def _pool_part(
    ptr,
    i,
    stride,
    inside,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    S: tl.constexpr,
):
    """Maximum over the members of every group, and the first member that has it."""
    top = _load_part(ptr, _token(i, 0, U, S) * stride, inside, FIRST, WIDTH, D)
    winner = tl.zeros(top.shape, tl.int32)
    if S > 1:
        highest = top.to(tl.float32)
        for member in tl.static_range(1, S):
            rows = _token(i, member, U, S) * stride
            other = _load_part(ptr, rows, inside, FIRST, WIDTH, D).to(tl.float32)
            # Not a number is the largest, as in torch.
            larger = (other > highest) | ((other != other) & (highest == highest))
            highest = tl.where(larger, other, highest)
            winner = tl.where(larger, member, winner)
        top = highest.to(top.dtype)
    return top, winner


@triton.jit
def load_queries(
    ptr,
    i,
    stride,
    inside,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    U: tl.constexpr,
    S: tl.constexpr,
):
    """Both parts of a block of pooled queries, and of the members that they come from."""
    one, winner1 = _pool_part(ptr, i, stride, inside, 0, D1, D, U, S)
    two, winner2 = one, winner1
    if D2 > 0:
        two, winner2 = _pool_part(ptr, i, stride, inside, D1, D2, D, U, S)
    return one, two, winner1, winner2


@triton.jit
def store_query_gradient(
    ptr,
    i,
    stride,
    inside,
    one,
    two,
    winner1,
    winner2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    U: tl.constexpr,
    S: tl.constexpr,
):
    """Every member's gradient: that of the query, or zero."""
    for member in tl.static_range(0, S):
        own1 = tl.where(winner1 == member, one, 0.0)
        own2 = tl.where(winner2 == member, two, 0.0)
        store(ptr, _token(i, member, U, S) * stride, own1, own2, inside, D, D1, D2)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UPCASTS: tl.constexpr):
    """a times b in the dtype of b, with float32 sums."""
    if UPCASTS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def inner(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr, UPCASTS: tl.constexpr):
    """Inner products of all rows of a with all rows of b."""
    products = _dot(a1, tl.trans(b1), PRECISION, UPCASTS)
    if D2 > 0:
        products += _dot(a2, tl.trans(b2), PRECISION, UPCASTS)
    return products


@triton.jit
def mix(weights, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr, UPCASTS: tl.constexpr):
    """Sums of the rows of b by weights."""
    one = _dot(weights, b1, PRECISION, UPCASTS)
    two = one
    if D2 > 0:
        two = _dot(weights, b2, PRECISION, UPCASTS)
    return one, two


@triton.jit
def masked(products, scale, query, key, U: tl.constexpr, S: tl.constexpr):
    """Scores of keys in the query's unit, -inf for others; queries past the tile may have none."""
    own = query // (U // S) == key // U
    return tl.where(own, products * (scale * _LOG2_E), float("-inf"))
