// Exponentials for loops that the compiler vectorises.
//
// Scores are kept in units of log 2 (x * log2(e)), so that the exponential is 2^x: one
// multiplication less, and the power of two goes straight into the exponent bits.
#pragma once

#include "simd.h"

namespace fastssl {

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;

// Below this 2^x counts as 0: next to a largest term of 1 it is far under float32's resolution, and
// its products would be subnormal, which costs the processor a hundred cycles each.
constexpr float kSmallestExponent = -100.0f;

// 2^x for x < 127.5, within 1 ulp; 0 where x < kSmallestExponent (-infinity included), NaN for NaN.
FASTSSL_INLINE float exp2_fast(float x) {
  // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
  const float shifted = x + 12582912.0f;
  const float r = x - (shifted - 12582912.0f);
  // Minimax polynomial of 2^r on [-0.5, 0.5] with value 1 at 0.
  float p = 1.5353362e-4f;
  p = p * r + 1.3398874e-3f;
  p = p * r + 9.618437e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.931472e-1f;
  p = p * r + 1.0f;
  // A mask and no branch: the compiler would move the arithmetic into it, and then not vectorise
  // it.
  const uint32_t keep = x < kSmallestExponent ? 0u : 0xffffffffu;
  // The addition would carry some NaNs' low bits into their exponents.
  const uint32_t nan = x != x ? 0x7fc00000u : 0u;
  return float_of(((bits_of(p) + (bits_of(shifted) << 23)) & keep) | nan);
}

// exp(x) for x < 88; the rounding of x * log2(e) costs |x| / 2 more ulp.
FASTSSL_INLINE float exp_fast(float x) { return exp2_fast(x * kLog2e); }

}  // namespace fastssl
