// Sinkhorn-Knopp: the kernels. The formula, and why nothing under- or overflows, is in
// kernels/sinkhorn_knopp/__init__.py; the state (`anchor`, `offset` and `sums`, three vectors of K)
// is that of csrc/cpu/sinkhorn_knopp.cpp. B samples, K prototypes.
//
// An iteration needs a row's sum before the row can count in the column sums. `row_pass_kernel`
// reads the logits once for both: a cluster of blocks holds some whole rows at a time, each block W
// consecutive prototypes of them and each thread always the same columns, in registers; partial row
// sums are exchanged through distributed shared memory while the next rows are on their way, and
// the column sums of all rows of the cluster stay with the threads until its end. Rows that no
// cluster holds take two readings: `row_sums_kernel`, then `column_sums_kernel`.
//
// Every set of rows has its own partial column sums; `merge_kernel` adds them. No sum depends on
// scheduling.
#pragma once

#include "device.cuh"

namespace fastssl::sinkhorn {

constexpr int kThreads = 256;
// A block of row_pass_kernel has twice the threads where prototypes are many.
constexpr int kMaxThreads = 512;
// Logits that a thread of row_pass_kernel holds: of C columns, kHeld / C rows.
constexpr int kHeld = 32;
// Rows that a thread of a column pass reads before it uses the first.
constexpr int kRows = 4;
// Columns of a block of merge_kernel, which shares the parts out among its warps.
constexpr int kMergeColumns = kWarp;
// A row's sum of exponentials is taken for exact in this range; terms below 2^-100 count as 0.
constexpr float kSmallestSum = 0x1p-50f, kLargestSum = 0x1p50f;
// Larger ones are themselves uncertain by more than 2^-4.
constexpr float kLargestTrustedShift = 0x1p20f;
constexpr float kLn2 = 0.693147180559945309f;

struct Problem {
  const void* logits;       // [B, K]
  const int64_t* num_rows;  // [] or null; rows from there on are ignored
  int B, K;                 // below 2^30
  float factor;             // log2(e) / temperature
  float *anchor, *offset;   // [K]; a score is (logit - anchor) * factor + offset
};

// What a pass over rows makes of them. In the last pass log2_mass becomes log_v and there may be an
// assignment; before, there are parts or, with two readings, shifts and scales.
struct RowPass {
  int cluster, W, slices;  // of row_pass_kernel: set i of the rows has groups i, i + slices, ...
  bool is_last;
  float* log2_mass;        // [B], in: a guess; out: the logarithm of the row's sum
  float* parts;            // [slices, K], or null
  float* assignment;       // [B, K], or null
  float *shifts, *scales;  // [B]: a probability is 2^(score - shift) * scale
};

FASTSSL_DEVICE int rows_in_use(const Problem& p) {
  if (!p.num_rows) return p.B;
  const int64_t rows = *p.num_rows;
  return rows < 0 ? 0 : rows > p.B ? p.B : int(rows);
}

// Rounded in one and the same way wherever it is computed, so that no score is above the largest.
FASTSSL_DEVICE float score(float x, float anchor, float factor, float offset) {
  return fmaf(x - anchor, factor, offset);
}

FASTSSL_DEVICE bool is_good_shift(float shift, float sum) {
  return fabsf(shift) < kLargestTrustedShift && sum > kSmallestSum && sum < kLargestSum;
}

template <bool kMax>
FASTSSL_DEVICE float fold(float a, float b) {
  return kMax ? fmaxf(a, b) : a + b;
}

// Of x[0], x[step], ..., in this order.
template <bool kMax>
FASTSSL_DEVICE float fold(const float* x, int count, int step) {
  float value = x[0];
  for (int i = 1; i < count; ++i) value = fold<kMax>(value, x[i * step]);
  return value;
}

template <bool kMax>
FASTSSL_DEVICE float warp_fold(float x) {
  return kMax ? warp_max(x) : warp_sum(x);
}

// The same in every thread; `scratch` holds a number for each warp.
template <bool kMax>
FASTSSL_DEVICE float block_fold(float x, float* scratch) {
  x = warp_fold<kMax>(x);
  block_sync();  // all have read what it held before
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  block_sync();
  return fold<kMax>(scratch, blockDim.x / kWarp, 1);
}

// Whether registers have no room for the column sums of C columns.
FASTSSL_HOST_DEVICE constexpr bool sums_are_shared(int C) { return C > 16; }

// Shared memory of row_pass_kernel. The numbers of a thread's columns are its own, four by four.
struct RowMemory {
  Vector<float, 4>*anchor, *offset;  // [C / 4, threads]
  Vector<float, 4>* sums;            // [C / 4, threads] where they are shared
  float* scratch;                    // [rows, warps]
  float* all;                        // [2, rows, cluster]
  int64_t bytes;

  FASTSSL_HOST_DEVICE RowMemory(char* from, int C, int threads, int cluster) {
    const int64_t rows = kHeld / C, warps = threads / kWarp;
    const int64_t quads = int64_t(C) / 4 * threads;
    anchor = reinterpret_cast<Vector<float, 4>*>(from);
    offset = anchor + quads, sums = offset + quads;
    scratch = reinterpret_cast<float*>(sums_are_shared(C) ? sums + quads : sums);
    all = scratch + rows * warps;
    bytes = reinterpret_cast<char*>(all + 2 * rows * cluster) - from;
  }
};

// A thread's logits of R rows and its columns of them: N vectors, the first one at threadIdx.x * V.
template <class X, int V, int C>
struct Held {
  static constexpr int R = kHeld / C, N = C / V;
  // Whole words: a register for each 16-bit number is more than there are.
  Vector<uint32_t, 4> raw[R][N];
  float guess[R];

  FASTSSL_DEVICE static int column(int i) { return (i * int(blockDim.x) + int(threadIdx.x)) * V; }

  // Rows [b, b + R) as far as there are `rows`, columns [k, k + n).
  FASTSSL_DEVICE void read(const Problem& p, const float* log2_mass, int rows, int b, int k,
                           int n) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (b + r >= rows) break;
      const X* row = static_cast<const X*>(p.logits) + int64_t(b + r) * p.K + k;
      guess[r] = log2_mass[b + r];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (column(i) >= n) break;
        raw[r][i] = load<4>(reinterpret_cast<const uint32_t*>(row + column(i)));
      }
    }
  }

  // Calls use(r, c, score) for every logit that is there; c counts the thread's columns.
  template <class Use>
  FASTSSL_DEVICE void each_score(const Problem& p, const RowMemory& m, int count, int n,
                                 const Use& use) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column(i) >= n) break;
#pragma unroll
      for (int q = 0; q < V / 4; ++q) {
        const int at = (i * (V / 4) + q) * blockDim.x + threadIdx.x;
        const Vector<float, 4> anchor = m.anchor[at], offset = m.offset[at];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (r >= count) break;
          Vector<X, V> x;
          memcpy(&x, &raw[r][i], sizeof(x));
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const float y = score(to_float(x.x[q * 4 + v]), anchor.x[v], p.factor, offset.x[v]);
            use(r, i * V + q * 4 + v, y);
          }
        }
      }
    }
  }
};

// A thread's column sums, four by four.
template <int C>
struct ColumnSums {
  static constexpr bool kShared = sums_are_shared(C);
  float own[kShared ? 1 : C] = {};

  FASTSSL_DEVICE static Vector<float, 4>& shared(const RowMemory& m, int c) {
    return m.sums[c / 4 * int(blockDim.x) + int(threadIdx.x)];
  }

  FASTSSL_DEVICE ColumnSums(const RowMemory& m) {
#pragma unroll
    for (int c = 0; kShared && c < C; c += 4) shared(m, c) = Vector<float, 4>{};
  }

  FASTSSL_DEVICE Vector<float, 4> get(const RowMemory& m, int c) const {
    if constexpr (kShared) {
      return shared(m, c);
    } else {
      return {own[c], own[c + 1], own[c + 2], own[c + 3]};
    }
  }

  FASTSSL_DEVICE void add(const RowMemory& m, const float (&e)[C], float scale) {
#pragma unroll
    for (int c = 0; c < C; c += 4) {
      Vector<float, 4> sums = get(m, c);
#pragma unroll
      for (int v = 0; v < 4; ++v) sums.x[v] = fmaf(e[c + v], scale, sums.x[v]);
      if constexpr (kShared) {
        shared(m, c) = sums;
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v) own[c + v] = sums.x[v];
      }
    }
  }
};

// From each thread's x[R] to the same in all threads of the cluster's blocks. Each block writes to
// all; `turn` alternates, so that nobody writes what another may still be reading.
template <bool kMax, int R>
FASTSSL_DEVICE void exchange(float (&x)[R], const RowMemory& m, int cluster, int cell, int& turn) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    x[r] = warp_fold<kMax>(x[r]);
    if (threadIdx.x % kWarp == 0) m.scratch[r * warps + warp] = x[r];
  }
  block_sync();
  float* all = m.all + turn * R * cluster;
  for (int i = threadIdx.x; i < R * cluster; i += blockDim.x) {
    const int r = i / cluster;
    const float value = fold<kMax>(m.scratch + r * warps, warps, 1);
    in_block(all, i % cluster)[r * cluster + cell] = value;
  }
  if (cluster > 1) {
    cluster_sync();
  } else {
    block_sync();
  }
#pragma unroll
  for (int r = 0; r < R; ++r) x[r] = fold<kMax>(all + r * cluster, cluster, 1);
  turn = 1 - turn;
}

// Exponentials next to shift[r], and their sums over the thread's columns.
template <class X, int V, int C, int R>
FASTSSL_DEVICE void exponentials(const Problem& p, const RowMemory& m, const Held<X, V, C>& held,
                                 int count, int n, const float (&shift)[R], float (&e)[R][C],
                                 float (&sum)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    sum[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) e[r][c] = 0.0f;
  }
  held.each_score(p, m, count, n, [&](int r, int c, float y) {
    e[r][c] = exp2_fast(y - shift[r]);
    sum[r] += e[r][c];
  });
}

// slices * cluster blocks; needs rows in vectors and W <= C * threads. The last pass writes the
// assignment in place of column sums.
template <class X, int V, int C, bool kLast>
__global__ void __launch_bounds__(kMaxThreads) row_pass_kernel(Problem p, RowPass a) {
  using Rows = Held<X, V, C>;
  constexpr int R = Rows::R, N = Rows::N;
  const int cell = blockIdx.x % a.cluster, slice = blockIdx.x / a.cluster;
  const int rows = rows_in_use(p), step = a.slices * R;
  const int k = cell * a.W, n = k >= p.K ? 0 : p.K - k < a.W ? p.K - k : a.W;
  const RowMemory m(shared_memory(), C, blockDim.x, a.cluster);
#pragma unroll
  for (int i = 0; i < C / 4; ++i) {
    const int at = i * blockDim.x + threadIdx.x, j = Rows::column(i / (V / 4)) + i % (V / 4) * 4;
    if (j >= n) break;
    m.anchor[at] = load<4>(p.anchor + k + j), m.offset[at] = load<4>(p.offset + k + j);
  }
  ColumnSums<C> column_sums(m);
  int turn = 0;
  // No block writes to another's shared memory before that has begun.
  if (a.cluster > 1) cluster_sync();
  Rows held;
  held.read(p, a.log2_mass, rows, slice * R, k, n);
  for (int b = slice * R; b < rows; b += step) {
    const int count = rows - b < R ? rows - b : R;
    float e[R][C], sum[R], shift[R];
#pragma unroll
    for (int r = 0; r < R; ++r) shift[r] = r < count ? held.guess[r] : 0.0f;
    exponentials(p, m, held, count, n, shift, e, sum);
    held.read(p, a.log2_mass, rows, b + step, k, n);
    exchange<false>(sum, m, a.cluster, cell, turn);
    bool is_good = true;
#pragma unroll
    for (int r = 0; r < R; ++r) is_good &= r >= count || is_good_shift(shift[r], sum[r]);
    if (!is_good) {
      // All blocks of the cluster see the same sums, so all are here.
      held.read(p, a.log2_mass, rows, b, k, n);
#pragma unroll
      for (int r = 0; r < R; ++r) shift[r] = -FLT_MAX;
      held.each_score(p, m, count, n, [&](int r, int, float y) { shift[r] = fmaxf(shift[r], y); });
      exchange<true>(shift, m, a.cluster, cell, turn);
      exponentials(p, m, held, count, n, shift, e, sum);
      exchange<false>(sum, m, a.cluster, cell, turn);
      held.read(p, a.log2_mass, rows, b + step, k, n);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= count) break;
      const float scale = 1.0f / sum[r];
      if (cell == 0 && threadIdx.x == 0) {
        const float log2_mass = shift[r] + log2f(sum[r]);
        a.log2_mass[b + r] = kLast ? -kLn2 * log2_mass : log2_mass;
      }
      if (kLast) {
        float* to = a.assignment + int64_t(b + r) * p.K + k;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (Rows::column(i) >= n) break;
#pragma unroll
          for (int v = 0; v < V; v += 4) {
            const float* from = e[r] + i * V + v;
            store<4>({from[0] * scale, from[1] * scale, from[2] * scale, from[3] * scale},
                     to + Rows::column(i) + v);
          }
        }
      } else {
        column_sums.add(m, e[r], scale);
      }
    }
  }
  if (kLast) {
    for (int64_t b = rows + slice; b < p.B; b += a.slices) {
      for (int j = threadIdx.x * 4; j < n; j += blockDim.x * 4) {
        store<4>(Vector<float, 4>{}, a.assignment + b * p.K + k + j);
      }
    }
    return;
  }
  float* to = a.parts + int64_t(slice) * p.K + k;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (Rows::column(i) >= n) break;
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      store<4>(column_sums.get(m, i * V + v), to + Rows::column(i) + v);
    }
  }
}

// Calls use(k, score) for the scores of a row that this thread looks at.
template <class X, int V, class Use>
FASTSSL_DEVICE void each_score(const Problem& p, const X* __restrict__ row, const Use& use) {
  for (int k = threadIdx.x * V; k < p.K; k += blockDim.x * V) {
    const Vector<X, V> raw = load<V>(row + k);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      use(k + v, score(to_float(raw.x[v]), p.anchor[k + v], p.factor, p.offset[k + v]));
    }
  }
}

// One block per row; shared memory: a float for each warp.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(Problem p, RowPass a) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t b = blockIdx.x;
  const X* row = static_cast<const X*>(p.logits) + b * p.K;
  float* out = a.assignment ? a.assignment + b * p.K : nullptr;
  if (b >= rows_in_use(p)) {
    for (int k = threadIdx.x; out && k < p.K; k += blockDim.x) out[k] = 0.0f;
    return;
  }
  float shift = a.log2_mass[b], sum = 0.0f;
  each_score<X, V>(p, row, [&](int, float y) { sum += exp2_fast(y - shift); });
  sum = block_fold<false>(sum, scratch);
  if (!is_good_shift(shift, sum)) {
    float top = -FLT_MAX;
    each_score<X, V>(p, row, [&](int, float y) { top = fmaxf(top, y); });
    shift = block_fold<true>(top, scratch), sum = 0.0f;
    each_score<X, V>(p, row, [&](int, float y) { sum += exp2_fast(y - shift); });
    sum = block_fold<false>(sum, scratch);
  }
  const float scale = 1.0f / sum;
  if (threadIdx.x == 0) {
    const float log2_mass = shift + log2f(sum);
    a.log2_mass[b] = a.is_last ? -kLn2 * log2_mass : log2_mass;
    // Two numbers: one, log2_mass, would lose the probabilities' last digits where it is large.
    if (!a.is_last) a.shifts[b] = shift, a.scales[b] = scale;
  }
  if (!out) return;
  each_score<X, V>(p, row, [&](int k, float y) { out[k] = exp2_fast(y - shift) * scale; });
}

// A block of a column pass has V columns for each thread and, of `slices` sets of rows, set i: rows
// [g, g + kRows) for g = i * kRows, (i + slices) * kRows, ... Calls use(count, b, raw) for each.
template <class X, int V, class Use>
FASTSSL_DEVICE void each_rows(const Problem& p, int slice, int slices, int k, const Use& use) {
  const int rows = rows_in_use(p);
  for (int b = slice * kRows; b < rows; b += slices * kRows) {
    const int count = rows - b < kRows ? rows - b : kRows;
    Vector<X, V> raw[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < count) raw[r] = load<V>(static_cast<const X*>(p.logits) + int64_t(b + r) * p.K + k);
    }
    use(count, b, raw);
  }
}

struct ColumnBlock {
  int slice;
  int k;  // the thread's first column

  template <int V>
  FASTSSL_DEVICE static ColumnBlock of(int K) {
    const int width = blockDim.x * V, blocks = (K + width - 1) / width;
    return {int(blockIdx.x / blocks), int(blockIdx.x % blocks * width + threadIdx.x * V)};
  }
};

// Largest logits, and sums of 2^((logit - largest) * factor), of each set of rows: parts
// [2, slices, K]. The sums next to a maximum are exact whatever temperature and logits are.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) columns_kernel(Problem p, int slices, float* parts) {
  const ColumnBlock at = ColumnBlock::of<V>(p.K);
  if (at.k >= p.K) return;
  float top[V], sum[V];
#pragma unroll
  for (int v = 0; v < V; ++v) top[v] = -FLT_MAX, sum[v] = 0.0f;
  each_rows<X, V>(p, at.slice, slices, at.k, [&](int count, int, const Vector<X, V>(&raw)[kRows]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float highest = top[v];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < count) highest = fmaxf(highest, to_float(raw[r].x[v]));
      }
      sum[v] *= exp2_fast((top[v] - highest) * p.factor);
      top[v] = highest;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < count) sum[v] += exp2_fast((to_float(raw[r].x[v]) - highest) * p.factor);
      }
    }
  });
  float* to = parts + int64_t(at.slice) * p.K + at.k;
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = top[v], to[int64_t(slices) * p.K + v] = sum[v];
}

// Column sums of the probabilities of each set of rows: parts [slices, K].
template <class X, int V>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(Problem p, int slices, const float* __restrict__ shifts,
                       const float* __restrict__ scales, float* parts) {
  const ColumnBlock at = ColumnBlock::of<V>(p.K);
  if (at.k >= p.K) return;
  float anchor[V], offset[V], sum[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) anchor[v] = p.anchor[at.k + v], offset[v] = p.offset[at.k + v];
  each_rows<X, V>(
      p, at.slice, slices, at.k, [&](int count, int b, const Vector<X, V>(&raw)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= count) break;
          const float shift = shifts[b + r], scale = scales[b + r];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float y = score(to_float(raw[r].x[v]), anchor[v], p.factor, offset[v]);
            sum[v] = fmaf(exp2_fast(y - shift), scale, sum[v]);
          }
        }
      });
  float* to = parts + int64_t(at.slice) * p.K + at.k;
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = sum[v];
}

// Adds parts [slices, K] to sums [K]. With `top`, of the same shape, the parts are next to these
// maxima, and the largest become `anchor` [K]. Shared memory: [warps, kMergeColumns] floats.
__global__ void __launch_bounds__(kThreads)
    merge_kernel(int slices, int K, float factor, const float* top, const float* parts,
                 float* anchor, float* sums) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  const int k = blockIdx.x * kMergeColumns + lane;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float highest = -FLT_MAX, sum = 0.0f;
  if (top) {
    for (int i = warp; k < K && i < slices; i += warps)
      highest = fmaxf(highest, top[int64_t(i) * K + k]);
    scratch[threadIdx.x] = highest;
    block_sync();
    highest = fold<true>(scratch + lane, warps, kWarp);
    block_sync();
  }
  for (int i = warp; k < K && i < slices; i += warps) {
    const float part = parts[int64_t(i) * K + k];
    sum += top ? part * exp2_fast((top[int64_t(i) * K + k] - highest) * factor) : part;
  }
  scratch[threadIdx.x] = sum;
  block_sync();
  if (warp != 0 || k >= K) return;
  if (top) anchor[k] = highest;
  sums[k] = fold<false>(scratch + lane, warps, kWarp);
}

// Divides the prototypes by their sums. One without mass stays as it is.
__global__ void __launch_bounds__(kThreads) divide_kernel(Problem p, const float* sums) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= p.K) return;
  if (sums[k] > 0.0f) p.offset[k] -= log2f(sums[k]);
  if (p.anchor[k] == -FLT_MAX) p.anchor[k] = 0.0f;
}

}  // namespace fastssl::sinkhorn
