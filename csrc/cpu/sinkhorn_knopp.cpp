// Sinkhorn-Knopp; see kernels/sinkhorn_knopp/__init__.py for the formula and for why nothing under-
// or overflows. B samples, K prototypes.
//
// The state is three vectors of K: `anchor`, each prototype's largest logit, `offset`, and `sums`.
// With factor = log2(e) / temperature, the score of sample b and prototype k is (x - anchor) *
// factor + offset, in units of log 2; a row's probabilities are the softmax of its scores, and
// `sums` are the column sums of the probabilities, over which the next pass divides.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>

#include "pages.h"
#include "ranges.h"
#include "softmax.h"

namespace fastssl {
namespace {

// Prototypes of one tile, and samples of one in the first pass: 32 KB of float32.
constexpr int64_t kBlock = 512;
constexpr int64_t kTileRows = 16;
// A row's sum of exponentials is taken for exact in this range; terms below 2^-100 count as 0.
constexpr float kSmallestSum = 0x1p-50f;
constexpr float kLargestSum = 0x1p50f;
// Larger ones are themselves uncertain by more than 2^-4.
constexpr float kLargestTrustedShift = 0x1p20f;

int64_t rows_in_use(const Tensor& logits, const std::optional<Tensor>& num_rows) {
  const int64_t rows = logits.size(0);
  return num_rows ? std::clamp<int64_t>(*input<int64_t>(*num_rows), 0, rows) : rows;
}

// A tile's rows are short and far apart, which the hardware's prefetchers do not follow.
template <class X>
FASTSSL_INLINE void prefetch(const X* x, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < n * int64_t(sizeof(X)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// Largest logit of columns [0, n) of x and the sum of 2^((logit - largest) * f), rows K apart.
template <class X>
FASTSSL_INLINE void column_tile(const X* x, int64_t K, int64_t rows, int64_t n, float f, float* top,
                                float* sum) {
  alignas(64) float highest[kBlock];
  std::copy(top, top + n, highest);
  for (int64_t r = 0; r < rows; ++r) {
    const X* row = x + r * K;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float value = load(row + j);
      highest[j] = highest[j] > value ? highest[j] : value;
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    sum[j] *= exp2_fast((top[j] - highest[j]) * f);
    top[j] = highest[j];
  }
  for (int64_t r = 0; r < rows; ++r) {
    const X* row = x + r * K;
    prefetch(row + kTileRows * K, n);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += exp2_fast((load(row + j) - highest[j]) * f);
  }
}

// Slice i of the rows fills row i of parts [2, slices, K]: the largest logits, and the sums.
template <class X>
void column_parts(const X* x, int64_t rows, int64_t K, float f, int64_t slices, float* parts) {
  const int64_t blocks = (K + kBlock - 1) / kBlock;
  parallel(slices * blocks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slice = i / blocks, k = i % blocks * kBlock, n = std::min(kBlock, K - k);
      const Range range = part_of(rows, slice, slices);
      float *top = parts + slice * K + k, *sum = top + slices * K;
      std::fill(top, top + n, -FLT_MAX);
      std::fill(sum, sum + n, 0.0f);
      for (int64_t b = range.begin; b < range.end; b += kTileRows) {
        column_tile(x + b * K + k, K, std::min(kTileRows, range.end - b), n, f, top, sum);
      }
    }
  });
}

void sinkhorn_knopp_columns(Tensor logits, std::optional<Tensor> num_rows, double factor,
                            Tensor parts, Tensor anchor, Tensor sums) {
  check_cpu(logits, "logits");
  const int64_t rows = rows_in_use(logits, num_rows), K = logits.size(1), slices = parts.size(1);
  const float f = float(factor);
  float* parts_ptr = output<float>(parts);
  with_type(logits.scalar_type(), "logits", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    column_parts(input<X>(logits), rows, K, f, slices, parts_ptr);
  });
  float *anchor_ptr = output<float>(anchor), *sums_ptr = output<float>(sums);
  parallel(K, kGrain, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    std::fill(anchor_ptr + begin, anchor_ptr + end, -FLT_MAX);
    std::fill(sums_ptr + begin, sums_ptr + end, 0.0f);
    for (int64_t i = 0; i < slices; ++i) {
      const float* top = parts_ptr + i * K;
      for (int64_t k = begin; k < end; ++k) anchor_ptr[k] = std::max(anchor_ptr[k], top[k]);
    }
    for (int64_t i = 0; i < slices; ++i) {
      const float *top = parts_ptr + i * K, *sum = top + slices * K;
#pragma omp simd
      for (int64_t k = begin; k < end; ++k) {
        sums_ptr[k] += sum[k] * exp2_fast((top[k] - anchor_ptr[k]) * f);
      }
    }
  });
}

// Moves sums from one anchor to another, which is at least as large.
void sinkhorn_knopp_move(Tensor from, Tensor to, double factor, Tensor sums) {
  const float *from_ptr = input<float>(from), *to_ptr = input<float>(to);
  float* sums_ptr = output<float>(sums);
  const float f = float(factor);
  parallel(sums.numel(), kGrain, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t k = begin; k < end; ++k) sums_ptr[k] *= exp2_fast((from_ptr[k] - to_ptr[k]) * f);
  });
}

// Divides the prototypes by their sums. One without mass stays as it is.
void divide(float* anchor, float* offset, const float* sums, int64_t K) {
  parallel(K, kGrain, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t k = begin; k < end; ++k) {
      if (sums[k] > 0.0f) offset[k] -= std::log2(sums[k]);
      if (anchor[k] == -FLT_MAX) anchor[k] = 0.0f;
    }
  });
}

template <class X>
struct Scores {
  const X* x;
  const float *anchor, *offset;  // [K]
  float f;
};

// Rounded in one and the same way wherever it is computed, so that no score is above the largest.
FASTSSL_INLINE float score(float x, float anchor, float f, float offset) {
  return (x - anchor) * f + offset;
}

// Sum of 2^(score - shift) over prototypes [k, k + n) of the row that begins at `row`; the terms go
// to `e` where wanted.
template <bool kKeep, class X>
FASTSSL_INLINE float exponentials(const Scores<X>& scores, int64_t row, int64_t k, int64_t n,
                                  float shift, float* e) {
  const X* x = scores.x + row + k;
  const float *anchor = scores.anchor + k, *offset = scores.offset + k, f = scores.f;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const float term = exp2_fast(score(load(x + j), anchor[j], f, offset[j]) - shift);
    if (kKeep) e[j] = term;
    sum += term;
  }
  return sum;
}

template <class X>
FASTSSL_INLINE float largest_score(const Scores<X>& scores, int64_t row, int64_t K) {
  const X* x = scores.x + row;
  const float *anchor = scores.anchor, *offset = scores.offset, f = scores.f;
  float top = -FLT_MAX;
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < K; ++k) {
    const float value = score(load(x + k), anchor[k], f, offset[k]);
    top = top > value ? top : value;
  }
  return top;
}

// From the second iteration on, the log-sum of the iteration before is within log2(max(B, K)) of
// the truth, where its own rounding is small; in the first iteration it is 0, which is too large or
// good.
FASTSSL_INLINE bool is_good_shift(float shift, double sum) {
  return std::fabs(shift) < kLargestTrustedShift && sum > kSmallestSum && sum < kLargestSum;
}

// For `rows` rows from b on: exponentials to e [rows, K] where wanted, their sums to `sum`;
// log2_mass [B] comes in as a guess of each row's log-sum and goes out exact.
template <bool kKeep, class X>
FASTSSL_INLINE void row_group(const Scores<X>& scores, int64_t K, int64_t b, int64_t rows,
                              float* log2_mass, float* e, double* sum) {
  std::fill(sum, sum + rows, 0.0);
  for (int64_t k = 0; k < K; k += kBlock) {
    const int64_t n = std::min(kBlock, K - k);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = kKeep ? e + r * K + k : nullptr;
      prefetch(scores.x + (r + 1 < rows ? (b + r + 1) * K + k : b * K + k + n), n);
      sum[r] += exponentials<kKeep>(scores, (b + r) * K, k, n, log2_mass[b + r], to);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (!is_good_shift(log2_mass[b + r], sum[r])) {
      log2_mass[b + r] = largest_score(scores, (b + r) * K, K);
      float* to = kKeep ? e + r * K : nullptr;
      sum[r] = exponentials<kKeep>(scores, (b + r) * K, 0, K, log2_mass[b + r], to);
    }
    log2_mass[b + r] += float(std::log2(sum[r]));
  }
}

// to [K] (+)= the rows of e [N, K], divided by their sums.
template <int N>
FASTSSL_INLINE void add_rows(const float* e, const double* sum, int64_t K, bool first, float* to) {
  float scale[N];
  for (int r = 0; r < N; ++r) scale[r] = float(1.0 / sum[r]);
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    float total = first ? 0.0f : to[k];
    for (int r = 0; r < N; ++r) total += e[r * K + k] * scale[r];
    to[k] = total;
  }
}

constexpr int64_t kMaxGroup = 4;

FASTSSL_INLINE void add_rows(const float* e, const double* sum, int64_t rows, int64_t K, bool first,
                             float* to) {
  switch (rows) {
    case 1:
      return add_rows<1>(e, sum, K, first, to);
    case 2:
      return add_rows<2>(e, sum, K, first, to);
    case 3:
      return add_rows<3>(e, sum, K, first, to);
    default:
      return add_rows<4>(e, sum, K, first, to);
  }
}

template <class X>
void iterate(const Scores<X>& scores, int64_t rows, int64_t K, int64_t chunks, int64_t group,
             int64_t tasks, float* log2_mass, float* scratch, float* parts) {
  parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t task = begin; task < end; ++task) {
      float* e = scratch + task * group * K;
      const Range own = part_of(chunks, task, tasks);
      for (int64_t chunk = own.begin; chunk < own.end; ++chunk) {
        const Range range = part_of(rows, chunk, chunks);
        float* part = parts + chunk * K;
        if (range.begin == range.end) std::fill(part, part + K, 0.0f);
        for (int64_t b = range.begin; b < range.end; b += group) {
          const int64_t count = std::min(group, range.end - b);
          double sum[kMaxGroup];
          row_group<true>(scores, K, b, count, log2_mass, e, sum);
          add_rows(e, sum, count, K, b == range.begin, part);
        }
      }
    }
  });
}

void sinkhorn_knopp_iterate(Tensor logits, std::optional<Tensor> num_rows, double factor,
                            Tensor anchor, Tensor offset, Tensor log2_mass, Tensor scratch,
                            Tensor parts, Tensor sums) {
  check_cpu(logits, "logits");
  const int64_t rows = rows_in_use(logits, num_rows), K = logits.size(1);
  const int64_t chunks = parts.size(0), tasks = scratch.size(0), group = scratch.size(1);
  STD_TORCH_CHECK(group <= kMaxGroup, "scratch holds too many rows per task");
  float *anchor_ptr = output<float>(anchor), *offset_ptr = output<float>(offset);
  float *parts_ptr = output<float>(parts), *sums_ptr = output<float>(sums);
  divide(anchor_ptr, offset_ptr, sums_ptr, K);
  with_type(logits.scalar_type(), "logits", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const Scores<X> scores{input<X>(logits), anchor_ptr, offset_ptr, float(factor)};
    iterate(scores, rows, K, chunks, group, tasks, output<float>(log2_mass), output<float>(scratch),
            parts_ptr);
  });
  parallel(K, kGrain / 8, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    std::fill(sums_ptr + begin, sums_ptr + end, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* part = parts_ptr + chunk * K;
      for (int64_t k = begin; k < end; ++k) sums_ptr[k] += part[k];
    }
  });
}

// The last pass over the samples: the assignment where wanted, log_v in place of log2_mass, log_u.
template <class X>
void assign(const Scores<X>& scores, int64_t B, int64_t rows, int64_t K, float* log_v, float* out) {
  parallel(B, grain_rows(K), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t b = begin; b < end; ++b) {
      float* to = out ? out + b * K : nullptr;
      if (b >= rows) {
        if (to) std::fill(to, to + K, 0.0f);
        log_v[b] = 0.0f;
        continue;
      }
      double sum;
      if (to) {
        row_group<true>(scores, K, b, 1, log_v, to, &sum);
        const float scale = float(1.0 / sum);
        for (int64_t k = 0; k < K; ++k) to[k] *= scale;
      } else {
        row_group<false>(scores, K, b, 1, log_v, nullptr, &sum);
      }
      log_v[b] *= -float(kLn2);
    }
  });
}

void sinkhorn_knopp_assign(Tensor logits, std::optional<Tensor> num_rows, double factor,
                           Tensor anchor, Tensor offset, Tensor sums, Tensor log_u, Tensor log_v,
                           std::optional<Tensor> assignment) {
  check_cpu(logits, "logits");
  const int64_t rows = rows_in_use(logits, num_rows), B = logits.size(0), K = logits.size(1);
  const float f = float(factor);
  float *anchor_ptr = output<float>(anchor), *offset_ptr = output<float>(offset);
  divide(anchor_ptr, offset_ptr, input<float>(sums), K);
  float* out = assignment ? static_cast<float*>(assignment->mutable_data_ptr()) : nullptr;
  if (out) prefer_huge_pages(out, B * K * int64_t(sizeof(float)));
  with_type(logits.scalar_type(), "logits", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const Scores<X> scores{input<X>(logits), anchor_ptr, offset_ptr, f};
    assign(scores, B, rows, K, output<float>(log_v), out);
  });
  float* log_u_ptr = output<float>(log_u);
  for (int64_t k = 0; k < K; ++k) {
    log_u_ptr[k] = float(kLn2 * (double(offset_ptr[k]) - double(anchor_ptr[k]) * factor));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "sinkhorn_knopp_columns(Tensor logits, Tensor? num_rows, float factor, Tensor(a!) parts, "
      "Tensor(b!) anchor, Tensor(c!) sums) -> ()");
  m.def("sinkhorn_knopp_move(Tensor old, Tensor to, float factor, Tensor(a!) sums) -> ()");
  m.def(
      "sinkhorn_knopp_iterate(Tensor logits, Tensor? num_rows, float factor, Tensor(a!) anchor, "
      "Tensor(b!) offset, Tensor(c!) log2_mass, Tensor(d!) scratch, Tensor(e!) parts, "
      "Tensor(f!) sums) -> ()");
  m.def(
      "sinkhorn_knopp_assign(Tensor logits, Tensor? num_rows, float factor, Tensor(a!) anchor, "
      "Tensor(b!) offset, Tensor sums, Tensor(c!) log_u, Tensor(d!) log_v, "
      "Tensor(e!)? assignment) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("sinkhorn_knopp_columns", TORCH_BOX(&sinkhorn_knopp_columns));
  m.impl("sinkhorn_knopp_move", TORCH_BOX(&sinkhorn_knopp_move));
  m.impl("sinkhorn_knopp_iterate", TORCH_BOX(&sinkhorn_knopp_iterate));
  m.impl("sinkhorn_knopp_assign", TORCH_BOX(&sinkhorn_knopp_assign));
}

}  // namespace fastssl
