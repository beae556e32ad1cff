// Features, streams of keys and the keys' gradient; see kernels/common/contrastive_cpp.py.
#include "contrastive.h"

#include <cfloat>
#include <optional>

namespace fastssl {
namespace {

constexpr float kSmallestNorm = 1e-12f;
// Negatives of one row at a time: with 128 dimensions, half of the first-level cache.
constexpr int64_t kNegatives = 64;

template <class A, class B>
FASTSSL_INLINE float inner_product(const A* a, const B* b, int64_t D) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += load(a + d) * load(b + d);
  return sum;
}

// unit [N, D] = features, divided by their lengths where `inverse` [N] wants them.
void contrastive_normalize(Tensor features, Tensor unit, std::optional<Tensor> inverse) {
  check_cpu(features, "features");
  check_cpu(unit, "unit");
  const int64_t N = features.size(0), D = features.size(1);
  float *to = output<float>(unit), *inverse_ptr = inverse ? output<float>(*inverse) : nullptr;
  with_type(features.scalar_type(), "features", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const X* from = input<X>(features);
    parallel(N, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t n = begin; n < end; ++n) {
        const X* x = from + n * D;
        float scale = 1.0f;
        if (inverse_ptr) {
          scale = 1.0f / std::max(std::sqrt(inner_product(x, x, D)), kSmallestNorm);
          inverse_ptr[n] = scale;
        }
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[n * D + d] = load(x + d) * scale;
      }
    });
  });
}

// products [N] of the rows of a and b.
void contrastive_inner_products(Tensor a, Tensor b, Tensor products) {
  check_cpu(a, "a");
  check_cpu(b, "b");
  const int64_t N = a.size(0), D = a.size(1);
  const float *a_ptr = input<float>(a), *b_ptr = input<float>(b);
  float* to = output<float>(products);
  parallel(N, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t n = begin; n < end; ++n) {
      to[n] = inner_product(a_ptr + n * D, b_ptr + n * D, D);
    }
  });
}

// g = scale * (gradient + weight * other); out = (g - (g . unit) unit) * inverse, or g where there
// are no inverse lengths; products [N] = g . unit. out may be the gradient.
void contrastive_project(Tensor gradient, Tensor unit, std::optional<Tensor> inverse,
                         std::optional<Tensor> other, double weight, double scale,
                         std::optional<Tensor> products, Tensor out) {
  check_cpu(gradient, "gradient");
  check_cpu(unit, "unit");
  check_cpu(out, "out");
  const int64_t N = gradient.size(0), D = gradient.size(1);
  const float *g_ptr = input<float>(gradient), *unit_ptr = input<float>(unit);
  const float* inverse_ptr = inverse ? input<float>(*inverse) : nullptr;
  const float* other_ptr = other ? input<float>(*other) : nullptr;
  float* products_ptr = products ? output<float>(*products) : nullptr;
  const float w = other ? float(weight) : 0.0f, s = float(scale);
  with_type(out.scalar_type(), "out", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    X* to = output<X>(out);
    parallel(N, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t n = begin; n < end; ++n) {
        const float *g = g_ptr + n * D, *u = unit_ptr + n * D;
        // Without another one its weight is 0, and any row serves.
        const float* o = other_ptr ? other_ptr + n * D : u;
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < D; ++d) along += (g[d] + w * o[d]) * u[d];
        if (products_ptr) products_ptr[n] = along * s;
        const float c = inverse_ptr ? s * inverse_ptr[n] : s;
        if (!inverse_ptr) along = 0.0f;
        X* row = to + n * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          store(row + d, (g[d] + w * o[d] - along * u[d]) * c);
        }
      }
    });
  });
}

// Columns [C, D] as float32: where they are, or a copy of those in `range`.
template <class X>
FASTSSL_INLINE const float* as_float(const X* columns, Range range, int64_t D, float* copy) {
  if constexpr (std::is_same_v<X, float>) {
    return columns + range.begin * D;
  } else {
    const X* from = columns + range.begin * D;
#pragma omp simd
    for (int64_t i = 0; i < range.size() * D; ++i) copy[i] = load(from + i);
    return copy;
  }
}

// Rows [N, D] against columns [C, D]. The columns are cut into top.size(0) slices, each with a
// softmax of its own: top and sum [slices, N] and, if wanted, weighted [slices, N, D]. A slice and
// a block of rows is one step of work; scratch [tasks, height * width (+ width * D)] holds a tile
// of scores and, unless they are float32, of columns.
void contrastive_stream(Tensor rows, Tensor columns, double factor, int64_t height, int64_t width,
                        Tensor scratch, Tensor top, Tensor sum, std::optional<Tensor> weighted) {
  check_cpu(rows, "rows");
  check_cpu(columns, "columns");
  const int64_t N = rows.size(0), D = rows.size(1), C = columns.size(0), slices = top.size(0);
  const int64_t blocks = (N + height - 1) / height, tasks = scratch.size(0);
  const float* rows_ptr = input<float>(rows);
  float *scratch_ptr = output<float>(scratch), *top_ptr = output<float>(top);
  float* weighted_ptr = weighted ? output<float>(*weighted) : nullptr;
  double* sum_ptr = output<double>(sum);
  const int64_t stride = scratch.size(1);
  with_type(columns.scalar_type(), "columns", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const X* columns_ptr = input<X>(columns);
    parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t task = begin; task < end; ++task) {
        float *tile_ptr = scratch_ptr + task * stride, *copy = tile_ptr + height * width;
        const Range own = part_of(slices * blocks, task, tasks);
        for (int64_t step = own.begin; step < own.end; ++step) {
          const Range r = block_of(N, step % blocks, height);
          const Range slice = part_of(C, step / blocks, slices);
          const int64_t at = step / blocks * N + r.begin;
          float* to = weighted_ptr ? weighted_ptr + at * D : nullptr;
          const Matrix left = matrix(rows_ptr + r.begin * D, r.size(), D);
          for (int64_t c = slice.begin; c < slice.end; c += width) {
            const Range range{c, std::min(slice.end, c + width)};
            const Matrix right = matrix(as_float(columns_ptr, range, D, copy), range.size(), D);
            const Matrix tile = matrix(tile_ptr, r.size(), range.size());
            multiply(tile, left, right.transposed(), 0.0, factor);
            add_rows(tile, top_ptr + at, sum_ptr + at, to, D);
            if (to) multiply(matrix(to, r.size(), D), tile, right, 1.0, 1.0);
          }
        }
      }
    });
  });
}

// The same for negatives [N, M, D] of single rows, read once.
void contrastive_stream_per_row(Tensor rows, Tensor negatives, double factor, Tensor top,
                                Tensor sum, std::optional<Tensor> weighted) {
  check_cpu(rows, "rows");
  check_cpu(negatives, "negatives");
  const int64_t N = rows.size(0), D = rows.size(1), M = negatives.size(1);
  const float *rows_ptr = input<float>(rows), f = float(factor);
  float *top_ptr = output<float>(top), *w_ptr = weighted ? output<float>(*weighted) : nullptr;
  double* sum_ptr = output<double>(sum);
  with_type(negatives.scalar_type(), "negatives", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const X* from = input<X>(negatives);
    parallel(N, grain_rows(M * D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      alignas(64) float s[kNegatives];
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t m = 0; m < M; m += kNegatives) {
          const int64_t count = std::min(kNegatives, M - m);
          const X* block = from + (n * M + m) * D;
          for (int64_t j = 0; j < count; ++j) {
            s[j] = inner_product(rows_ptr + n * D, block + j * D, D) * f;
          }
          float* to = w_ptr ? w_ptr + n * D : nullptr;
          add_rows(matrix(s, 1, count), top_ptr + n, sum_ptr + n, to, D);
          if (!to) continue;
          for (int64_t j = 0; j < count; ++j) {
            const float term = s[j];
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) to[d] += term * load(block + j * D + d);
          }
        }
      }
    });
  });
}

// gradient [C, D] = sum_i 2^(score[i, j] - total[i]) row[i]; scratch [tasks, height * width].
void contrastive_key_gradient(Tensor rows, Tensor columns, double factor, Tensor total,
                              int64_t height, int64_t width, Tensor scratch, Tensor gradient) {
  check_cpu(rows, "rows");
  check_cpu(columns, "columns");
  const int64_t N = rows.size(0), D = rows.size(1), C = columns.size(0);
  const int64_t blocks = (C + width - 1) / width, tasks = scratch.size(0);
  const float *rows_ptr = input<float>(rows), *columns_ptr = input<float>(columns);
  const float* total_ptr = input<float>(total);
  float *scratch_ptr = output<float>(scratch), *to = output<float>(gradient);
  parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t task = begin; task < end; ++task) {
      const Range own = part_of(blocks, task, tasks);
      for (int64_t block = own.begin; block < own.end; ++block) {
        const Range c = block_of(C, block, width);
        const Matrix right = matrix(columns_ptr + c.begin * D, c.size(), D);
        for (int64_t i = 0; i < N; i += height) {
          const int64_t R = std::min(height, N - i);
          const Matrix left = matrix(rows_ptr + i * D, R, D);
          const Matrix tile = matrix(scratch_ptr + task * height * width, R, c.size());
          multiply(tile, left, right.transposed(), 0.0, factor);
          for (int64_t r = 0; r < R; ++r) {
            float* s = tile.data + r * tile.columns;
            const float t = total_ptr[i + r];
#pragma omp simd
            for (int64_t j = 0; j < tile.columns; ++j) s[j] = exp2_fast(s[j] - t);
          }
          const double beta = i ? 1.0 : 0.0;
          multiply(matrix(to + c.begin * D, c.size(), D), tile.transposed(), left, beta, 1.0);
        }
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def("contrastive_normalize(Tensor features, Tensor(a!) unit, Tensor(b!)? inverse) -> ()");
  m.def("contrastive_inner_products(Tensor a, Tensor b, Tensor(a!) products) -> ()");
  m.def(
      "contrastive_project(Tensor gradient, Tensor unit, Tensor? inverse, Tensor? other, "
      "float weight, float scale, Tensor(a!)? products, Tensor(b!) out) -> ()");
  m.def(
      "contrastive_stream(Tensor rows, Tensor columns, float factor, int height, int width, "
      "Tensor(a!) scratch, Tensor(b!) top, Tensor(c!) sum, Tensor(d!)? weighted) -> ()");
  m.def(
      "contrastive_stream_per_row(Tensor rows, Tensor negatives, float factor, Tensor(a!) top, "
      "Tensor(b!) sum, Tensor(c!)? weighted) -> ()");
  m.def(
      "contrastive_key_gradient(Tensor rows, Tensor columns, float factor, Tensor total, "
      "int height, int width, Tensor(a!) scratch, Tensor(b!) gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("contrastive_normalize", TORCH_BOX(&contrastive_normalize));
  m.impl("contrastive_inner_products", TORCH_BOX(&contrastive_inner_products));
  m.impl("contrastive_project", TORCH_BOX(&contrastive_project));
  m.impl("contrastive_stream", TORCH_BOX(&contrastive_stream));
  m.impl("contrastive_stream_per_row", TORCH_BOX(&contrastive_stream_per_row));
  m.impl("contrastive_key_gradient", TORCH_BOX(&contrastive_key_gradient));
}

}  // namespace fastssl
