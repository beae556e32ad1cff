// Column statistics and gradients of losses on covariance matrices; see kernels/common/gram.py.
// N samples, D features; matrices are [N, D], contiguous rows.
#include <algorithm>
#include <cmath>
#include <optional>

#include "simd.h"

namespace fastssl {
namespace {

// Columns that one task holds: rows of a tile are whole cache lines, and its copies stay in L2.
constexpr int64_t kMinWidth = 16;
constexpr int64_t kMaxWidth = 256;
constexpr int64_t kTileElements = 65536;
constexpr int64_t kAhead = 8;
constexpr int64_t kChunk = 16384;
constexpr int64_t kRun = 256;

int64_t tile_width(int64_t N) {
  return std::clamp(kTileElements / N / kMinWidth * kMinWidth, kMinWidth, kMaxWidth);
}

template <class X>
FASTSSL_INLINE void prefetch(const X* x, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < n * int64_t(sizeof(X)); i += 64) __builtin_prefetch(bytes + i);
}

float* pointer(std::optional<Tensor>& tensor) {
  return tensor.has_value() ? output<float>(*tensor) : nullptr;
}

// Columns [0, n) of x, D apart, as float32 rows of n; their means and centered sums of squares.
template <class X>
FASTSSL_INLINE void tile_stats(const X* x, int64_t N, int64_t D, int64_t n, bool known, float* tile,
                               float* mean, float* squares) {
  alignas(64) float sum[kMaxWidth] = {}, rest[kMaxWidth] = {};
  for (int64_t r = 0; r < N; ++r) {
    const X* row = x + r * D;
    float* to = tile + r * n;
    if (r + kAhead < N) prefetch(row + kAhead * D, n);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float value = load(row + j);
      to[j] = value;
      sum[j] += value;
    }
  }
  if (known) return;
  const float inverse = 1.0f / float(N);
  for (int64_t j = 0; j < n; ++j) mean[j] = sum[j] * inverse, sum[j] = 0.0f;
  for (int64_t r = 0; r < N; ++r) {
    const float* row = tile + r * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float d = row[j] - mean[j];
      rest[j] += d;
      sum[j] += d * d;
    }
  }
  // What the rounded mean left over corrects both.
  for (int64_t j = 0; j < n; ++j) {
    mean[j] += rest[j] * inverse;
    squares[j] = std::max(sum[j] - rest[j] * rest[j] * inverse, 0.0f);
  }
}

// How a column is scaled once it is centered: to unit variance, or (eps < 0) not at all.
FASTSSL_INLINE float column_scale(float squares, float count, float eps) {
  return eps < 0.0f ? 1.0f : 1.0f / std::sqrt(squares / count + eps);
}

template <class X>
void columns(const Tensor& z0, const std::optional<Tensor>& z1, bool known, float count, float eps,
             bool differences, Tensor& scratch, Tensor& stats, float* y0, float* y1, float* cross) {
  const int64_t N = z0.size(0), D = z0.size(1), views = z1.has_value() ? 2 : 1;
  const X* from[2] = {input<X>(z0), views == 2 ? input<X>(*z1) : nullptr};
  float* to[2] = {y0, y1};
  float *stats_ptr = output<float>(stats), *tiles = output<float>(scratch);
  const int64_t width = tile_width(N), blocks = (D + width - 1) / width, workers = scratch.size(0);
  parallel(workers, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t w = begin; w < end; ++w) {
      float* tile[2] = {tiles + w * 2 * N * width, tiles + (w * 2 + 1) * N * width};
      for (int64_t i = blocks * w / workers; i < blocks * (w + 1) / workers; ++i) {
        const int64_t k = i * width, n = std::min(width, D - k);
        alignas(64) float scale[2][kMaxWidth], sum[kMaxWidth] = {};
        for (int64_t v = 0; v < views; ++v) {
          float *mean = stats_ptr + 2 * v * D + k, *squares = mean + D;
          tile_stats(from[v] + k, N, D, n, known, tile[v], mean, squares);
          for (int64_t j = 0; j < n; ++j) scale[v][j] = column_scale(squares[j], count, eps);
        }
        if (y0 == nullptr) continue;
        for (int64_t r = 0; r < N; ++r) {
          const float *mean0 = stats_ptr + k, *mean1 = mean0 + 2 * D;
          const float *x0 = tile[0] + r * n, *x1 = tile[1] + r * n;
          float *out0 = to[0] + r * D + k, *out1 = to[1] + r * D + k;
          if (views == 1) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) out0[j] = (x0[j] - mean0[j]) * scale[0][j];
            continue;
          }
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) {
            const float a = (x0[j] - mean0[j]) * scale[0][j];
            const float b = (x1[j] - mean1[j]) * scale[1][j];
            out0[j] = a;
            out1[j] = b;
            sum[j] += differences ? (a - b) * (a - b) : a * b;
          }
        }
        if (views == 2) std::copy(sum, sum + n, cross + k);
      }
    }
  });
}

void gram_columns(Tensor z0, std::optional<Tensor> z1, bool known, int64_t count, double eps,
                  bool differences, Tensor scratch, Tensor stats, std::optional<Tensor> y0,
                  std::optional<Tensor> y1, std::optional<Tensor> cross) {
  check_cpu(z0, "z0");
  if (z1.has_value()) check_cpu(*z1, "z1");
  STD_TORCH_CHECK(scratch.numel() >= scratch.size(0) * 2 * z0.size(0) * tile_width(z0.size(0)),
                  "scratch must hold two tiles per worker");
  float *y0_ptr = pointer(y0), *y1_ptr = pointer(y1), *cross_ptr = pointer(cross);
  with_type(z0.scalar_type(), "z0", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    columns<X>(z0, z1, known, float(count), float(eps), differences, scratch, stats, y0_ptr, y1_ptr,
               cross_ptr);
  });
}

// dots[j] = sum over rows of p * y in columns [0, n).
FASTSSL_INLINE void tile_dots(const float* p, const float* y, int64_t N, int64_t D, int64_t n,
                              float* dots) {
  alignas(64) float sum[kMaxWidth] = {};
  for (int64_t r = 0; r < N; ++r) {
    const float *a = p + r * D, *b = y + r * D;
    if (r + kAhead < N) prefetch(a + kAhead * D, n), prefetch(b + kAhead * D, n);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += a[j] * b[j];
  }
  std::copy(sum, sum + n, dots);
}

void gram_dots(Tensor p, Tensor y, Tensor dots) {
  check_cpu(p, "p");
  check_cpu(y, "y");
  const int64_t N = p.size(0), D = p.size(1), width = tile_width(N);
  const float *p_ptr = input<float>(p), *y_ptr = input<float>(y);
  float* dots_ptr = output<float>(dots);
  parallel((D + width - 1) / width, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t k = begin * width; k < std::min(end * width, D); k += width) {
      tile_dots(p_ptr + k, y_ptr + k, N, D, std::min(width, D - k), dots_ptr + k);
    }
  });
}

template <class X>
void combine(const float* p, const float* y0, const float* y1, const float* factors, float project,
             int64_t N, int64_t D, X* out) {
  const int64_t width = std::min<int64_t>(tile_width(N), 64);
  parallel((D + width - 1) / width, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t k = begin * width; k < std::min(end * width, D); k += width) {
      const int64_t n = std::min(width, D - k);
      alignas(64) float own[kMaxWidth], dots[kMaxWidth];
      const float *fp = factors + k, *f1 = fp + 2 * D, *f = fp + 3 * D;
      std::copy(fp + D, fp + D + n, own);
      if (project != 0.0f) {
        tile_dots(p + k, y0 + k, N, D, n, dots);
        for (int64_t j = 0; j < n; ++j) own[j] -= fp[j] * dots[j] * project;
      }
      for (int64_t r = 0; r < N; ++r) {
        const int64_t at = r * D + k;
        X* to = out + at;
        if (project == 0.0f && r + kAhead < N) {
          prefetch(p + at + kAhead * D, n), prefetch(y0 + at + kAhead * D, n);
        }
        if (y1 == nullptr) {
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) {
            store(to + j, fp[j] * p[at + j] + own[j] * y0[at + j] + f[j]);
          }
          continue;
        }
        if (r + kAhead < N) prefetch(y1 + at + kAhead * D, n);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          store(to + j, fp[j] * p[at + j] + own[j] * y0[at + j] + f1[j] * y1[at + j] + f[j]);
        }
      }
    }
  });
}

void gram_combine(Tensor p, Tensor y0, std::optional<Tensor> y1, Tensor factors, double project,
                  Tensor out) {
  check_cpu(p, "p");
  check_cpu(y0, "y0");
  check_cpu(factors, "factors");
  const float* y1_ptr = y1.has_value() ? input<float>(*y1) : nullptr;
  with_type(out.scalar_type(), "out", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    combine<X>(input<float>(p), input<float>(y0), y1_ptr, input<float>(factors), float(project),
               p.size(0), p.size(1), output<X>(out));
  });
}

// out = sum of a * b, in chunks of fixed size whatever the number of threads.
void gram_dot(Tensor a, Tensor b, Tensor parts, Tensor out) {
  check_cpu(a, "a");
  check_cpu(b, "b");
  const int64_t size = a.numel(), chunks = parts.numel();
  STD_TORCH_CHECK(chunks * kChunk >= size, "parts must hold a sum per chunk");
  const float *a_ptr = input<float>(a), *b_ptr = input<float>(b);
  double* parts_ptr = output<double>(parts);
  parallel(chunks, 4, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = std::min(size, (i + 1) * kChunk);
      double total = 0.0;
      // Runs short enough for float32, added up in float64.
      for (int64_t run = i * kChunk; run < last; run += kRun) {
        const int64_t n = std::min(kRun, last - run);
        const float *x = a_ptr + run, *y = b_ptr + run;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
        total += double(sum);
      }
      parts_ptr[i] = total;
    }
  });
  double total = 0.0;
  for (int64_t i = 0; i < chunks; ++i) total += parts_ptr[i];
  *output<float>(out) = float(total);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "gram_columns(Tensor z0, Tensor? z1, bool known, int count, float eps, bool differences, "
      "Tensor(a!) scratch, Tensor(b!) stats, Tensor(c!)? y0, Tensor(d!)? y1, Tensor(e!)? cross) "
      "-> ()");
  m.def("gram_dots(Tensor p, Tensor y, Tensor(a!) dots) -> ()");
  m.def(
      "gram_combine(Tensor p, Tensor y0, Tensor? y1, Tensor factors, float project, "
      "Tensor(a!) out) -> ()");
  m.def("gram_dot(Tensor a, Tensor b, Tensor(a!) parts, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("gram_columns", TORCH_BOX(&gram_columns));
  m.impl("gram_dots", TORCH_BOX(&gram_dots));
  m.impl("gram_combine", TORCH_BOX(&gram_combine));
  m.impl("gram_dot", TORCH_BOX(&gram_dot));
}

}  // namespace fastssl
