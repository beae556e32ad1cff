// float32 products of matrices that live in the cache.
#pragma once

#include "simd.h"

namespace fastssl {

// Columns come padded to whole vectors of AVX-512.
constexpr int64_t kVector = 16;

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
#endif

// C [kRows, kVectors * 16] (+)= A B over K; element (m, k) of A is a[m * a_row + k * a_column].
//
// One definition per instruction set: vectors are split into the machine's before functions are
// inlined, so `with_best_isa` comes too late for them.
#define FASTSSL_DEFINE_BLOCK(name, attribute)                                                     \
  template <int kRows, int kVectors>                                                              \
  attribute inline void name(const float* a, int64_t a_row, int64_t a_column, const float* b,     \
                             int64_t ldb, float* c, int64_t ldc, int64_t K, bool accumulate) {    \
    Vector sums[kRows][kVectors];                                                                 \
    for (int m = 0; m < kRows; ++m) {                                                             \
      for (int v = 0; v < kVectors; ++v) {                                                        \
        const Vector* to = reinterpret_cast<const Vector*>(c + m * ldc) + v;                      \
        sums[m][v] = accumulate ? *to : Vector{};                                                 \
      }                                                                                           \
    }                                                                                             \
    for (int64_t k = 0; k < K; ++k) {                                                             \
      const Vector* row = reinterpret_cast<const Vector*>(b + k * ldb);                           \
      for (int m = 0; m < kRows; ++m) {                                                           \
        const float x = a[m * a_row + k * a_column];                                              \
        for (int v = 0; v < kVectors; ++v) sums[m][v] += x * row[v];                              \
      }                                                                                           \
    }                                                                                             \
    for (int m = 0; m < kRows; ++m) {                                                             \
      for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector*>(c + m * ldc)[v] = sums[m][v];  \
    }                                                                                             \
  }                                                                                               \
  template <int kVectors>                                                                         \
  attribute inline void name##_columns(const float* a, int64_t a_row, int64_t a_column,           \
                                       const float* b, int64_t ldb, float* c, int64_t ldc,        \
                                       int64_t M, int64_t K, bool accumulate) {                   \
    int64_t m = 0;                                                                                \
    for (; m + 4 <= M; m += 4) {                                                                  \
      name<4, kVectors>(a + m * a_row, a_row, a_column, b, ldb, c + m * ldc, ldc, K, accumulate); \
    }                                                                                             \
    for (; m < M; ++m) {                                                                          \
      name<1, kVectors>(a + m * a_row, a_row, a_column, b, ldb, c + m * ldc, ldc, K, accumulate); \
    }                                                                                             \
  }

FASTSSL_DEFINE_BLOCK(block_baseline, )
#if defined(__x86_64__) && defined(__GNUC__)
FASTSSL_DEFINE_BLOCK(block_avx2, __attribute__((target("avx2,fma"))))
FASTSSL_DEFINE_BLOCK(block_avx512, __attribute__((target(FASTSSL_AVX512))))
#endif
#undef FASTSSL_DEFINE_BLOCK

// C [M, N] = A B, or C += A B, over K; N is a multiple of kVector.
inline void small_product(const float* a, int64_t a_row, int64_t a_column, const float* b,
                          int64_t ldb, float* c, int64_t ldc, int64_t M, int64_t N, int64_t K,
                          bool accumulate) {
  int64_t n = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  if (best_isa() == Isa::avx512) {
    for (; n + 2 * kVector <= N; n += 2 * kVector) {
      block_avx512_columns<2>(a, a_row, a_column, b + n, ldb, c + n, ldc, M, K, accumulate);
    }
    for (; n < N; n += kVector) {
      block_avx512_columns<1>(a, a_row, a_column, b + n, ldb, c + n, ldc, M, K, accumulate);
    }
    return;
  }
  if (best_isa() == Isa::avx2) {
    for (; n < N; n += kVector) {
      block_avx2_columns<1>(a, a_row, a_column, b + n, ldb, c + n, ldc, M, K, accumulate);
    }
    return;
  }
#endif
  for (; n < N; n += kVector) {
    block_baseline_columns<1>(a, a_row, a_column, b + n, ldb, c + n, ldc, M, K, accumulate);
  }
}

}  // namespace fastssl
