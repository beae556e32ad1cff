// Bias and exact GELU between the two products of an MLP, forward and backward; see
// kernels/gelu_mlp.
#include <algorithm>
#include <optional>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "column_parts.h"
#include "pages.h"
#include "simd.h"
#include "softmax.h"

namespace fastssl {
namespace {

struct Gelu {
  float cdf;    // Phi(x), the normal distribution function; gelu(x) = x Phi(x)
  float slope;  // d gelu / dx = Phi(x) + x phi(x)
};

// For float32 and float16: within 3e-7 of the upper tail, by
// Phi(-|x|) = exp(-x^2 / 2) t q(t), t = 1 / (1 + c |x|), with q a minimax polynomial.
FASTSSL_INLINE Gelu gelu_exact(float x) {
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const float magnitude = float_of(bits_of(x) & 0x7fffffffu);
  const float t = 1.0f / (1.0f + 0.2325f * magnitude);
  const float e = exp2_fast(x * x * (-0.5f * kLog2e));
  float q = -6.90628274e-2f;
  q = q * t + 2.38857967e-1f;
  q = q * t - 1.88502952e-1f;
  q = q * t + 2.14650778e-1f;
  q = q * t + 1.86276404e-2f;
  q = q * t + 1.01623861e-1f;
  q = q * t + 9.09524481e-2f;
  q = q * t + 9.28531337e-2f;
  const float tail = e * t * q;
  // A mask and no branch, which would keep the compiler from vectorising.
  const uint32_t upper = x > 0.0f ? 0xffffffffu : 0u;
  const float cdf = float_of((bits_of(1.0f - tail) & upper) | (bits_of(tail) & ~upper));
  return {cdf, cdf + x * (e * kInverseSqrt2Pi)};
}

// For bfloat16, whose unit in the last place is 4e-3: Phi within 8e-6, the slope within 2e-5 (8e-5
// where |x| > 4.5). Both are 1/2 plus an odd function: x times a minimax polynomial of x^2, in a
// variable that runs from -1 to 1, since powers of x^2 would cancel.
FASTSSL_INLINE Gelu gelu_rounded(float x) {
  constexpr float kLimit = 4.5f;
  // Masks and no branches, which would keep the compiler from vectorising; a NaN stays one.
  const uint32_t outside = float_of(bits_of(x) & 0x7fffffffu) > kLimit ? 0xffffffffu : 0u;
  const uint32_t limit = bits_of(kLimit) | (bits_of(x) & 0x80000000u);
  const float clamped = float_of((bits_of(x) & ~outside) | (limit & outside));
  const float u = clamped * clamped * (2.0f / (kLimit * kLimit)) - 1.0f;
  float p = -1.93050487e-3f;
  p = p * u + 4.96271101e-3f;
  p = p * u - 6.07024758e-3f;
  p = p * u + 9.65320948e-3f;
  p = p * u - 1.84839399e-2f;
  p = p * u + 2.88576592e-2f;
  p = p * u - 4.02369836e-2f;
  p = p * u + 5.46374890e-2f;
  p = p * u - 7.71858826e-2f;
  p = p * u + 1.56906044e-1f;
  float q = 1.19351098e-2f;
  q = q * u - 2.93628704e-2f;
  q = q * u + 2.84605969e-2f;
  q = q * u - 3.62113501e-2f;
  q = q * u + 6.97614572e-2f;
  q = q * u - 9.38373592e-2f;
  q = q * u + 9.78996140e-2f;
  q = q * u - 9.39220117e-2f;
  q = q * u + 8.69873936e-2f;
  q = q * u - 9.00131999e-2f;
  q = q * u + 1.59431544e-1f;
  // Exactly 0 far below, where it is multiplied by a large number.
  const uint32_t keep = x < -kLimit ? 0u : 0xffffffffu;
  const float cdf = float_of(bits_of(0.5f + clamped * p) & keep);
  return {cdf, 0.5f + clamped * q};
}

template <class T>
FASTSSL_INLINE Gelu gelu(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return gelu_rounded(x);
  } else {
    return gelu_exact(x);
  }
}

const float* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? input<float>(*tensor) : nullptr;
}

// Columns whose results wait in float32, in the first-level cache, to be rounded together.
constexpr int64_t kColumns = 512;

#if defined(__x86_64__) && defined(__GNUC__)
// One instruction for what takes eight otherwise.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void round_avx512_bf16(
    const float* from, BFloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 inside = __mmask16(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, from + i));
    _mm256_mask_storeu_epi16(to + i, inside, rounded);
  }
}

bool has_avx512_bf16() {
  static const bool has = best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
}
#else
void round_avx512_bf16(const float*, BFloat16*, int64_t) {}
bool has_avx512_bf16() { return false; }
#endif

template <class T>
FASTSSL_INLINE void round_to(const float* from, T* to, int64_t count, bool with_avx512_bf16) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (with_avx512_bf16) return round_avx512_bf16(from, to, count);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(to + i, from[i]);
}

template <bool has_bias, class T>
FASTSSL_INLINE void forward_row(const T* h, const float* bias, T* out, int64_t N, bool bf16) {
  alignas(64) float next_out[kColumns];
  for (int64_t first = 0; first < N; first += kColumns) {
    const int64_t count = std::min(kColumns, N - first);
    const T* from = h + first;
    const float* b = bias + first;
#pragma omp simd
    for (int64_t n = 0; n < count; ++n) {
      const float x = has_bias ? load(from + n) + b[n] : load(from + n);
      next_out[n] = x * gelu<T>(x).cdf;
    }
    round_to(next_out, out + first, count, bf16);
  }
}

template <class T>
void forward(const Tensor& h, const float* bias, Tensor& out) {
  const int64_t M = h.size(0), N = h.size(1);
  const T* h_ptr = input<T>(h);
  T* out_ptr = output<T>(out);
  const bool bf16 = has_avx512_bf16();
  prefer_huge_pages(out_ptr, M * N * int64_t(sizeof(T)));
  parallel(M, grain_rows(N), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t m = begin; m < end; ++m) {
      const T* from = h_ptr + m * N;
      T* to = out_ptr + m * N;
      if (bias) {
        forward_row<true>(from, bias, to, N, bf16);
      } else {
        forward_row<false>(from, bias, to, N, bf16);
      }
    }
  });
}

template <bool has_bias, class T>
FASTSSL_INLINE void backward_row(const T* h, const float* bias, T* grad, T* out, float* sum,
                                 int64_t N, bool bf16) {
  alignas(64) float next_out[kColumns], next_grad[kColumns];
  for (int64_t first = 0; first < N; first += kColumns) {
    const int64_t count = std::min(kColumns, N - first);
    const T *from = h + first, *grad_from = grad + first;
    const float* b = bias + first;
    float* sum_to = sum + first;
#pragma omp simd
    for (int64_t n = 0; n < count; ++n) {
      const float x = has_bias ? load(from + n) + b[n] : load(from + n);
      const Gelu g = gelu<T>(x);
      const float dx = load(grad_from + n) * g.slope;
      next_out[n] = x * g.cdf;
      next_grad[n] = dx;
      if (has_bias) sum_to[n] += dx;
    }
    round_to(next_out, out + first, count, bf16);
    round_to(next_grad, grad + first, count, bf16);
  }
}

template <class T>
void backward(const Tensor& h, const float* bias, Tensor& grad, Tensor& out, float* parts,
              int64_t chunks, float* dbias) {
  const int64_t M = h.size(0), N = h.size(1);
  const T* h_ptr = input<T>(h);
  T *grad_ptr = output<T>(grad), *out_ptr = output<T>(out);
  const bool bf16 = has_avx512_bf16();
  prefer_huge_pages(out_ptr, M * N * int64_t(sizeof(T)));
  parallel(chunks, grain_rows(kSumRows * N), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t k = begin; k < end; ++k) {
      float* sum = parts + k * N;
      if (bias) std::fill(sum, sum + N, 0.0f);
      for (int64_t m = k * kSumRows; m < std::min(M, (k + 1) * kSumRows); ++m) {
        const int64_t row = m * N;
        if (bias) {
          backward_row<true>(h_ptr + row, bias, grad_ptr + row, out_ptr + row, sum, N, bf16);
        } else {
          backward_row<false>(h_ptr + row, bias, grad_ptr + row, out_ptr + row, sum, N, bf16);
        }
      }
    }
  });
  if (bias) add_parts(parts, chunks, N, dbias);
}

// out [M, N] = gelu(h [M, N] + bias [N]); out may be h.
void gelu_mlp_fwd(Tensor h, std::optional<Tensor> bias, Tensor out) {
  check_cpu(h, "h");
  check_cpu(out, "out");
  STD_TORCH_CHECK(out.numel() == h.numel() && out.scalar_type() == h.scalar_type(),
                  "out must be like h");
  with_type(h.scalar_type(), "h", [&](auto* type) {
    forward<std::remove_pointer_t<decltype(type)>>(h, pointer(bias), out);
  });
}

// grad [M, N], the gradient of gelu(h + bias), becomes that of h; out is filled with gelu(h + bias)
// again, dbias [N] with the sums of the columns of the new grad, by way of parts [chunks, N]. dbias
// and parts are empty without a bias.
void gelu_mlp_bwd(Tensor h, std::optional<Tensor> bias, Tensor grad, Tensor out, Tensor parts,
                  Tensor dbias) {
  check_cpu(h, "h");
  check_cpu(grad, "grad");
  check_cpu(out, "out");
  check_cpu(parts, "parts");
  check_cpu(dbias, "dbias");
  STD_TORCH_CHECK(grad.numel() == h.numel() && grad.scalar_type() == h.scalar_type() &&
                      out.numel() == h.numel() && out.scalar_type() == h.scalar_type(),
                  "grad and out must be like h");
  const int64_t chunks = (h.size(0) + kSumRows - 1) / kSumRows;
  STD_TORCH_CHECK(!bias || parts.numel() >= chunks * h.size(1), "parts must have 1 row per 32");
  with_type(h.scalar_type(), "h", [&](auto* type) {
    backward<std::remove_pointer_t<decltype(type)>>(
        h, pointer(bias), grad, out, output<float>(parts), chunks, output<float>(dbias));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def("gelu_mlp_fwd(Tensor h, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "gelu_mlp_bwd(Tensor h, Tensor? bias, Tensor(a!) grad, Tensor(b!) out, Tensor(c!) parts, "
      "Tensor(d!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("gelu_mlp_fwd", TORCH_BOX(&gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd", TORCH_BOX(&gelu_mlp_bwd));
}

}  // namespace fastssl
