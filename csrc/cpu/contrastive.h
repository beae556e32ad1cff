// Tiles of scores of contrastive losses, each worked on by one thread from the product of features
// to the exponentials, so that it stays in that thread's cache and threads rarely meet.
//
// Scores are in units of log 2.
#pragma once

#include <algorithm>
#include <cmath>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "ranges.h"
#include "softmax.h"

namespace fastssl {

// Columns whose sums stay in registers: eight of AVX-512.
constexpr int64_t kStrip = 128;

struct Matrix {
  float* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

inline Matrix matrix(float* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns, 1};
}

inline Matrix matrix(const float* data, int64_t rows, int64_t columns) {
  return matrix(const_cast<float*>(data), rows, columns);
}

inline Tensor view_of(const Matrix& m) {
  const int64_t sizes[2] = {m.rows, m.columns}, strides[2] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Float);
}

// out = beta * out + alpha * a b. Torch's product without its dispatcher, which is thread-safe and,
// inside a parallel loop of more than one task, runs on the calling thread alone.
__attribute__((noinline)) inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b,
                                               double beta, double alpha) {
  const Tensor to = view_of(out), left = view_of(a), right = view_of(b);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), beta, alpha));
}

// Adds 2^(score - top) over a row to its sum, moving its top up where needed; the terms replace the
// scores where wanted. Returns what the terms before shrink by.
template <bool kKeep>
FASTSSL_INLINE float add_row(float* s, int64_t n, float* top, double* sum) {
  float highest = *top;
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < n; ++j) highest = highest > s[j] ? highest : s[j];
  float added = 0.0f;
#pragma omp simd reduction(+ : added)
  for (int64_t j = 0; j < n; ++j) {
    const float term = exp2_fast(s[j] - highest);
    if (kKeep) s[j] = term;
    added += term;
  }
  const float shrink = exp2_fast(*top - highest);
  *sum = *sum * shrink + added;
  *top = highest;
  return shrink;
}

// Adds a tile's columns to the softmax of its rows; where `weighted` [R, D] is wanted, it shrinks
// to the new tops and the terms replace the scores.
FASTSSL_INLINE void add_rows(const Matrix& tile, float* top, double* sum, float* weighted,
                             int64_t D) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* s = tile.data + r * tile.columns;
    if (!weighted) {
      add_row<false>(s, tile.columns, top + r, sum + r);
      continue;
    }
    const float shrink = add_row<true>(s, tile.columns, top + r, sum + r);
    if (shrink == 1.0f) continue;
    float* row = weighted + r * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) row[d] *= shrink;
  }
}

}  // namespace fastssl
