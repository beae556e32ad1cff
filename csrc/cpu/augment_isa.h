// What augment_views.cpp does to whole vectors, compiled for each instruction set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "augment_filter.h"
#include "simd.h"

namespace fastssl {

constexpr int64_t kColumns = 13;
constexpr float kLuma[3] = {0.2989f, 0.587f, 0.114f};

// One row of params.
struct Params {
  bool flip, jitter;
  float factors[4];
  int order[4];
  bool grey;
  float sigma;
  bool solarize;

  explicit Params(const float* row)
      : flip(row[0] > 0),
        jitter(row[1] > 0),
        factors{row[2], row[3], row[4], row[5]},
        order{int(row[6]), int(row[7]), int(row[8]), int(row[9])},
        grey(row[10] > 0),
        sigma(row[11]),
        solarize(row[12] > 0) {}
};

enum Adjustment { kBrightness, kContrast, kSaturation, kHue };

// One row of pixels in three planes.
struct Row {
  float *r, *g, *b;
};

#if defined(__clang__)
#define FASTSSL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTSSL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif

// Vectors of kLanes floats and their conversions, per instruction set.
#define FASTSSL_DEFINE_VECTORS(lanes)                                                  \
  constexpr int kLanes = lanes;                                                        \
  typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4), may_alias)); \
  typedef int32_t Ints __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

namespace baseline {
#define FASTSSL_TARGET
FASTSSL_DEFINE_VECTORS(4)
inline Floats from_bytes(const uint8_t* p) {
  return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
inline Ints to_ints(const Floats& x) { return Ints{int(x[0]), int(x[1]), int(x[2]), int(x[3])}; }
inline Floats to_floats(const Ints& x) {
  return Floats{float(x[0]), float(x[1]), float(x[2]), float(x[3])};
}
inline void to_bytes(const Ints& x, uint8_t* p) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(x[i]);
}
#include "augment_passes.h"
#undef FASTSSL_TARGET
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
#define FASTSSL_TARGET __attribute__((target("avx2,fma")))
FASTSSL_DEFINE_VECTORS(8)
FASTSSL_TARGET inline Floats from_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
FASTSSL_TARGET inline Ints to_ints(const Floats& x) { return Ints(_mm256_cvttps_epi32(x)); }
FASTSSL_TARGET inline Floats to_floats(const Ints& x) { return _mm256_cvtepi32_ps(__m256i(x)); }
FASTSSL_TARGET inline void to_bytes(const Ints& x, uint8_t* p) {
  const __m256i ints = __m256i(x);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
#include "augment_passes.h"
#undef FASTSSL_TARGET
}  // namespace avx2

namespace avx512 {
#define FASTSSL_TARGET __attribute__((target(FASTSSL_AVX512)))
FASTSSL_DEFINE_VECTORS(16)
// All lanes: GCC 12 warns of the undefined source that the forms without a mask have.
constexpr __mmask16 kAll = 0xffff;
FASTSSL_TARGET inline Floats from_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes));
}
FASTSSL_TARGET inline Ints to_ints(const Floats& x) {
  return Ints(_mm512_maskz_cvttps_epi32(kAll, x));
}
FASTSSL_TARGET inline Floats to_floats(const Ints& x) {
  return _mm512_maskz_cvtepi32_ps(kAll, __m512i(x));
}
FASTSSL_TARGET inline void to_bytes(const Ints& x, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAll, __m512i(x)));
}
#include "augment_passes.h"
#undef FASTSSL_TARGET
}  // namespace avx512
#endif
#undef FASTSSL_DEFINE_VECTORS
#undef FASTSSL_SHUFFLE

struct Passes {
  decltype(&baseline::load_rows) load_rows;
  decltype(&baseline::resample_columns) resample_columns;
  decltype(&baseline::resample_rows) resample_rows;
  decltype(&baseline::jitter_row) jitter_row;
  decltype(&baseline::sum_of_luma) sum_of_luma;
  decltype(&baseline::grey_row) grey_row;
  decltype(&baseline::weighted_rows) weighted_rows;
  decltype(&baseline::solarize_row) solarize_row;
};

#define FASTSSL_PASSES(isa)                                                                       \
  Passes {                                                                                        \
    isa::load_rows, isa::resample_columns, isa::resample_rows, isa::jitter_row, isa::sum_of_luma, \
        isa::grey_row, isa::weighted_rows, isa::solarize_row                                      \
  }

inline Passes best_passes() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (best_isa() == Isa::avx512) return FASTSSL_PASSES(avx512);
  if (best_isa() == Isa::avx2) return FASTSSL_PASSES(avx2);
#endif
  return FASTSSL_PASSES(baseline);
}
#undef FASTSSL_PASSES

}  // namespace fastssl
