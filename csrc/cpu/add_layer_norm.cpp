// Residual add and LayerNorm; see kernels/add_layer_norm/__init__.py for the formula.
// Rows of D values; T is the type of the residual stream, U of the branch, O of the normed rows.
#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

// Columns of dx that wait unrounded for what else is computed from them.
constexpr int64_t kBlock = 512;

// A row's sums end in a chain of latencies (across a vector, root, division). So short rows go
// through each pass in groups: while one waits, the processor works on the next. A group stays in
// the first-level cache between passes.
constexpr int64_t kGroup = 8, kGroupValues = 2048;

FASTSSL_INLINE int64_t group_rows(int64_t D) {
  return std::clamp(kGroupValues / D, int64_t(1), kGroup);
}

struct Statistics {
  float mean, rstd;
};

template <class T>
FASTSSL_INLINE float sum_row(const T* row, int64_t D) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += load(row + d);
  return sum;
}

// Writes x + branch * gamma * scale and returns the sum of what was written.
template <class T, class U>
FASTSSL_INLINE float add_row(const T* x, const U* branch, const float* gamma, float scale,
                             int64_t D, T* residual) {
  float sum = 0.0f;
  if (gamma) {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) {
      store(residual + d, load(x + d) + load(branch + d) * gamma[d] * scale);
      sum += load(residual + d);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) {
      store(residual + d, load(x + d) + load(branch + d) * scale);
      sum += load(residual + d);
    }
  }
  return sum;
}

template <class T>
FASTSSL_INLINE Statistics statistics(const T* row, float sum, int64_t D, float eps) {
  const float inv_D = 1.0f / float(D);
  const float first = sum * inv_D;
  float rest = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : rest, squares)
  for (int64_t d = 0; d < D; ++d) {
    const float centered = load(row + d) - first;
    rest += centered;
    squares += centered * centered;
  }
  // What the rounded mean leaves over corrects it and the variance (corrected two-pass).
  const float var = std::max((squares - rest * rest * inv_D) * inv_D, 0.0f);
  return {first + rest * inv_D, 1.0f / std::sqrt(var + eps)};
}

template <class T, class O>
FASTSSL_INLINE void normalize_row(const T* row, Statistics of, const float* weight,
                                  const float* bias, int64_t D, O* normed) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    store(normed + d, (load(row + d) - of.mean) * of.rstd * weight[d] + bias[d]);
  }
}

template <class T, class U, class O>
void forward(const Tensor& x, const std::optional<Tensor>& branch, const Tensor& weight,
             const Tensor& bias, const std::optional<Tensor>& gamma,
             const std::optional<Tensor>& scale, float eps, std::optional<Tensor>& residual,
             Tensor& normed, Tensor& stats) {
  const int64_t D = weight.size(0), rows = x.numel() / D;
  const int64_t rows_per_sample = scale ? rows / std::max<int64_t>(scale->size(0), 1) : rows;
  const T* x_ptr = input<T>(x);
  const U* branch_ptr = branch ? input<U>(*branch) : nullptr;
  const float* weight_ptr = input<float>(weight);
  const float* bias_ptr = input<float>(bias);
  const float* gamma_ptr = gamma ? input<float>(*gamma) : nullptr;
  const float* scale_ptr = scale ? input<float>(*scale) : nullptr;
  T* residual_ptr = residual ? output<T>(*residual) : nullptr;
  O* normed_ptr = output<O>(normed);
  Statistics* stats_ptr = output<Statistics>(stats);
  if (residual) prefer_huge_pages(residual_ptr, x.numel() * sizeof(T));
  prefer_huge_pages(normed_ptr, x.numel() * sizeof(O));
  const int64_t group = group_rows(D);
  parallel(rows, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t first = begin; first < end; first += group) {
      const int64_t last = std::min(first + group, end);
      float sums[kGroup];
      for (int64_t i = first; i < last; ++i) {
        if (branch_ptr) {
          const float factor = scale_ptr ? scale_ptr[i / rows_per_sample] : 1.0f;
          sums[i - first] = add_row(x_ptr + i * D, branch_ptr + i * D, gamma_ptr, factor, D,
                                    residual_ptr + i * D);
        } else {
          sums[i - first] = sum_row(x_ptr + i * D, D);
        }
      }
      const T* stream = branch_ptr ? residual_ptr : x_ptr;
      for (int64_t i = first; i < last; ++i) {
        stats_ptr[i] = statistics(stream + i * D, sums[i - first], D, eps);
      }
      for (int64_t i = first; i < last; ++i) {
        normalize_row(stream + i * D, stats_ptr[i], weight_ptr, bias_ptr, D, normed_ptr + i * D);
      }
    }
  });
}

// Means over a row of g = dnormed * weight and of g * xhat; adds the row's share to the sums.
struct RowMeans {
  float g, g_xhat;
};

template <class T, class O>
FASTSSL_INLINE RowMeans row_means(const O* dnormed, const T* residual, Statistics of,
                                  const float* weight, int64_t D, float* dweight, float* dbias) {
  float sum = 0.0f, along = 0.0f;
  if (dweight) {
#pragma omp simd reduction(+ : sum, along)
    for (int64_t d = 0; d < D; ++d) {
      const float dn = load(dnormed + d), xhat = (load(residual + d) - of.mean) * of.rstd;
      dweight[d] += dn * xhat;
      dbias[d] += dn;
      sum += dn * weight[d];
      along += dn * weight[d] * xhat;
    }
  } else {
#pragma omp simd reduction(+ : sum, along)
    for (int64_t d = 0; d < D; ++d) {
      const float g = load(dnormed + d) * weight[d];
      sum += g;
      along += g * (load(residual + d) - of.mean) * of.rstd;
    }
  }
  return {sum / float(D), along / float(D)};
}

// Writes n values of dx, unrounded ones to `exact`, which is dx itself for a float32 stream.
template <class T, class O>
FASTSSL_INLINE void dx_block(const T* dresidual, const O* dnormed, const T* residual, Statistics of,
                             RowMeans means, const float* weight, int64_t n, T* dx, float* exact) {
  if (dresidual) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) {
      const float xhat = (load(residual + d) - of.mean) * of.rstd;
      const float centered = load(dnormed + d) * weight[d] - means.g - xhat * means.g_xhat;
      exact[d] = load(dresidual + d) + of.rstd * centered;
      if constexpr (!std::is_same_v<T, float>) store(dx + d, exact[d]);
    }
  } else {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) {
      const float xhat = (load(residual + d) - of.mean) * of.rstd;
      exact[d] = of.rstd * (load(dnormed + d) * weight[d] - means.g - xhat * means.g_xhat);
      if constexpr (!std::is_same_v<T, float>) store(dx + d, exact[d]);
    }
  }
}

template <class U>
FASTSSL_INLINE void dbranch_block(const float* dx, const float* gamma, float scale, int64_t n,
                                  U* dbranch) {
  if (gamma) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) store(dbranch + d, dx[d] * gamma[d] * scale);
  } else {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) store(dbranch + d, dx[d] * scale);
  }
}

template <class U>
FASTSSL_INLINE void add_dgamma_block(const float* dx, const U* branch, float scale, int64_t n,
                                     float* dgamma) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) dgamma[d] += dx[d] * load(branch + d) * scale;
}

struct Gradients {
  const std::optional<Tensor>& dresidual;
  const Tensor &dnormed, &residual, &stats, &weight;
  const std::optional<Tensor>&branch, &gamma, &scale;
  int64_t chunk_rows;
  Tensor& partial;
  Tensor& dx;
  std::optional<Tensor>&dbranch, &dweight, &dbias, &dgamma;
};

// partial [chunks, 3, D] receives the chunks' sums for dweight, dbias and dgamma.
template <class T, class U, class O>
void backward(Gradients& a) {
  const int64_t D = a.weight.size(0), rows = a.stats.numel() / 2;
  const int64_t samples = a.scale ? std::max<int64_t>(a.scale->size(0), 1) : 1;
  const int64_t rows_per_sample = std::max<int64_t>(rows / samples, 1);
  const T* dresidual = a.dresidual ? input<T>(*a.dresidual) : nullptr;
  const O* dnormed = input<O>(a.dnormed);
  const T* residual = input<T>(a.residual);
  const Statistics* stats = input<Statistics>(a.stats);
  const float* weight = input<float>(a.weight);
  const U* branch = a.branch ? input<U>(*a.branch) : nullptr;
  const float* gamma = a.gamma ? input<float>(*a.gamma) : nullptr;
  const float* scale = a.scale ? input<float>(*a.scale) : nullptr;
  float* partial = output<float>(a.partial);
  T* dx = output<T>(a.dx);
  U* dbranch = a.dbranch ? output<U>(*a.dbranch) : nullptr;
  const bool wants_affine = a.dweight.has_value();
  prefer_huge_pages(dx, rows * D * sizeof(T));
  if (dbranch) prefer_huge_pages(dbranch, rows * D * sizeof(U));
  const auto add_group = [&](int64_t first, int64_t last, float* sums) FASTSSL_LAMBDA {
    RowMeans means[kGroup];
    for (int64_t i = first; i < last; ++i) {
      means[i - first] = row_means(dnormed + i * D, residual + i * D, stats[i], weight, D,
                                   wants_affine ? sums : nullptr, sums + D);
    }
    for (int64_t i = first; i < last; ++i) {
      const float factor = scale ? scale[i / rows_per_sample] : 1.0f;
      for (int64_t d = 0; d < D; d += kBlock) {
        const int64_t n = std::min(kBlock, D - d), at = i * D + d;
        float block[kBlock];
        float* exact = block;
        if constexpr (std::is_same_v<T, float>) exact = dx + at;
        dx_block(dresidual ? dresidual + at : nullptr, dnormed + at, residual + at, stats[i],
                 means[i - first], weight + d, n, dx + at, exact);
        if (dbranch) dbranch_block(exact, gamma ? gamma + d : nullptr, factor, n, dbranch + at);
        if (branch) add_dgamma_block(exact, branch + at, factor, n, sums + 2 * D + d);
      }
    }
  };
  const int64_t chunk_rows = a.chunk_rows, chunks = a.partial.size(0), group = group_rows(D);
  parallel(chunks, grain_rows(D * chunk_rows), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* sums = partial + chunk * 3 * D;
      std::fill(sums, sums + 3 * D, 0.0f);
      const int64_t last = std::min((chunk + 1) * chunk_rows, rows);
      for (int64_t first = chunk * chunk_rows; first < last; first += group) {
        add_group(first, std::min(first + group, last), sums);
      }
    }
  });
}

// out [D] = the sum over chunks of row `which` of partial [chunks, 3, D].
void add_chunks(const Tensor& partial, int64_t which, std::optional<Tensor>& out) {
  if (!out) return;
  const int64_t chunks = partial.size(0), D = partial.size(2);
  const float* from = input<float>(partial) + which * D;
  float* to = output<float>(*out);
  parallel(D, grain_rows(chunks), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    std::fill(to + begin, to + end, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* sums = from + chunk * 3 * D;
#pragma omp simd
      for (int64_t d = begin; d < end; ++d) to[d] += sums[d];
    }
  });
}

// Calls f with null pointers of the stream's, the branch's and the normed rows' element types. A
// branch has the stream's type or, beside a float32 stream, any.
template <class F>
void with_types(ScalarType stream, ScalarType branch, ScalarType normed, const F& f) {
  with_type(stream, "x", [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    with_type(normed, "normed", [&](auto* o) {
      if constexpr (std::is_same_v<T, float>) {
        with_type(branch, "branch", [&](auto* u) { f(t, u, o); });
      } else {
        STD_TORCH_CHECK(branch == stream, "branch must have x's dtype unless x is float32");
        f(t, t, o);
      }
    });
  });
}

void check_optional(const std::optional<Tensor>& tensor, const char* name) {
  if (tensor.has_value()) check_cpu(*tensor, name);
}

void add_layer_norm_fwd(Tensor x, std::optional<Tensor> branch, Tensor weight, Tensor bias,
                        std::optional<Tensor> gamma, std::optional<Tensor> scale, double eps,
                        std::optional<Tensor> residual, Tensor normed, Tensor stats) {
  check_cpu(x, "x");
  check_optional(branch, "branch");
  check_cpu(weight, "weight");
  check_cpu(bias, "bias");
  check_optional(gamma, "gamma");
  check_optional(scale, "scale");
  check_optional(residual, "residual");
  check_cpu(normed, "normed");
  check_cpu(stats, "stats");
  STD_TORCH_CHECK(branch.has_value() == residual.has_value(), "residual goes with branch");
  const ScalarType stream = x.scalar_type();
  with_types(stream, branch ? branch->scalar_type() : stream, normed.scalar_type(),
             [&](auto* t, auto* u, auto* o) {
               forward<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(u)>,
                       std::remove_pointer_t<decltype(o)>>(x, branch, weight, bias, gamma, scale,
                                                           float(eps), residual, normed, stats);
             });
}

void add_layer_norm_bwd(std::optional<Tensor> dresidual, Tensor dnormed, Tensor residual,
                        Tensor stats, Tensor weight, std::optional<Tensor> branch,
                        std::optional<Tensor> gamma, std::optional<Tensor> scale,
                        int64_t chunk_rows, Tensor partial, Tensor dx,
                        std::optional<Tensor> dbranch, std::optional<Tensor> dweight,
                        std::optional<Tensor> dbias, std::optional<Tensor> dgamma) {
  check_optional(dresidual, "dresidual");
  check_cpu(dnormed, "dnormed");
  check_cpu(residual, "residual");
  check_cpu(stats, "stats");
  check_cpu(weight, "weight");
  check_optional(branch, "branch");
  check_optional(gamma, "gamma");
  check_optional(scale, "scale");
  check_cpu(partial, "partial");
  check_cpu(dx, "dx");
  check_optional(dbranch, "dbranch");
  check_optional(dweight, "dweight");
  check_optional(dbias, "dbias");
  check_optional(dgamma, "dgamma");
  STD_TORCH_CHECK(branch.has_value() == dgamma.has_value(), "dgamma goes with branch");
  STD_TORCH_CHECK(dweight.has_value() == dbias.has_value(), "dbias goes with dweight");
  Gradients a{dresidual,  dnormed, residual, stats,   weight,  branch, gamma, scale,
              chunk_rows, partial, dx,       dbranch, dweight, dbias,  dgamma};
  const ScalarType stream = residual.scalar_type();
  const ScalarType type = dbranch  ? dbranch->scalar_type()
                          : branch ? branch->scalar_type()
                                   : stream;
  with_types(stream, type, dnormed.scalar_type(), [&](auto* t, auto* u, auto* o) {
    backward<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(u)>,
             std::remove_pointer_t<decltype(o)>>(a);
  });
  add_chunks(partial, 0, dweight);
  add_chunks(partial, 1, dbias);
  add_chunks(partial, 2, dgamma);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "add_layer_norm_fwd(Tensor x, Tensor? branch, Tensor weight, Tensor bias, Tensor? gamma, "
      "Tensor? scale, float eps, Tensor(a!)? residual, Tensor(b!) normed, Tensor(c!) stats) "
      "-> ()");
  m.def(
      "add_layer_norm_bwd(Tensor? dresidual, Tensor dnormed, Tensor residual, Tensor stats, "
      "Tensor weight, Tensor? branch, Tensor? gamma, Tensor? scale, int chunk_rows, "
      "Tensor(a!) partial, Tensor(b!) dx, Tensor(c!)? dbranch, Tensor(d!)? dweight, "
      "Tensor(e!)? dbias, Tensor(f!)? dgamma) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace fastssl
