// Cross-entropy between teacher and student views, cell by cell; the formula is in
// kernels/dino_cross_entropy/__init__.py. S student views, T teacher views, B images, K prototypes,
// C chunks of prototypes.
//
// Everything is cut into (image, chunk) cells of a fixed size, so that a teacher's chunk stays in
// the first-level cache for all student views and no sum depends on the number of threads. Scores
// are logits over temperature, in units of log 2.
#pragma once

#include <algorithm>
#include <cmath>

#include "softmax.h"

namespace fastssl {

constexpr int64_t kChunk = 1024;
constexpr int64_t kMaxTeacherViews = 16;

// Logits of any dtype [V, B, K], times `scale` [K] where there is one.
struct Logits {
  const void* data;
  ScalarType type;
  const float* scale;
};

struct Problem {
  int64_t S, T, B, K, rows;  // images at `rows` and beyond are ignored
  Logits student, teacher;
  double student_temp;
  float student_factor, teacher_factor;  // log2(e) / temperature
  const float *center, *log_u;           // [K]; [K] or [T, K]; null where absent
  int64_t log_u_stride;                  // between teacher views
  bool skip_same_view;

  int64_t chunks() const { return (K + kChunk - 1) / kChunk; }
};

// The rows of `parts` [B, width, C], one column per cell: (max, sum of e) of each student view;
// (max, sum of e, sum of e * (score - max)) of each teacher view; for every pair, the sum of the
// teacher's e times the student's (score - max). e is 2^(score - max), and max that of the cell.
struct Layout {
  int64_t S, T;
  int64_t width() const { return 2 * S + 3 * T + S * T; }
  int64_t student(int64_t s) const { return 2 * s; }
  int64_t teacher(int64_t t) const { return 2 * S + 3 * t; }
  int64_t pair(int64_t s, int64_t t) const { return 2 * S + 3 * T + s * T + t; }
};

template <class X>
FASTSSL_INLINE void convert(const X* from, const float* scale, int64_t n, float* to) {
  if (scale) {
    for (int64_t j = 0; j < n; ++j) to[j] = load(from + j) * scale[j];
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = load(from + j);
  }
}

// Prototypes k to k + n of one row of logits in float32: in place where they are, else in `buffer`.
FASTSSL_INLINE const float* read_row(const Logits& logits, int64_t row, int64_t k, int64_t n,
                                     float* buffer) {
  const float* scale = logits.scale ? logits.scale + k : nullptr;
  if (logits.type == ScalarType::Float) {
    const float* from = static_cast<const float*>(logits.data) + row + k;
    if (!scale) return from;
    convert(from, scale, n, buffer);
  } else if (logits.type == ScalarType::BFloat16) {
    convert(static_cast<const BFloat16*>(logits.data) + row + k, scale, n, buffer);
  } else {
    convert(static_cast<const Half*>(logits.data) + row + k, scale, n, buffer);
  }
  return buffer;
}

// `logits` and `to` may be the same row.
FASTSSL_INLINE void teacher_scores(const Problem& p, const float* logits, int64_t t, int64_t k,
                                   int64_t n, float* to) {
  const float f = p.teacher_factor;
  if (p.center) {
    const float* center = p.center + k;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = (logits[j] - center[j]) * f;
  } else if (p.log_u) {
    const float* log_u = p.log_u + t * p.log_u_stride + k;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = logits[j] * f + log_u[j] * kLog2e;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = logits[j] * f;
  }
}

FASTSSL_INLINE float largest(const float* row, int64_t n) {
  float top = -__builtin_inff();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = top > row[j] ? top : row[j];
  return top;
}

// Replaces scores by e and writes the view's three numbers, `stride` apart.
FASTSSL_INLINE void teacher_part(float* row, int64_t n, float* part, int64_t stride) {
  const float top = largest(row, n);
  float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t j = 0; j < n; ++j) {
    const float y = row[j] - top, e = exp2_fast(y);
    sum += e;
    weighted += e * y;
    row[j] = e;
  }
  part[0] = top, part[stride] = sum, part[2 * stride] = weighted;
}

// The two numbers of a student view, and its products with the first N teacher views, which ride
// along with the exponentials.
template <int N>
FASTSSL_INLINE void student_part(const float* row, float f, const float* e, int64_t n, float* part,
                                 float* pairs, int64_t stride) {
  const float top = largest(row, n) * f;
  float sum = 0.0f, first = 0.0f, second = 0.0f;
  const float *e0 = e, *e1 = e + kChunk;
#pragma omp simd reduction(+ : sum, first, second)
  for (int64_t j = 0; j < n; ++j) {
    const float y = row[j] * f - top;
    sum += exp2_fast(y);
    first += e0[j] * y;
    if (N == 2) second += e1[j] * y;
  }
  part[0] = top, part[stride] = sum, pairs[0] = first;
  if (N == 2) pairs[stride] = second;
}

FASTSSL_INLINE float pair_part(const float* row, float f, float top, const float* e, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += e[j] * (row[j] * f - top);
  return sum;
}

// Fills one cell's column of `parts`; adds the teacher's logits to teacher_sum [n] where there is
// one.
FASTSSL_INLINE void cell_parts(const Problem& p, int64_t b, int64_t chunk, float* part,
                               int64_t stride, float* teacher_sum) {
  alignas(64) float e[kMaxTeacherViews * kChunk];
  alignas(64) float buffer[kChunk];
  const Layout at{p.S, p.T};
  const int64_t k = chunk * kChunk, n = std::min(kChunk, p.K - k);
  for (int64_t t = 0; t < p.T; ++t) {
    const float* logits = read_row(p.teacher, (t * p.B + b) * p.K, k, n, buffer);
    if (teacher_sum) {
      for (int64_t j = 0; j < n; ++j) teacher_sum[j] += logits[j];
    }
    teacher_scores(p, logits, t, k, n, e + t * kChunk);
    teacher_part(e + t * kChunk, n, part + at.teacher(t) * stride, stride);
  }
  for (int64_t s = 0; s < p.S; ++s) {
    const float* logits = read_row(p.student, (s * p.B + b) * p.K, k, n, buffer);
    float *to = part + at.student(s) * stride, *pairs = part + at.pair(s, 0) * stride;
    if (p.T == 1) {
      student_part<1>(logits, p.student_factor, e, n, to, pairs, stride);
    } else {
      student_part<2>(logits, p.student_factor, e, n, to, pairs, stride);
    }
    for (int64_t t = 2; t < p.T; ++t) {
      pairs[t * stride] = pair_part(logits, p.student_factor, to[0], e + t * kChunk, n);
    }
  }
}

struct LogSum {
  float max;
  double sum;  // of 2^(score - max)
};

// Merges the cells' (max, sum) rows of one view.
FASTSSL_INLINE LogSum merge(const float* max, const float* sum, int64_t C) {
  const float top = largest(max, C);
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < C; ++c) total += double(sum[c] * exp2_fast(max[c] - top));
  return {top, total};
}

// Entropy of one teacher view times its sum of e, in nats.
FASTSSL_INLINE double entropy_of(const float* max, const float* sum, const float* weighted,
                                 LogSum z, int64_t C) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < C; ++c) {
    const float below = max[c] - z.max;
    total += double(exp2_fast(below) * (weighted[c] + below * sum[c]));
  }
  return std::log(z.sum) - kLn2 * total / z.sum;
}

// Merges the first C columns of an image's `parts` into the first one; rows are `stride` apart.
FASTSSL_INLINE void collapse(int64_t S, int64_t T, float* parts, int64_t stride, int64_t C) {
  const Layout at{S, T};
  for (int64_t t = 0; t < T; ++t) {
    float *max = parts + at.teacher(t) * stride, *sum = max + stride, *weighted = sum + stride;
    const LogSum z = merge(max, sum, C);
    double total = 0.0;
    for (int64_t c = 0; c < C; ++c) {
      const float below = max[c] - z.max;
      total += double(exp2_fast(below) * (weighted[c] + below * sum[c]));
    }
    for (int64_t s = 0; s < S; ++s) {
      const float* student = parts + at.student(s) * stride;
      const float top = largest(student, C);
      float* pair = parts + at.pair(s, t) * stride;
      double cross = 0.0;
      for (int64_t c = 0; c < C; ++c) {
        const float rescale = exp2_fast(max[c] - z.max);
        cross += double(rescale * (pair[c] + (student[c] - top) * sum[c]));
      }
      pair[0] = float(cross);
    }
    max[0] = z.max, sum[0] = float(z.sum), weighted[0] = float(total);
  }
  for (int64_t s = 0; s < S; ++s) {
    float *max = parts + at.student(s) * stride, *sum = max + stride;
    const LogSum z = merge(max, sum, C);
    max[0] = z.max, sum[0] = float(z.sum);
  }
}

struct Image {
  double loss, entropy;
};

// From an image's cells to its loss, summed over pairs, and to what makes probabilities of scores:
// a view's row of stats [V, B, 2] is (max, factor) with p = factor * 2^(score - max). The student's
// factor includes the mass of the teacher views that count for it. (One number, max - log2(factor),
// would lose the last digits of p to the size of the scores.)
FASTSSL_INLINE Image combine(const Problem& p, float* parts, int64_t C, const float* log_v,
                             int64_t b, float* student_stats, float* teacher_stats) {
  const Layout at{p.S, p.T};
  double mass[kMaxTeacherViews];
  Image image{0.0, 0.0};
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t i = t * p.B + b;
    float *max = parts + at.teacher(t) * C, *sum = max + C;
    const LogSum z = merge(max, sum, C);
    const double factor = log_v ? std::exp2(double(z.max) + double(log_v[i]) / kLn2) : 1.0 / z.sum;
    mass[t] = factor * z.sum;
    teacher_stats[2 * i] = z.max, teacher_stats[2 * i + 1] = float(factor);
    image.entropy += entropy_of(max, sum, sum + C, z, C);
    // From here on the two rows hold the factor from e to p, and the cells' masses.
    for (int64_t c = 0; c < C; ++c) {
      max[c] = exp2_fast(max[c] - z.max) * float(factor);
      sum[c] *= max[c];
    }
  }
  for (int64_t s = 0; s < p.S; ++s) {
    const int64_t i = s * p.B + b;
    const float* max = parts + at.student(s) * C;
    const LogSum z = merge(max, max + C, C);
    const double log_sum = std::log2(z.sum);
    double counted_mass = 0.0;
    for (int64_t t = 0; t < p.T; ++t) {
      if (p.skip_same_view && s == t) continue;
      const float *factor = parts + at.teacher(t) * C, *cell_mass = factor + C;
      const float* pair = parts + at.pair(s, t) * C;
      // Sum of p * (score - max): no term is positive, so nothing cancels, whatever the logits.
      double cross = 0.0;
#pragma omp simd reduction(+ : cross)
      for (int64_t c = 0; c < C; ++c) {
        cross += double(factor[c] * pair[c] + (max[c] - z.max) * cell_mass[c]);
      }
      image.loss += mass[t] * log_sum - cross;
      counted_mass += mass[t];
    }
    student_stats[2 * i] = z.max, student_stats[2 * i + 1] = float(counted_mass / z.sum);
  }
  image.loss *= kLn2;
  return image;
}

template <class X>
FASTSSL_INLINE void store_row(const float* from, int64_t n, X* to) {
  for (int64_t j = 0; j < n; ++j) store(to + j, from[j]);
}

FASTSSL_INLINE void store_row(const float* from, int64_t n, ScalarType type, void* data,
                              int64_t offset) {
  if (type == ScalarType::BFloat16) {
    store_row(from, n, static_cast<BFloat16*>(data) + offset);
  } else {
    store_row(from, n, static_cast<Half*>(data) + offset);
  }
}

// The student's gradient in one cell. `gain` is all that multiplies it; dstudent may be the
// student.
FASTSSL_INLINE void cell_gradient(const Problem& p, const float* student_stats,
                                  const float* teacher_stats, int64_t b, int64_t chunk, float gain,
                                  void* dstudent) {
  alignas(64) float targets[kMaxTeacherViews * kChunk];
  alignas(64) float all[kChunk], some[kChunk], buffer[kChunk];
  const int64_t k = chunk * kChunk, n = std::min(kChunk, p.K - k);
  std::fill(all, all + n, 0.0f);
  for (int64_t t = 0; t < p.T; ++t) {
    float* row = targets + t * kChunk;
    const float* logits = read_row(p.teacher, (t * p.B + b) * p.K, k, n, buffer);
    teacher_scores(p, logits, t, k, n, row);
    const float* stats = teacher_stats + 2 * (t * p.B + b);
    for (int64_t j = 0; j < n; ++j) {
      row[j] = exp2_fast(row[j] - stats[0]) * stats[1];
      all[j] += row[j];
    }
  }
  const float* scale = p.student.scale ? p.student.scale + k : nullptr;
  for (int64_t s = 0; s < p.S; ++s) {
    const float* target = all;
    if (p.skip_same_view && s < p.T) {
      std::fill(some, some + n, 0.0f);
      for (int64_t t = 0; t < p.T; ++t) {
        const float* row = targets + t * kChunk;
        for (int64_t j = 0; t != s && j < n; ++j) some[j] += row[j];
      }
      target = some;
    }
    const int64_t row = (s * p.B + b) * p.K;
    const float* stats = student_stats + 2 * (s * p.B + b);
    const float f = p.student_factor, max = stats[0], factor = stats[1];
    const float* logits = read_row(p.student, row, k, n, buffer);
    const bool direct = p.student.type == ScalarType::Float;
    float* to = direct ? static_cast<float*>(dstudent) + row + k : buffer;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      to[j] = (exp2_fast(logits[j] * f - max) * factor - target[j]) * gain;
    }
    if (scale) {
      for (int64_t j = 0; j < n; ++j) to[j] *= scale[j];
    }
    if (!direct) store_row(buffer, n, p.student.type, dstudent, row + k);
  }
}

}  // namespace fastssl
