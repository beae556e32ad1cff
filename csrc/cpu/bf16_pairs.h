// Products of bfloat16 matrices that live in the cache, on the tile registers of Intel processors
// (AMX) or by dot products of pairs (AVX-512 BF16), and the rearrangements that their operands
// need.
//
// A tile product adds A [16, 32] times B [32, 16] to C [16, 16], with B given as [16, 16] pairs:
// two consecutive rows of one column make a 32-bit word. For tiles, matrices are padded with zeros
// to whole ones; dot products need that of the right operand's columns only. Sizes and leading
// dimensions count elements of the pointer's type.
#pragma once

#include <algorithm>

#include "simd.h"

#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 14 : defined(__GNUC__) && __GNUC__ >= 12)
#define FASTSSL_HAS_PAIRS 1

#include <cpuid.h>
// GCC's own headers leave the lanes that an instruction does not merge undefined, and GCC 12 warns.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <sys/syscall.h>
#include <unistd.h>

#define FASTSSL_PAIRS \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma")))

namespace fastssl::pairs {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What multiplies pairs: no instruction, dot products of vectors, or tiles.
enum class Unit { none, dots, tiles };

// The best that the processor has and the system lets this process use. Tests name one.
inline Unit best_unit() {
#ifdef FASTSSL_BF16_UNIT
  return Unit::FASTSSL_BF16_UNIT;
#endif
  static const Unit unit = [] {
    if (best_isa() != Isa::avx512) return Unit::none;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1u)) return Unit::none;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Unit::dots;
    if (!(d >> 22 & 1u) || !(d >> 24 & 1u)) return Unit::dots;  // amx-bf16, amx-tile
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed ? Unit::tiles : Unit::dots;
  }();
  return unit;
}

// Eight tiles of 16 rows of 64 bytes, for as long as this lives. What the thread had configured
// comes back afterwards: oneDNN remembers its configuration instead of loading it for each product.
class Tiles {
 public:
  FASTSSL_PAIRS Tiles() {
    _tile_storeconfig(before_);
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    _tile_loadconfig(&config);
  }
  FASTSSL_PAIRS ~Tiles() {
    if (before_[0] == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(before_);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// C [16 or 32, 16 or 32] = A B over K, which is a multiple of 32.
template <bool kTwoRows, bool kTwoColumns>
FASTSSL_PAIRS inline void multiply_block(const uint16_t* a, int64_t lda, const uint32_t* b,
                                         int64_t ldb, float* c, int64_t ldc, int64_t K) {
  _tile_zero(0);
  if (kTwoColumns) _tile_zero(1);
  if (kTwoRows) _tile_zero(2);
  if (kTwoRows && kTwoColumns) _tile_zero(3);
  for (int64_t k = 0; k < K; k += 32) {
    _tile_loadd(4, a + k, lda * 2);
    _tile_loadd(6, b + k / 2 * ldb, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoRows) {
      _tile_loadd(5, a + 16 * lda + k, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (kTwoColumns) {
      _tile_loadd(7, b + k / 2 * ldb + 16, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  if (kTwoColumns) _tile_stored(1, c + 16, ldc * 4);
  if (kTwoRows) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// Sums of kRows rows of A with 16 * kVectors columns of B, in registers. Pair k of A's row r is the
// word at a[r * lda + k], or with kPacked at a[k * lda + r]: A's transpose in pairs of rows.
template <int kRows, int kVectors, bool kPacked>
struct DotSums {
  __m512 rows[kRows][kVectors];

  FASTSSL_PAIRS FASTSSL_INLINE void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) rows[r][v] = _mm512_setzero_ps();
    }
  }
  FASTSSL_PAIRS FASTSSL_INLINE void load(const float* c, int64_t ldc) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) rows[r][v] = _mm512_loadu_ps(c + r * ldc + 16 * v);
    }
  }
  FASTSSL_PAIRS FASTSSL_INLINE void store(float* c, int64_t ldc) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, rows[r][v]);
    }
  }
  // Adds `pairs` pairs; with each, `ahead` may fetch something.
  template <class Ahead>
  FASTSSL_PAIRS FASTSSL_INLINE void multiply(const uint32_t* a, int64_t lda, const uint32_t* b,
                                             int64_t ldb, int64_t pairs, Ahead& ahead) {
    for (int64_t k = 0; k < pairs; ++k) {
      ahead.fetch();
      __m512bh columns[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        columns[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16 * v);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, kPacked ? a + k * lda + r : a + r * lda + k, sizeof(pair));
        const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          rows[r][v] = _mm512_dpbf16_ps(rows[r][v], row, columns[v]);
        }
      }
    }
  }
};

struct FetchNothing {
  FASTSSL_INLINE void fetch() const {}
};

// Where sums go as they are: a matrix of float32.
struct FloatRows {
  float* data;
  int64_t stride;

  FASTSSL_PAIRS FASTSSL_INLINE void operator()(int64_t m, int64_t n, __m512 sums) const {
    _mm512_storeu_ps(data + m * stride + n, sums);
  }
  FASTSSL_PAIRS FASTSSL_INLINE void operator()(int64_t m, int64_t n, __m512 low,
                                               __m512 high) const {
    (*this)(m, n, low);
    (*this)(m, n + 16, high);
  }
};

// As many rows as `count` says, at most kRows, and 16 * kVectors columns of A B over K, which is
// even. `store` gets the sums of row m at columns n and, with two vectors, n + 16.
template <int kRows, int kVectors, bool kPacked, class Store>
FASTSSL_PAIRS inline void dot_rows(int64_t count, const uint32_t* a, int64_t lda, const uint32_t* b,
                                   int64_t ldb, int64_t K, int64_t m, int64_t n,
                                   const Store& store) {
  if constexpr (kRows > 1) {
    if (count < kRows) {
      return dot_rows<kRows - 1, kVectors, kPacked>(count, a, lda, b, ldb, K, m, n, store);
    }
  }
  DotSums<kRows, kVectors, kPacked> sums;
  const FetchNothing nothing;
  sums.clear();
  sums.multiply(a, lda, b, ldb, K / 2, nothing);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kVectors == 2) {
      store(m + r, n, sums.rows[r][0], sums.rows[r][1]);
    } else {
      store(m + r, n, sums.rows[r][0]);
    }
  }
}

// The even number of rows that cuts M rows into the fewest and most equal blocks of `most` at most,
// which is even.
inline int64_t even_block(int64_t M, int64_t most) {
  const int64_t blocks = std::max<int64_t>((M + most - 1) / most, 1);
  return round_up((M + blocks - 1) / blocks, 2);
}

// C [M, N] = A [M, K] B [K, N] by dot products, in blocks that keep up to 28 sums on their way; N a
// multiple of 16, K even. No row of A past M is read. Before each block `ahead` may fetch
// something.
template <bool kPacked, class Store, class Fetch>
FASTSSL_PAIRS inline void multiply_dots(const uint32_t* a, int64_t lda, const uint32_t* b,
                                        int64_t ldb, int64_t M, int64_t N, int64_t K,
                                        const Store& store, Fetch& ahead) {
  const int64_t step = kPacked ? 1 : lda;
  for (int64_t n = 0; n < N; n += 32) {
    const bool two = n + 16 < N;
    const int64_t block = even_block(M, two ? 14 : 16);
    for (int64_t m = 0; m < M; m += block) {
      const int64_t rows = std::min(block, M - m);
      ahead.fetch();
      if (two) {
        dot_rows<14, 2, kPacked>(rows, a + m * step, lda, b + n, ldb, K, m, n, store);
      } else {
        dot_rows<16, 1, kPacked>(rows, a + m * step, lda, b + n, ldb, K, m, n, store);
      }
    }
  }
}

// Of what a product's sizes are multiples: rows and depth; columns are always of 16.
struct Grain {
  int64_t rows, depth;
};

inline Grain grain() { return best_unit() == Unit::tiles ? Grain{16, 32} : Grain{1, 2}; }

// C [M, N] = A [M, K] B [K, N], sizes as `grain` says, lda even; B in pairs [K / 2, N]. `ahead` as
// above.
template <class Fetch>
FASTSSL_PAIRS inline void multiply(const uint16_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                                   float* c, int64_t ldc, int64_t M, int64_t N, int64_t K,
                                   Fetch& ahead) {
  if (best_unit() == Unit::dots) {
    const auto* words = reinterpret_cast<const uint32_t*>(a);
    return multiply_dots<false>(words, lda / 2, b, ldb, M, N, K, FloatRows{c, ldc}, ahead);
  }
  for (int64_t m = 0; m < M; m += 32) {
    const uint16_t* rows = a + m * lda;
    for (int64_t n = 0; n < N; n += 32) {
      ahead.fetch();
      float* to = c + m * ldc + n;
      const bool two_rows = m + 16 < M, two_columns = n + 16 < N;
      if (two_rows && two_columns) {
        multiply_block<true, true>(rows, lda, b + n, ldb, to, ldc, K);
      } else if (two_rows) {
        multiply_block<true, false>(rows, lda, b + n, ldb, to, ldc, K);
      } else if (two_columns) {
        multiply_block<false, true>(rows, lda, b + n, ldb, to, ldc, K);
      } else {
        multiply_block<false, false>(rows, lda, b + n, ldb, to, ldc, K);
      }
    }
  }
}

FASTSSL_PAIRS inline __mmask32 first_words(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
}
FASTSSL_PAIRS inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

// rows [R, C] of src into dst [padded_rows, ld], both multiples of 32 (rows of 16), zeros around.
FASTSSL_PAIRS inline void copy_padded(const uint16_t* src, int64_t stride, int64_t R, int64_t C,
                                      uint16_t* dst, int64_t ld, int64_t padded_rows) {
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t c = 0; c < ld; c += 32) {
      const __mmask32 mask = c < C ? first_words(C - c) : 0;
      const __m512i words = _mm512_maskz_loadu_epi16(mask, src + r * stride + c);
      _mm512_storeu_si512(dst + r * ld + c, words);
    }
  }
  for (int64_t i = R * ld; i < padded_rows * ld; i += 32) {
    _mm512_storeu_si512(dst + i, _mm512_setzero_si512());
  }
}

// Makes pairs of 32 words of two rows.
class PairOrder {
 public:
  FASTSSL_PAIRS PairOrder() {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 32);
    low_ = _mm512_load_si512(order);
    high_ = _mm512_add_epi16(low_, _mm512_set1_epi16(16));
  }
  FASTSSL_PAIRS void store(__m512i even, __m512i odd, uint32_t* to) const {
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low_, odd));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high_, odd));
  }

 private:
  __m512i low_, high_;
};

FASTSSL_PAIRS inline __m512i load_words(const uint16_t* from, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, from);
}
FASTSSL_PAIRS inline __m512i load_words(const float* from, __mmask32 mask) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + 16),
                                      _mm512_maskz_loadu_ps(__mmask16(mask), from));
}

// Pairs of consecutive rows of src [R, C]: [padded / 2, ldd], ldd and padded multiples of 32 and 2,
// zeros past the rows and columns.
FASTSSL_PAIRS inline void pair_rows(const uint16_t* src, int64_t stride, int64_t R, int64_t C,
                                    uint32_t* dst, int64_t ldd, int64_t padded) {
  const PairOrder order;
  for (int64_t r = 0; r < padded; r += 2, dst += ldd) {
    const uint16_t* from = src + r * stride;
    for (int64_t c = 0; c < ldd; c += 32) {
      const __mmask32 mask = c < C ? first_words(C - c) : 0;
      const __m512i even = load_words(from + c, r < R ? mask : 0);
      order.store(even, load_words(from + stride + c, r + 1 < R ? mask : 0), dst + c);
    }
  }
}

// Transposes 16 x 16 words of 32 bits.
FASTSSL_PAIRS inline void transpose_block(const uint32_t* src, int64_t ld, uint32_t* dst,
                                          int64_t ldd) {
  __m512i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(src + i * ld);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 g + c] holds, in its lane l of 128 bits, column 4 l + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i p = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
    const __m512i q = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    const __m512i r = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    const __m512i s = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    _mm512_storeu_si512(dst + c * ldd, _mm512_shuffle_i32x4(p, q, 0x88));
    _mm512_storeu_si512(dst + (4 + c) * ldd, _mm512_shuffle_i32x4(r, s, 0x88));
    _mm512_storeu_si512(dst + (8 + c) * ldd, _mm512_shuffle_i32x4(p, q, 0xdd));
    _mm512_storeu_si512(dst + (12 + c) * ldd, _mm512_shuffle_i32x4(r, s, 0xdd));
  }
}

// The transpose of src [R, C] in pairs: [C / 2, ldd], C rounded up to a multiple of 32; zeros past
// the rows up to `padded`, a multiple of 16, and past the columns.
template <class T>
FASTSSL_PAIRS inline void pair_columns(const T* src, int64_t stride, int64_t R, int64_t C,
                                       uint32_t* dst, int64_t ldd, int64_t padded) {
  alignas(64) uint32_t square[16 * 16];
  for (int64_t r = 0; r < padded; r += 16) {
    for (int64_t c = 0; c < C; c += 32) {
      const __mmask32 mask = first_words(C - c);
      for (int64_t i = 0; i < 16; ++i) {
        const T* from = src + (r + i) * stride + c;
        _mm512_store_si512(square + 16 * i, load_words(from, r + i < R ? mask : 0));
      }
      transpose_block(square, 16, dst + c / 2 * ldd + r, ldd);
    }
  }
}

// 2^x for x <= 0 with a relative error under 1e-4, for results that are stored in bfloat16.
FASTSSL_PAIRS inline __m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, 0);
  const __m512 r = _mm512_sub_ps(x, n);
  const __m512 square = _mm512_mul_ps(r, r);
  const __m512 even = _mm512_fmadd_ps(r, _mm512_set1_ps(0.69326098f), _mm512_set1_ps(0.99992807f));
  const __m512 odd = _mm512_fmadd_ps(r, _mm512_set1_ps(0.05517166f), _mm512_set1_ps(0.24261112f));
  const __m512 p = _mm512_fmadd_ps(odd, square, even);
  return _mm512_scalef_ps(p, n);
}

FASTSSL_PAIRS inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

FASTSSL_PAIRS inline __m512 from_bf16(__m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

}  // namespace fastssl::pairs

#endif
