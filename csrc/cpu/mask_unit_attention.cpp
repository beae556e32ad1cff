// mask_unit_attention: attention within units of consecutive tokens, from the packed projection to
// the next one's input; see kernels/mask_unit_attention.
//
// A task is a group of units and one head. In bfloat16 on processors that multiply it, it is
// mask_unit_attention_bf16.h's, otherwise it is computed here in float32.
#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>

#include "mask_unit_attention_bf16.h"
#include "scratch.h"
#include "small_product.h"

namespace fastssl {
namespace {

constexpr int64_t kRowBlock = 32;

// Operands of one group and head in float32, one behind the other in scratch memory. Columns are
// padded with zeros to whole vectors.
struct Operands {
  int64_t queries, keys, width;  // exact, padded, padded
  float *q, *k, *v, *dout;       // [rows, width]
  float *k_columns, *v_columns;  // [head_dim, keys]
  float *scores, *dp;            // [kRowBlock, keys]
  float *product, *dk, *dv;      // [kRowBlock, width], [keys, width] each
  int32_t* argmax;               // [queries, width]
};

int64_t padded(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

// Lays the operands out from `base` on and returns their size in bytes.
int64_t lay_out(const Geometry& g, bool backward, uint8_t* base, Operands* out) {
  Operands& o = *out;
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<T*>(base + used);
    used += padded(count) * int64_t(sizeof(T));
  };
  const int64_t q = o.queries = g.group * g.unit_queries();
  const int64_t k = o.keys = padded(g.group * g.unit_size);
  const int64_t w = o.width = padded(g.head_dim);
  take(o.q, q * w);
  take(o.k, k * w);
  take(o.v, k * w);
  take(o.k_columns, g.head_dim * k);
  take(o.scores, kRowBlock * k);
  take(o.product, kRowBlock * w);
  if (!backward) return used;
  take(o.dout, q * w);
  take(o.v_columns, g.head_dim * k);
  take(o.dp, kRowBlock * k);
  take(o.dk, k * w);
  take(o.dv, k * w);
  take(o.argmax, q * w);
  return used;
}

template <class T>
FASTSSL_INLINE void load_rows(const T* src, int64_t stride, int64_t rows, int64_t columns,
                              float* dst, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = src + r * stride;
    float* to = dst + r * width;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) to[c] = load(from + c);
    for (int64_t c = columns; c < width; ++c) to[c] = 0.0f;
  }
}

FASTSSL_INLINE void transpose(const float* src, int64_t rows, int64_t columns, int64_t width,
                              float* dst, int64_t ld) {
  for (int64_t c = 0; c < columns; ++c) {
    float* to = dst + c * ld;
    for (int64_t r = 0; r < rows; ++r) to[r] = src[r * width + c];
    for (int64_t r = rows; r < ld; ++r) to[r] = 0.0f;
  }
}

// Queries of all units; where several tokens share one, their maximum, and which of them it was.
template <class T>
FASTSSL_INLINE void load_queries(const Geometry& g, const Operands& o, const T* tokens,
                                 int64_t units, bool backward) {
  const int64_t per_unit = g.unit_queries(), stride = g.token_stride();
  if (g.q_stride == 1) {
    return load_rows(tokens, stride, units * per_unit, g.head_dim, o.q, o.width);
  }
  for (int64_t i = 0; i < units * per_unit; ++i) {
    const T* from = tokens + (i / per_unit * g.unit_size + i % per_unit) * stride;
    float* to = o.q + i * o.width;
    load_rows(from, stride, 1, g.head_dim, to, o.width);
    int32_t* which = backward ? o.argmax + i * o.width : nullptr;
    if (which) std::fill(which, which + o.width, 0);
    for (int64_t s = 1; s < g.q_stride; ++s) {
      const T* other = from + s * per_unit * stride;
      if (which) {
#pragma omp simd
        for (int64_t c = 0; c < g.head_dim; ++c) {
          const float x = load(other + c);
          which[c] = x > to[c] || x != x ? int32_t(s) : which[c];
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < g.head_dim; ++c) {
        const float x = load(other + c);
        to[c] = x > to[c] || x != x ? x : to[c];
      }
    }
  }
}

// Replaces the scores of one query by its probabilities, which are 0 for what is none of its keys.
FASTSSL_INLINE void softmax_row(float* s, int64_t keys, int64_t first, int64_t last, float factor) {
  float top = s[first];
#pragma omp simd reduction(max : top)
  for (int64_t j = first; j < last; ++j) top = top > s[j] ? top : s[j];
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = first; j < last; ++j) {
    s[j] = exp2_fast((s[j] - top) * factor);
    sum += s[j];
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t j = first; j < last; ++j) s[j] *= inverse;
  std::fill(s, s + first, 0.0f);
  std::fill(s + last, s + keys, 0.0f);
}

template <class T>
FASTSSL_INLINE void store_row(const float* src, int64_t columns, T* dst) {
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) store(dst + c, src[c]);
}

template <class T>
FASTSSL_INLINE void forward(const Geometry& g, const Operands& o, const T* tokens, int64_t units,
                            T* out) {
  const int64_t queries = units * g.unit_queries(), keys = units * g.unit_size;
  const int64_t width = o.width;
  load_queries(g, o, tokens, units, false);
  load_rows(tokens + g.dim(), g.token_stride(), keys, g.head_dim, o.k, width);
  load_rows(tokens + 2 * g.dim(), g.token_stride(), keys, g.head_dim, o.v, width);
  transpose(o.k, keys, g.head_dim, width, o.k_columns, o.keys);
  const float factor = g.scale() * kLog2e;
  for (int64_t i = 0; i < queries; i += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, queries - i);
    small_product(o.q + i * width, width, 1, o.k_columns, o.keys, o.scores, o.keys, rows, o.keys,
                  g.head_dim, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t unit = (i + r) / g.unit_queries() * g.unit_size;
      softmax_row(o.scores + r * o.keys, o.keys, unit, unit + g.unit_size, factor);
    }
    small_product(o.scores, o.keys, 1, o.v, width, o.product, width, rows, width, keys, false);
    for (int64_t r = 0; r < rows; ++r) {
      store_row(o.product + r * width, g.head_dim, out + (i + r) * g.dim());
    }
  }
}

// From the probabilities and dp of one query to the gradient of its scores, in place of dp.
FASTSSL_INLINE void score_gradients(const float* p, float* dp, int64_t keys, float scale) {
  float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
  for (int64_t j = 0; j < keys; ++j) delta += p[j] * dp[j];
#pragma omp simd
  for (int64_t j = 0; j < keys; ++j) dp[j] = p[j] * (dp[j] - delta) * scale;
}

template <class T>
FASTSSL_INLINE void backward(const Geometry& g, const Operands& o, const T* dout, const T* tokens,
                             int64_t units, T* dtokens) {
  const int64_t queries = units * g.unit_queries(), keys = units * g.unit_size;
  const int64_t width = o.width, stride = g.token_stride();
  load_queries(g, o, tokens, units, true);
  load_rows(tokens + g.dim(), stride, keys, g.head_dim, o.k, width);
  load_rows(tokens + 2 * g.dim(), stride, keys, g.head_dim, o.v, width);
  load_rows(dout, g.dim(), queries, g.head_dim, o.dout, width);
  transpose(o.k, keys, g.head_dim, width, o.k_columns, o.keys);
  transpose(o.v, keys, g.head_dim, width, o.v_columns, o.keys);
  const float factor = g.scale() * kLog2e;
  for (int64_t i = 0; i < queries; i += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, queries - i);
    const float *q = o.q + i * width, *d = o.dout + i * width;
    small_product(q, width, 1, o.k_columns, o.keys, o.scores, o.keys, rows, o.keys, g.head_dim,
                  false);
    small_product(d, width, 1, o.v_columns, o.keys, o.dp, o.keys, rows, o.keys, g.head_dim, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t unit = (i + r) / g.unit_queries() * g.unit_size, at = r * o.keys;
      softmax_row(o.scores + at, o.keys, unit, unit + g.unit_size, factor);
      score_gradients(o.scores + at, o.dp + at, o.keys, g.scale());
    }
    small_product(o.dp, o.keys, 1, o.k, width, o.product, width, rows, width, keys, false);
    small_product(o.dp, 1, o.keys, q, width, o.dk, width, keys, width, rows, i > 0);
    small_product(o.scores, 1, o.keys, d, width, o.dv, width, keys, width, rows, i > 0);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t unit = (i + r) / g.unit_queries(), query = (i + r) % g.unit_queries();
      const float* dq = o.product + r * width;
      T* to = dtokens + (unit * g.unit_size + query) * stride;
      if (g.q_stride == 1) {
        store_row(dq, g.head_dim, to);
        continue;
      }
      const int32_t* which = o.argmax + (i + r) * width;
      for (int64_t s = 0; s < g.q_stride; ++s, to += g.unit_queries() * stride) {
#pragma omp simd
        for (int64_t c = 0; c < g.head_dim; ++c) store(to + c, which[c] == s ? dq[c] : 0.0f);
      }
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    store_row(o.dk + j * width, g.head_dim, dtokens + j * stride + g.dim());
    store_row(o.dv + j * width, g.head_dim, dtokens + j * stride + 2 * g.dim());
  }
}

// "tiles", "dots" or "none": what multiplies bfloat16.
std::string bf16_unit() {
#ifdef FASTSSL_HAS_PAIRS
  switch (pairs::best_unit()) {
    case pairs::Unit::tiles:
      return "tiles";
    case pairs::Unit::dots:
      return "dots";
    case pairs::Unit::none:
      break;
  }
#endif
  return "none";
}

// Where a task's tokens and queries are: offsets of its first ones' channels of its head.
struct Task {
  int64_t units, token, query;
};

Task task_of(const Geometry& g, int64_t num_units, int64_t task) {
  const int64_t unit = task / g.heads * g.group, head = task % g.heads * g.head_dim;
  return {std::min(g.group, num_units - unit), unit * g.unit_size * g.token_stride() + head,
          unit * g.unit_queries() * g.dim() + head};
}

#ifdef FASTSSL_HAS_PAIRS
FASTSSL_PAIRS void run_pairs(const Geometry& g, const uint16_t* dout, const uint16_t* tokens,
                             int64_t num_units, uint16_t* out, uint8_t* scratch, Range tasks) {
  pairs::Buffers buffers;
  pairs::lay_out(g, dout != nullptr, scratch, &buffers);
  std::optional<pairs::Tiles> tiles;
  if (pairs::best_unit() == pairs::Unit::tiles) tiles.emplace();
  const int64_t num_ahead = pairs::tasks_ahead(g);
  for (int64_t i = tasks.begin; i < tasks.end; ++i) {
    const Task task = task_of(g, num_units, i);
    pairs::Upcoming ahead(g, task.units, dout != nullptr);
    if (i + num_ahead < tasks.end) {
      const Task next = task_of(g, num_units, i + num_ahead);
      const int64_t rows = next.units * g.unit_size, queries = next.units * g.unit_queries();
      ahead.add(tokens + next.token, rows, g.token_stride(), 3);
      if (dout) {
        ahead.add(dout + next.query, queries, g.dim(), 1);
        ahead.add(out + next.token, rows, g.token_stride(), 3);
      } else {
        ahead.add(out + next.query, queries, g.dim(), 1);
      }
    }
    if (dout) {
      pairs::backward(g, buffers, dout + task.query, tokens + task.token, task.units,
                      out + task.token, ahead);
    } else {
      pairs::forward(g, buffers, tokens + task.token, task.units, out + task.query, ahead);
    }
  }
}
#endif

template <class T>
FASTSSL_INLINE void run_plain(const Geometry& g, const T* dout, const T* tokens, int64_t num_units,
                              T* out, uint8_t* scratch, Range tasks) {
  Operands operands;
  lay_out(g, dout != nullptr, scratch, &operands);
  for (int64_t i = tasks.begin; i < tasks.end; ++i) {
    const Task task = task_of(g, num_units, i);
    if (dout) {
      backward(g, operands, dout + task.query, tokens + task.token, task.units, out + task.token);
    } else {
      forward(g, operands, tokens + task.token, task.units, out + task.query);
    }
  }
}

// Forward without dout [T / s, D]: qkv [T, 3 D] -> out [T / s, D]; backward with it: out is dqkv.
void run(const std::optional<Tensor>& dout, const Tensor& qkv, int64_t heads, int64_t unit_size,
         int64_t q_stride, int64_t num_threads, Tensor& out) {
  check_cpu(qkv, "qkv");
  check_cpu(out, "out");
  if (dout) check_cpu(*dout, "dout");
  const int64_t channels = qkv.size(qkv.dim() - 1),
                tokens = qkv.numel() / std::max<int64_t>(channels, 1);
  Geometry g{heads, channels / (3 * heads), unit_size, q_stride, 1};
  STD_TORCH_CHECK(out.numel() == (dout ? qkv.numel() : tokens / q_stride * g.dim()),
                  "out has a wrong size");
  const bool in_pairs = qkv.scalar_type() == ScalarType::BFloat16 && bf16_unit() != "none";
  // Small units share a vector.
  g.group = std::max<int64_t>(1, (kVector + unit_size - 1) / unit_size);
#ifdef FASTSSL_HAS_PAIRS
  if (in_pairs) g.group = pairs::group_of(unit_size);
#endif
  const int64_t num_units = tokens / unit_size;
  const int64_t tasks = (num_units + g.group - 1) / g.group * heads;
  if (tasks == 0) return;
  const int64_t workers = std::min(tasks, num_threads);
  const bool backward = dout.has_value();
  int64_t bytes;
#ifdef FASTSSL_HAS_PAIRS
  pairs::Buffers buffers;
  if (in_pairs) bytes = pairs::lay_out(g, backward, nullptr, &buffers);
#endif
  Operands operands;
  if (!in_pairs) bytes = lay_out(g, backward, nullptr, &operands);
  const int64_t step = (bytes + 4095) / 4096 * 4096;
  const Scratch<uint8_t> scratch(workers * step);
  with_type(qkv.scalar_type(), "qkv", [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    const T *dout_ptr = backward ? input<T>(*dout) : nullptr, *qkv_ptr = input<T>(qkv);
    T* out_ptr = output<T>(out);
#ifdef FASTSSL_HAS_PAIRS
    if (in_pairs) {
      torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; ++w) {
          const auto words = [](auto* pointer) { return (uint16_t*)(pointer); };
          run_pairs(g, words(dout_ptr), words(qkv_ptr), num_units, words(out_ptr),
                    scratch.data + w * step, part_of(tasks, w, workers));
        }
      });
      return;
    }
#endif
    parallel(workers, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t w = begin; w < end; ++w) {
        run_plain(g, dout_ptr, qkv_ptr, num_units, out_ptr, scratch.data + w * step,
                  part_of(tasks, w, workers));
      }
    });
  });
}

void mask_unit_attention_fwd(Tensor qkv, int64_t heads, int64_t unit_size, int64_t q_stride,
                             int64_t num_threads, Tensor out) {
  run(std::nullopt, qkv, heads, unit_size, q_stride, num_threads, out);
}

void mask_unit_attention_bwd(Tensor dout, Tensor qkv, int64_t heads, int64_t unit_size,
                             int64_t q_stride, int64_t num_threads, Tensor dqkv) {
  run(dout, qkv, heads, unit_size, q_stride, num_threads, dqkv);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def("bf16_unit() -> str");
  m.def(
      "mask_unit_attention_fwd(Tensor qkv, int num_heads, int unit_size, int q_stride, "
      "int num_threads, Tensor(a!) out) -> ()");
  m.def(
      "mask_unit_attention_bwd(Tensor dout, Tensor qkv, int num_heads, int unit_size, "
      "int q_stride, int num_threads, Tensor(a!) dqkv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CompositeExplicitAutograd, m) {
  m.impl("bf16_unit", TORCH_BOX(&bf16_unit));
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("mask_unit_attention_fwd", TORCH_BOX(&mask_unit_attention_fwd));
  m.impl("mask_unit_attention_bwd", TORCH_BOX(&mask_unit_attention_bwd));
}

}  // namespace fastssl
