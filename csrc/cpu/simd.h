// What every CPU kernel shares: element types, conversions, instruction-set choice, checks.
//
// Kernels are plain loops over rows. `with_best_isa` runs a loop compiled once for the baseline,
// once for AVX2 and once for AVX-512, and picks by what the processor has, so one binary serves
// every x86-64 machine and never executes an instruction that the machine lacks.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace fastssl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define FASTSSL_INLINE inline __attribute__((always_inline))
// For lambdas: [&](...) FASTSSL_LAMBDA { ... }
#define FASTSSL_LAMBDA __attribute__((always_inline))

// Contiguous spans handed to one thread hold at least this many elements.
constexpr int64_t kGrain = 16384;

inline int64_t grain_rows(int64_t row_elements) {
  return row_elements >= kGrain ? 1 : kGrain / (row_elements > 0 ? row_elements : 1);
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FASTSSL_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FASTSSL_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FASTSSL_INLINE float load(const float* p) { return *p; }
FASTSSL_INLINE float load(const BFloat16* p) { return float_of(uint32_t(p->bits) << 16); }
FASTSSL_INLINE float load(const Half* p) {
  const uint32_t h = p->bits;
  // The half's exponent and mantissa, moved into a float, are 2^112 too small; infinity and NaN
  // additionally need the float's largest exponent.
  uint32_t magnitude = bits_of(float_of((h & 0x7fffu) << 13) * 0x1p112f);
  magnitude |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of(magnitude | (h & 0x8000u) << 16);
}

FASTSSL_INLINE void store(float* p, float value) { *p = value; }
FASTSSL_INLINE void store(BFloat16* p, float value) {
  const uint32_t u = bits_of(value);
  // Round to nearest, ties to even; a NaN stays a NaN.
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = uint16_t(value != value ? 0x7fc0u : rounded);
}
FASTSSL_INLINE void store(Half* p, float value) {
  const uint32_t u = bits_of(value);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  // Adding 0.5 aligns a subnormal half's last bit with the float's, so the adder rounds it.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x47800000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  p->bits = uint16_t(h | (u >> 16 & 0x8000u));
}

#if defined(__x86_64__) && defined(__GNUC__)
template <class F>
__attribute__((target("avx2,fma"))) void run_avx2(const F& f) {
  f();
}
#if defined(__clang__)
#define FASTSSL_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,fma"
#else
#define FASTSSL_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"
#endif
template <class F>
__attribute__((target(FASTSSL_AVX512))) void run_avx512(const F& f) {
  f();
}

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::avx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2
                                                                           : Isa::baseline;
  }();
  return isa;
}

// `f` takes nothing and must be a FASTSSL_LAMBDA, so that its loops are compiled per target.
template <class F>
void with_best_isa(const F& f) {
  switch (best_isa()) {
    case Isa::avx512:
      return run_avx512(f);
    case Isa::avx2:
      return run_avx2(f);
    case Isa::baseline:
      return f();
  }
}
#else
template <class F>
void with_best_isa(const F& f) {
  f();
}
#endif

// Runs body(begin, end) over [0, n) on torch's own threads; body must be a FASTSSL_LAMBDA.
template <class F>
void parallel(int64_t n, int64_t grain, const F& body) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    with_best_isa([&]() FASTSSL_LAMBDA { body(begin, end); });
  });
}

// Calls f with a null pointer of the element type: f([[maybe_unused]] T* type).
template <class F>
void with_type(ScalarType type, const char* name, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// Calls f with a null pointer of the index type.
template <class F>
void with_index_type(ScalarType type, const char* name, const F& f) {
  switch (type) {
    case ScalarType::Int:
      return f(static_cast<int32_t*>(nullptr));
    case ScalarType::Long:
      return f(static_cast<int64_t*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, " must be int32 or int64");
  }
}

template <class T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* output(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Python has checked shapes and values; these guard the memory against our own mistakes.
inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

}  // namespace fastssl
