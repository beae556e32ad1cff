// Cross-entropy between teacher and student views: the kernels. The formula is in
// kernels/dino_cross_entropy/__init__.py, the layout of `parts` below. S student views, T teacher
// views, B images, K prototypes, C chunks of prototypes; scores are logits over temperature, in
// units of log 2.
//
// A block works on W consecutive prototypes of all views of an image, which it holds in shared
// memory. Threads own columns there, so only maxima and sums are exchanged. With kFused the blocks
// of a cluster hold all prototypes of an image: they exchange their parts through distributed
// shared memory and go on to the gradient, so that every logit is read once. Without it the parts
// go to memory, `combine_kernel` makes statistics of them, and `gradient_kernel` reads the logits
// again. No sum depends on scheduling.
#pragma once

#include "device.cuh"

namespace fastssl {

constexpr int kThreads = 256;
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
// Vectors that a thread reads before it uses the first.
constexpr int kInFlight = 4;

struct Problem {
  const void *student, *teacher;  // [S, B, K], [T, B, K] of one dtype
  const float* temps;       // [2] in place of the two numbers below, or null, as all that follow
  const float* center;      // [K]
  const float* log_u;       // [K] or [T, K]
  const float* log_v;       // [T, B]
  const float* weights;     // [B]
  const int64_t* num_rows;  // []; images from there on are ignored
  const float *student_scale, *teacher_scale;  // [K], times the logits, with kScaled
  int64_t B, K, log_u_stride;
  int S, T;
  double student_temp, teacher_temp;
  bool skip_same_view, mean;
};

// The rows of `parts` [B, width, C], one column per cell: (max, sum of e) of each student view;
// (max, sum of e, sum of e * (score - max)) of each teacher view; for every pair, the sum of the
// teacher's e times the student's (score - max). e is 2^(score - max), and max that of the cell.
struct Layout {
  int S, T;
  FASTSSL_HOST_DEVICE int width() const { return 2 * S + 3 * T + S * T; }
  FASTSSL_HOST_DEVICE int student(int s) const { return 2 * s; }
  FASTSSL_HOST_DEVICE int teacher(int t) const { return 2 * S + 3 * t; }
  FASTSSL_HOST_DEVICE int pair(int s, int t) const { return 2 * S + 3 * T + s * T + t; }
  FASTSSL_HOST_DEVICE bool is_max(int row) const {
    return row < 2 * S ? row % 2 == 0 : row < 2 * S + 3 * T && (row - 2 * S) % 3 == 0;
  }
};

// A view pass: `cells` blocks of W prototypes (a multiple of the vector) for each of `slices` sets
// of images, of which set i holds i, i + slices, ...
struct Pass {
  int cells, W, slices;
  int columns;   // of parts, of which the first cell's comes first
  float* parts;  // [B, width, columns], unless fused
  float* sums;   // [slices, K], the teacher's logits summed over the set's images; may be null
  // Of the fused pass.
  float *student_stats, *teacher_stats;  // [S, B, 2], [T, B, 2]
  float* per_image;                      // [B, 2], loss and entropy
  void* dstudent;                        // [S, B, K], for dloss = 1
};

// Shared memory of a view pass.
template <class X>
struct Memory {
  double* doubles;                       // [S + 2 T], then one for each warp
  float* e;                              // [T, W]
  X* student;                            // [S, W]
  float* sums;                           // [W] where wanted
  float* scratch;                        // [width, warps]
  float* part;                           // [width]
  float* all;                            // [width, cells]
  float *student_stats, *teacher_stats;  // [S, 2], [T, 2]
  int64_t bytes;

  FASTSSL_HOST_DEVICE Memory(char* from, int S, int T, const Pass& a, int warps, bool fused) {
    const int64_t width = Layout{S, T}.width();
    char* at = from;
    e = take<float>(at, int64_t(T) * a.W);
    student = take<X>(at, int64_t(S) * a.W);
    sums = take<float>(at, a.sums ? a.W : 0);
    doubles = take<double>(at, S + 2 * T + warps);
    scratch = take<float>(at, width * warps);
    part = take<float>(at, width);
    all = take<float>(at, fused ? width * a.cells : 0);
    student_stats = take<float>(at, fused ? 2 * S : 0);
    teacher_stats = take<float>(at, fused ? 2 * T : 0);
    bytes = at - from;
  }

 private:
  template <class Y>
  FASTSSL_HOST_DEVICE static Y* take(char*& at, int64_t count) {
    Y* taken = reinterpret_cast<Y*>(at);
    at += (count * int64_t(sizeof(Y)) + 15) / 16 * 16;
    return taken;
  }
};

struct Factors {
  float student, teacher;  // log2(e) / temperature
  double student_temp;
};

FASTSSL_DEVICE Factors factors_of(const Problem& p) {
  const double student = p.temps ? double(p.temps[0]) : p.student_temp;
  const double teacher = p.temps ? double(p.temps[1]) : p.teacher_temp;
  return {float(1.0 / (kLn2 * student)), float(1.0 / (kLn2 * teacher)), student};
}

FASTSSL_DEVICE int64_t rows_in_use(const Problem& p) {
  if (!p.num_rows) return p.B;
  const int64_t rows = *p.num_rows;
  return rows < 0 ? 0 : rows > p.B ? p.B : rows;
}

template <bool kScaled>
FASTSSL_DEVICE float scaled(float x, const float* scale, int64_t k) {
  return kScaled ? multiply(x, scale[k]) : x;
}

FASTSSL_DEVICE float teacher_score(const Problem& p, float x, int t, int64_t k, float f) {
  if (p.center) return multiply(x - p.center[k], f);
  if (p.log_u) return fmaf(x, f, multiply(p.log_u[t * p.log_u_stride + k], kLog2e));
  return multiply(x, f);
}

// Columns [0, n) of the block's W: reads the logits of N rows, `stride` apart, and gives each
// column of each to `use(i, column, x)`.
template <int V, int N, class X, class Use>
FASTSSL_DEVICE void read_rows(const X* __restrict__ from, int64_t stride, int count, int n,
                              const Use& use) {
  for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) {
    Vector<X, V> raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) raw[i] = load<V>(from + i * stride + j);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) use(i, j, raw[i]);
    }
  }
}

// Reads all views of an image into shared memory, the teacher's as scores; the views' largest
// logits and scores go to the warps' scratch.
template <class X, int V, bool kScaled>
FASTSSL_DEVICE void read_image(const Problem& p, const Pass& a, const Memory<X>& m,
                               const Factors& f, int64_t b, int64_t k, int n) {
  const Layout at{p.S, p.T};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const X* teacher = static_cast<const X*>(p.teacher) + b * p.K + k;
  const X* student = static_cast<const X*>(p.student) + b * p.K + k;
  for (int t = 0; t < p.T; ++t) {
    float top = -FLT_MAX;
    read_rows<V, 1>(teacher + t * p.B * p.K, 0, 1, n, [&](int, int j, const Vector<X, V>& raw) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = scaled<kScaled>(to_float(raw.x[v]), p.teacher_scale, k + j + v);
        const float score = teacher_score(p, x, t, k + j + v, f.teacher);
        if (a.sums) m.sums[j + v] += x;
        m.e[t * a.W + j + v] = score;
        top = fmaxf(top, score);
      }
    });
    top = warp_max(top);
    if (lane == 0) m.scratch[at.teacher(t) * warps + warp] = top;
  }
  for (int s = 0; s < p.S; s += kInFlight) {
    float top[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) top[i] = -FLT_MAX;
    read_rows<V, kInFlight>(
        student + s * p.B * p.K, p.B * p.K, p.S - s, n, [&](int i, int j, const Vector<X, V>& raw) {
          store<V>(raw, m.student + (s + i) * a.W + j);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float x = to_float(raw.x[v]);
            top[i] = fmaxf(top[i], scaled<kScaled>(x, p.student_scale, k + j + v));
          }
        });
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (s + i >= p.S) continue;
      const float largest = warp_max(top[i]);
      if (lane == 0) m.scratch[at.student(s + i) * warps + warp] = largest;
    }
  }
}

FASTSSL_DEVICE float largest_of(const float* x, int n) {
  float top = x[0];
  for (int i = 1; i < n; ++i) top = fmaxf(top, x[i]);
  return top;
}

// Replaces the teacher's scores by e; the warps' sums go to their scratch.
template <class X>
FASTSSL_DEVICE void teacher_parts(const Problem& p, const Pass& a, const Memory<X>& m, int n,
                                  int V) {
  const Layout at{p.S, p.T};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int t = 0; t < p.T; ++t) {
    float* row = m.e + t * a.W;
    const float top = largest_of(m.scratch + at.teacher(t) * warps, warps);
    float sum = 0.0f, weighted = 0.0f;
    for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) {
#pragma unroll 4
      for (int v = 0; v < V; ++v) {
        const float y = row[j + v] - top, e = exp2_fast(y);
        sum += e;
        weighted = fmaf(e, y, weighted);
        row[j + v] = e;
      }
    }
    sum = warp_sum(sum), weighted = warp_sum(weighted);
    if (lane == 0) {
      m.scratch[(at.teacher(t) + 1) * warps + warp] = sum;
      m.scratch[(at.teacher(t) + 2) * warps + warp] = weighted;
    }
  }
}

// A student view's sum of e and its products with the teacher views, two of which ride along.
template <class X, int V, bool kScaled>
FASTSSL_DEVICE void student_parts(const Problem& p, const Pass& a, const Memory<X>& m,
                                  const Factors& f, int64_t k, int n) {
  const Layout at{p.S, p.T};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int s = 0; s < p.S; ++s) {
    const float top = multiply(largest_of(m.scratch + at.student(s) * warps, warps), f.student);
    for (int t = 0; t < p.T; t += 2) {
      const float* e0 = m.e + t * a.W;
      const float* e1 = t + 1 < p.T ? e0 + a.W : e0;
      float sum = 0.0f, first = 0.0f, second = 0.0f;
      for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) {
        const Vector<X, V> raw = load<V>(m.student + s * a.W + j);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float x = scaled<kScaled>(to_float(raw.x[v]), p.student_scale, k + j + v);
          const float y = fmaf(x, f.student, -top);
          if (t == 0) sum += exp2_fast(y);
          first = fmaf(e0[j + v], y, first);
          second = fmaf(e1[j + v], y, second);
        }
      }
      if (t == 0) sum = warp_sum(sum);
      first = warp_sum(first), second = warp_sum(second);
      if (lane != 0) continue;
      if (t == 0) m.scratch[(at.student(s) + 1) * warps + warp] = sum;
      m.scratch[at.pair(s, t) * warps + warp] = first;
      if (t + 1 < p.T) m.scratch[at.pair(s, t + 1) * warps + warp] = second;
    }
  }
}

// From the warps' scratch to the block's column of `parts`.
FASTSSL_DEVICE void block_parts(const Problem& p, const Factors& f, const float* scratch,
                                float* part, int64_t stride) {
  const Layout at{p.S, p.T};
  const int warps = blockDim.x / kWarp;
  for (int row = threadIdx.x; row < at.width(); row += blockDim.x) {
    const float* x = scratch + row * warps;
    float value = x[0];
    if (at.is_max(row)) {
      value = largest_of(x, warps);
      // A block without a column has -FLT_MAX, which must stay finite: its sums are zeros.
      if (row < 2 * p.S) value = fmaxf(multiply(value, f.student), -FLT_MAX);
    } else {
      for (int w = 1; w < warps; ++w) value += x[w];
    }
    part[row * stride] = value;
  }
}

// From an image's parts to its loss, summed over pairs, and to what makes probabilities of scores:
// a view's stats are (max, factor) with p = factor * 2^(score - max). The student's factor includes
// the mass of the teacher views that count for it. Views are `stride` apart in stats.
FASTSSL_DEVICE void combine_image(const Problem& p, const float* parts, int C, int64_t b,
                                  double* doubles, float* student_stats, float* teacher_stats,
                                  int64_t stride, float* per_image) {
  const Layout at{p.S, p.T};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  double *losses = doubles, *mass = losses + p.S, *entropies = mass + p.T;
  for (int t = warp; t < p.T; t += warps) {
    const float *max = parts + int64_t(at.teacher(t)) * C, *sum = max + C, *weighted = sum + C;
    float top = -FLT_MAX;
    for (int c = lane; c < C; c += kWarp) top = fmaxf(top, max[c]);
    top = warp_max(top);
    double z = 0.0, below = 0.0;
    for (int c = lane; c < C; c += kWarp) {
      const float lower = max[c] - top, e = exp2_fast(lower);
      z += double(e * sum[c]);
      below += double(e * (weighted[c] + lower * sum[c]));
    }
    z = warp_sum(z), below = warp_sum(below);
    if (lane != 0) continue;
    const double factor =
        p.log_v ? exp2(double(top) + double(p.log_v[t * p.B + b]) / kLn2) : 1.0 / z;
    mass[t] = factor * z;
    entropies[t] = log(z) - kLn2 * below / z;
    teacher_stats[t * stride] = top, teacher_stats[t * stride + 1] = float(factor);
  }
  block_sync();
  for (int s = warp; s < p.S; s += warps) {
    const float *max = parts + int64_t(at.student(s)) * C, *sum = max + C;
    float top = -FLT_MAX;
    for (int c = lane; c < C; c += kWarp) top = fmaxf(top, max[c]);
    top = warp_max(top);
    double z = 0.0, cross = 0.0, counted = 0.0;
    for (int c = lane; c < C; c += kWarp) z += double(exp2_fast(max[c] - top) * sum[c]);
    for (int t = 0; t < p.T; ++t) {
      if (p.skip_same_view && s == t) continue;
      const float* teacher = parts + int64_t(at.teacher(t)) * C;
      const float* pair = parts + int64_t(at.pair(s, t)) * C;
      const float teacher_top = teacher_stats[t * stride], factor = teacher_stats[t * stride + 1];
      counted += mass[t];
      // No term is positive, so nothing cancels, whatever the logits.
      for (int c = lane; c < C; c += kWarp) {
        const float scale = exp2_fast(teacher[c] - teacher_top) * factor;
        cross += double(scale * (pair[c] + (max[c] - top) * teacher[C + c]));
      }
    }
    z = warp_sum(z), cross = warp_sum(cross);
    if (lane != 0) continue;
    losses[s] = kLn2 * (counted * log2(z) - cross);
    student_stats[s * stride] = top, student_stats[s * stride + 1] = float(counted / z);
  }
  block_sync();
  if (threadIdx.x != 0 || !per_image) return;
  double loss = 0.0, entropy = 0.0;
  for (int s = 0; s < p.S; ++s) loss += losses[s];
  for (int t = 0; t < p.T; ++t) entropy += entropies[t];
  per_image[0] = float(loss), per_image[1] = float(entropy);
}

// Merges the first C columns of an image's parts, whose rows are `stride` apart, into the first.
FASTSSL_DEVICE void collapse_image(int S, int T, float* parts, int64_t stride, int C) {
  const Layout at{S, T};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const auto largest = [&](const float* max) {
    float top = -FLT_MAX;
    for (int c = lane; c < C; c += kWarp) top = fmaxf(top, max[c]);
    return warp_max(top);
  };
  for (int t = warp; t < T; t += warps) {
    float *max = parts + at.teacher(t) * stride, *sum = max + stride, *weighted = sum + stride;
    const float top = largest(max);
    double z = 0.0, below = 0.0;
    for (int c = lane; c < C; c += kWarp) {
      const float lower = max[c] - top, e = exp2_fast(lower);
      z += double(e * sum[c]);
      below += double(e * (weighted[c] + lower * sum[c]));
    }
    z = warp_sum(z), below = warp_sum(below);
    for (int s = 0; s < S; ++s) {
      const float* student = parts + at.student(s) * stride;
      float* pair = parts + at.pair(s, t) * stride;
      const float student_top = largest(student);
      double cross = 0.0;
      for (int c = lane; c < C; c += kWarp) {
        cross += double(exp2_fast(max[c] - top) * (pair[c] + (student[c] - student_top) * sum[c]));
      }
      cross = warp_sum(cross);
      if (lane == 0) pair[0] = float(cross);
    }
    if (lane == 0) max[0] = top, sum[0] = float(z), weighted[0] = float(below);
  }
  // The pairs needed the students' maxima.
  block_sync();
  for (int s = warp; s < S; s += warps) {
    float *max = parts + at.student(s) * stride, *sum = max + stride;
    const float top = largest(max);
    double z = 0.0;
    for (int c = lane; c < C; c += kWarp) z += double(exp2_fast(max[c] - top) * sum[c]);
    z = warp_sum(z);
    if (lane == 0) max[0] = top, sum[0] = float(z);
  }
}

// What the weighted sum over pairs and images is multiplied by.
FASTSSL_DEVICE double norm_of(const Problem& p, int64_t rows, double* scratch) {
  if (!p.mean) return 1.0;
  double total = double(rows);
  if (p.weights) {
    total = 0.0;
    for (int64_t b = threadIdx.x; b < rows; b += blockDim.x) total += double(p.weights[b]);
    total = block_sum(total, scratch);
  }
  const int same = p.skip_same_view ? (p.S < p.T ? p.S : p.T) : 0;
  return total != 0.0 ? 1.0 / (total * double(p.S * p.T - same)) : 0.0;
}

template <class X, int V>
FASTSSL_DEVICE void zero_gradient(const Problem& p, X* dstudent, int64_t b, int64_t k, int n) {
  Vector<X, V> zeros;
#pragma unroll
  for (int v = 0; v < V; ++v) convert(0.0f, &zeros.x[v]);
  for (int s = 0; s < p.S; ++s) {
    X* to = dstudent + (s * p.B + b) * p.K + k;
    for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) store<V>(zeros, to + j);
  }
}

// The student's gradient in a block's columns. `student` and its views `student_stride` apart are
// those of column 0; e [T, W] holds the teacher's probabilities; `gain` is all that multiplies.
template <class X, int V, bool kScaled>
FASTSSL_DEVICE void write_gradient(const Problem& p, const X* student, int64_t student_stride,
                                   const float* e, int W, const float* student_stats,
                                   int64_t stats_stride, const Factors& f, float gain, int64_t b,
                                   int64_t k, int n, X* dstudent) {
  for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) {
    float target[V] = {};
    for (int s = 0; s < p.S; ++s) {
      // The sum over teacher views stays the same once there is no same view to leave out.
      if (s == 0 || (p.skip_same_view && s <= p.T)) {
#pragma unroll
        for (int v = 0; v < V; ++v) target[v] = 0.0f;
        for (int t = 0; t < p.T; ++t) {
          if (p.skip_same_view && s == t) continue;
          const Vector<float, V == 1 ? 1 : 4>* row =
              reinterpret_cast<const Vector<float, V == 1 ? 1 : 4>*>(e + t * W + j);
#pragma unroll
          for (int v = 0; v < V; ++v) target[v] += row[v / 4].x[v % 4];
        }
      }
      const Vector<X, V> raw = load<V>(student + s * student_stride + j);
      const float top = student_stats[s * stats_stride];
      const float factor = student_stats[s * stats_stride + 1];
      Vector<X, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = scaled<kScaled>(to_float(raw.x[v]), p.student_scale, k + j + v);
        const float q = exp2_fast(fmaf(x, f.student, -top)) * factor;
        convert(scaled<kScaled>((q - target[v]) * gain, p.student_scale, k + j + v), &out.x[v]);
      }
      store<V>(out, dstudent + (s * p.B + b) * p.K + k + j);
    }
  }
}

// The fused pass from the block's part on: statistics, then the gradient of the block's columns.
template <class X, int V>
FASTSSL_DEVICE void finish_image(const Problem& p, const Pass& a, const Memory<X>& m,
                                 const Factors& f, double norm, int64_t b, int cell, int64_t k,
                                 int n) {
  const Layout at{p.S, p.T};
  cluster_sync();
  for (int i = threadIdx.x; i < at.width() * a.cells; i += blockDim.x) {
    const int row = i / a.cells, from = i % a.cells;
    m.all[i] = in_block(m.part, from)[row];
  }
  // Before any block leaves or writes its next part.
  cluster_sync();
  combine_image(p, m.all, a.cells, b, m.doubles, m.student_stats, m.teacher_stats, 2,
                cell == 0 ? a.per_image + 2 * b : nullptr);
  if (cell == 0) {
    for (int i = threadIdx.x; i < 2 * (p.S + p.T); i += blockDim.x) {
      const int view = i / 2, t = view - p.S;
      if (t < 0) {
        a.student_stats[2 * (view * p.B + b) + i % 2] = m.student_stats[i];
      } else {
        a.teacher_stats[2 * (t * p.B + b) + i % 2] = m.teacher_stats[i - 2 * p.S];
      }
    }
  }
  X* dstudent = static_cast<X*>(a.dstudent);
  const float weight = p.weights ? p.weights[b] : 1.0f;
  const float gain = float(norm / f.student_temp) * weight;
  if (gain == 0.0f) return zero_gradient<X, V>(p, dstudent, b, k, n);
  for (int t = 0; t < p.T; ++t) {
    const float scale =
        exp2_fast(m.part[at.teacher(t)] - m.teacher_stats[2 * t]) * m.teacher_stats[2 * t + 1];
    for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) {
#pragma unroll
      for (int v = 0; v < V; ++v) m.e[t * a.W + j + v] *= scale;
    }
  }
  write_gradient<X, V, false>(p, m.student, a.W, m.e, a.W, m.student_stats, 2, f, gain, b, k, n,
                              dstudent);
}

template <class X, int V, bool kFused, bool kScaled>
__global__ void __launch_bounds__(kThreads, 2) view_pass_kernel(Problem p, Pass a) {
  const int cell = blockIdx.x % a.cells, slice = blockIdx.x / a.cells;
  const int64_t k = int64_t(cell) * a.W;
  const int n = k >= p.K ? 0 : p.K - k < a.W ? int(p.K - k) : a.W;
  const Memory<X> m(shared_memory(), p.S, p.T, a, blockDim.x / kWarp, kFused);
  const Factors f = factors_of(p);
  const int64_t rows = rows_in_use(p);
  const double norm = kFused ? norm_of(p, rows, m.doubles + p.S + 2 * p.T) : 0.0;
  if (a.sums) {
    for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) {
      for (int v = 0; v < V; ++v) m.sums[j + v] = 0.0f;
    }
  }
  for (int64_t b = slice; b < p.B; b += a.slices) {
    if (b >= rows) {
      if (kFused) zero_gradient<X, V>(p, static_cast<X*>(a.dstudent), b, k, n);
      continue;
    }
    read_image<X, V, kScaled>(p, a, m, f, b, k, n);
    block_sync();
    teacher_parts(p, a, m, n, V);
    student_parts<X, V, kScaled>(p, a, m, f, k, n);
    block_sync();
    if (kFused) {
      block_parts(p, f, m.scratch, m.part, 1);
      finish_image<X, V>(p, a, m, f, norm, b, cell, k, n);
    } else {
      const int64_t width = Layout{p.S, p.T}.width();
      block_parts(p, f, m.scratch, a.parts + b * width * a.columns + cell, a.columns);
    }
    // Before the next image's maxima take the place of this one's sums.
    block_sync();
  }
  if (a.sums) {
    for (int j = threadIdx.x * V; j < n; j += blockDim.x * V) {
      for (int v = 0; v < V; ++v) a.sums[slice * p.K + k + j + v] = m.sums[j + v];
    }
  }
}

// One block per image.
__global__ void __launch_bounds__(kThreads)
    collapse_kernel(Problem p, float* parts, int64_t stride, int C) {
  const int64_t b = blockIdx.x, width = Layout{p.S, p.T}.width();
  if (b < rows_in_use(p)) collapse_image(p.S, p.T, parts + b * width * stride, stride, C);
}

// One block per image; shared memory: S + 2 T doubles.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Problem p, const float* parts, int C, float* student_stats, float* teacher_stats,
                   float* per_image) {
  const int64_t b = blockIdx.x, width = Layout{p.S, p.T}.width();
  if (b >= rows_in_use(p)) return;
  combine_image(p, parts + b * width * C, C, b, reinterpret_cast<double*>(shared_memory()),
                student_stats + 2 * b, teacher_stats + 2 * b, 2 * p.B, per_image + 2 * b);
}

// One block; shared memory: a double for each warp.
__global__ void __launch_bounds__(kThreads)
    total_kernel(Problem p, const float* per_image, float* loss, float* entropy, float* norm) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t rows = rows_in_use(p);
  const double factor = norm_of(p, rows, scratch);
  double losses = 0.0, entropies = 0.0;
  for (int64_t b = threadIdx.x; b < rows; b += blockDim.x) {
    losses += (p.weights ? double(p.weights[b]) : 1.0) * double(per_image[2 * b]);
    entropies += double(per_image[2 * b + 1]);
  }
  losses = block_sum(losses, scratch), entropies = block_sum(entropies, scratch);
  if (threadIdx.x != 0) return;
  *loss = float(losses * factor);
  *entropy = float(entropies / double(rows * p.T > 0 ? rows * p.T : 1));
  *norm = float(factor);
}

// One block per image and W prototypes; shared memory: e [T, W]. dstudent may be the student's
// logits.
template <class X, int V, bool kScaled>
__global__ void __launch_bounds__(kThreads, 4)
    gradient_kernel(Problem p, int cells, int W, const float* dloss, const float* student_stats,
                    const float* teacher_stats, const float* norm, X* dstudent) {
  const int64_t b = blockIdx.x / cells, k = int64_t(blockIdx.x % cells) * W;
  const int n = p.K - k < W ? int(p.K - k) : W;
  const Factors f = factors_of(p);
  float gain = 0.0f;
  if (b < rows_in_use(p)) {
    gain = float(double(*dloss) * double(*norm) / f.student_temp);
    if (p.weights) gain *= p.weights[b];
  }
  if (gain == 0.0f) return zero_gradient<X, V>(p, dstudent, b, k, n);
  float* e = reinterpret_cast<float*>(shared_memory());
  const X* teacher = static_cast<const X*>(p.teacher) + b * p.K + k;
  const X* student = static_cast<const X*>(p.student) + b * p.K + k;
  for (int t = 0; t < p.T; ++t) {
    const float* stats = teacher_stats + 2 * (t * p.B + b);
    const float top = stats[0], factor = stats[1];
    read_rows<V, 1>(teacher + t * p.B * p.K, 0, 1, n, [&](int, int j, const Vector<X, V>& raw) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = scaled<kScaled>(to_float(raw.x[v]), p.teacher_scale, k + j + v);
        const float score = teacher_score(p, x, t, k + j + v, f.teacher);
        e[t * W + j + v] = exp2_fast(score - top) * factor;
      }
    });
  }
  write_gradient<X, V, kScaled>(p, student, p.B * p.K, e, W, student_stats + 2 * b, 2 * p.B, f,
                                gain, b, k, n, dstudent);
}

// x *= factor, where factor is not 1.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) scale_kernel(X* x, int64_t count, const float* factor) {
  const float scale = *factor;
  if (scale == 1.0f) return;
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < count; i += step) {
    Vector<X, V> v = load<V>(x + i);
#pragma unroll
    for (int j = 0; j < V; ++j) convert(to_float(v.x[j]) * scale, &v.x[j]);
    store<V>(v, x + i);
  }
}

}  // namespace fastssl
