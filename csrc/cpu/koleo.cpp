// koleo: unit rows, each one's nearest other row, distances, gradients; see kernels/koleo.
#include "contrastive.h"

#include <cfloat>
#include <vector>

namespace fastssl {
namespace {

// Rows and columns of a tile of products: 256 KB, which stay in a thread's second-level cache.
constexpr int64_t kBlock = 256;

FASTSSL_INLINE float squared_distance(const float* a, const float* b, int64_t D) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

// unit [N, D] = x / norm, where norm [N] is the length of the row, at least min_length.
void koleo_normalize(Tensor x, double min_length, Tensor unit, Tensor norm) {
  check_cpu(x, "x");
  const int64_t N = x.size(0), D = x.size(1);
  const float least = float(min_length);
  float *unit_ptr = output<float>(unit), *norm_ptr = output<float>(norm);
  with_type(x.scalar_type(), "x", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const X* x_ptr = input<X>(x);
    parallel(N, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t n = begin; n < end; ++n) {
        const X* from = x_ptr + n * D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < D; ++d) sum += load(from + d) * load(from + d);
        // In this order a NaN stays one.
        const float length = std::max(std::sqrt(sum), least);
        norm_ptr[n] = length;
        float* to = unit_ptr + n * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] = load(from + d) / length;
      }
    });
  });
}

// The largest product of each row so far and its column, the lowest of equal ones as long as
// columns come in ascending order.
struct Nearest {
  float* top;
  int32_t* index;
};

FASTSSL_INLINE void update_rows(const Matrix& tile, int64_t first_column, Nearest best) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* s = tile.data + r * tile.columns;
    float highest = best.top[r];
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < tile.columns; ++j) highest = s[j] > highest ? s[j] : highest;
    if (!(highest > best.top[r])) continue;
    int64_t j = 0;
    while (s[j] != highest) ++j;
    best.top[r] = highest;
    best.index[r] = int32_t(first_column + j);
  }
}

// The same for the columns of the tile, whose products with its rows are those of the rows.
FASTSSL_INLINE void update_columns(const Matrix& tile, int64_t first_row, Nearest best) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* s = tile.data + r * tile.columns;
    const int32_t row = int32_t(first_row + r);
#pragma omp simd
    for (int64_t j = 0; j < tile.columns; ++j) {
      const bool nearer = s[j] > best.top[j];
      best.top[j] = nearer ? s[j] : best.top[j];
      best.index[j] = nearer ? row : best.index[j];
    }
  }
}

// nearest [N]: the column of the largest product with each of the rows first.. of columns [C, D],
// without its own; the lowest of equal ones. Where the rows are all columns, tiles below the
// diagonal are read off those above. Every task has a tile of scratch [tasks, 256 * 256] and of
// top and index [tasks, N] rows of its own, so that a maximum is all that they share.
void koleo_nearest(Tensor columns, int64_t first, Tensor scratch, Tensor top, Tensor index,
                   Tensor nearest) {
  check_cpu(columns, "columns");
  const int64_t C = columns.size(0), D = columns.size(1), N = nearest.size(0);
  const int64_t tasks = scratch.size(0);
  STD_TORCH_CHECK(scratch.size(1) >= std::min(kBlock, N) * std::min(kBlock, C),
                  "scratch must hold a tile per task");
  STD_TORCH_CHECK(top.numel() == tasks * N && index.numel() == tasks * N && first + N <= C,
                  "top and index must hold all rows per task");
  const bool whole = N == C;
  const int64_t row_blocks = (N + kBlock - 1) / kBlock, column_blocks = (C + kBlock - 1) / kBlock;
  const int64_t steps = whole ? row_blocks * (row_blocks + 1) / 2 : row_blocks * column_blocks;
  const float* from = input<float>(columns);
  float *scratch_ptr = output<float>(scratch), *top_ptr = output<float>(top);
  int32_t* index_ptr = output<int32_t>(index);
  const int64_t stride = scratch.size(1);
  parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t task = begin; task < end; ++task) {
      const Range own = part_of(steps, task, tasks);
      float* best = top_ptr + task * N;
      int32_t* at = index_ptr + task * N;
      // A row without a single number gets a neighbour, too.
      for (int64_t n = 0; n < N; ++n) best[n] = -INFINITY, at[n] = first + n == 0 ? 1 : 0;
      int64_t step = 0;
      for (int64_t i = 0; i < row_blocks; ++i) {
        const Range r = block_of(N, i, kBlock);
        for (int64_t k = whole ? i : 0; k < column_blocks; ++k, ++step) {
          if (step < own.begin || step >= own.end) continue;
          const Range c = block_of(C, k, kBlock);
          const Matrix tile = matrix(scratch_ptr + task * stride, r.size(), c.size());
          const Matrix left = matrix(from + (first + r.begin) * D, r.size(), D);
          const Matrix right = matrix(from + c.begin * D, c.size(), D);
          multiply(tile, left, right.transposed(), 0.0, 1.0);
          for (int64_t n = r.begin; n < r.end; ++n) {
            const int64_t self = first + n - c.begin;
            if (self < 0 || self >= c.size()) continue;
            tile.data[(n - r.begin) * tile.columns + self] = -INFINITY;
          }
          update_rows(tile, c.begin, {best + r.begin, at + r.begin});
          if (whole && k != i) update_columns(tile, r.begin, {best + c.begin, at + c.begin});
        }
      }
    }
  });
  int64_t* to = output<int64_t>(nearest);
  for (int64_t n = 0; n < N; ++n) {
    int64_t winner = n;
    for (int64_t at = n + N; at < tasks * N; at += N) {
      if (top_ptr[at] > top_ptr[winner]) winner = at;
    }
    to[n] = index_ptr[winner];
  }
}

// distances [N] of rows first.. of unit [C, D] to their neighbours.
void koleo_distances(Tensor unit, int64_t first, Tensor nearest, Tensor distances) {
  check_cpu(unit, "unit");
  check_cpu(nearest, "nearest");
  const int64_t D = unit.size(1), N = nearest.size(0);
  const float* u = input<float>(unit);
  const int64_t* nearest_ptr = input<int64_t>(nearest);
  float* to = output<float>(distances);
  parallel(N, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t n = begin; n < end; ++n) {
      to[n] = std::sqrt(squared_distance(u + (first + n) * D, u + nearest_ptr[n] * D, D));
    }
  });
}

// to += weight * (a - b)
FASTSSL_INLINE void add_difference(float weight, const float* a, const float* b, int64_t D,
                                   float* to) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) to[d] += weight * (a[d] - b[d]);
}

// dx [N, D], the gradient of rows first.. of unit [C, D]: each is drawn by weights [C] to its own
// nearest [C] row and to those that it is nearest to, order[offsets[n]:offsets[n + 1]]; then back
// through the division by norm [N], which is a constant where it is min_length.
void koleo_backward(Tensor unit, int64_t first, Tensor norm, double min_length, Tensor nearest,
                    Tensor weights, Tensor order, Tensor offsets, Tensor dx) {
  check_cpu(unit, "unit");
  check_cpu(norm, "norm");
  check_cpu(nearest, "nearest");
  check_cpu(weights, "weights");
  check_cpu(order, "order");
  check_cpu(offsets, "offsets");
  check_cpu(dx, "dx");
  const int64_t D = unit.size(1), N = dx.size(0);
  const float *u = input<float>(unit), *norm_ptr = input<float>(norm);
  const float* weights_ptr = input<float>(weights);
  const int64_t *nearest_ptr = input<int64_t>(nearest), *order_ptr = input<int64_t>(order);
  const int64_t* offsets_ptr = input<int64_t>(offsets);
  const float least = float(min_length);
  with_type(dx.scalar_type(), "dx", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    X* dx_ptr = output<X>(dx);
    parallel(N, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      std::vector<float> row(D);
      float* du = row.data();
      for (int64_t n = begin; n < end; ++n) {
        const int64_t self = first + n;
        const float* own = u + self * D;
        std::fill(du, du + D, 0.0f);
        add_difference(weights_ptr[self], own, u + nearest_ptr[self] * D, D, du);
        for (int64_t i = offsets_ptr[n]; i < offsets_ptr[n + 1]; ++i) {
          add_difference(weights_ptr[order_ptr[i]], own, u + order_ptr[i] * D, D, du);
        }
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < D; ++d) along += du[d] * own[d];
        if (norm_ptr[n] <= least) along = 0.0f;
        const float length = norm_ptr[n];
        X* to = dx_ptr + n * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) store(to + d, (du[d] - along * own[d]) / length);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def("koleo_normalize(Tensor x, float min_length, Tensor(a!) unit, Tensor(b!) norm) -> ()");
  m.def(
      "koleo_nearest(Tensor columns, int first, Tensor(a!) scratch, Tensor(b!) top, "
      "Tensor(c!) index, Tensor(d!) nearest) -> ()");
  m.def("koleo_distances(Tensor unit, int first, Tensor nearest, Tensor(a!) distances) -> ()");
  m.def(
      "koleo_backward(Tensor unit, int first, Tensor norm, float min_length, Tensor nearest, "
      "Tensor weights, Tensor order, Tensor offsets, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("koleo_normalize", TORCH_BOX(&koleo_normalize));
  m.impl("koleo_nearest", TORCH_BOX(&koleo_nearest));
  m.impl("koleo_distances", TORCH_BOX(&koleo_distances));
  m.impl("koleo_backward", TORCH_BOX(&koleo_backward));
}

}  // namespace fastssl
