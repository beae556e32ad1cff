// Sums of columns by way of partial ones, whose order no number of threads changes.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastssl {

// Rows per partial sum.
constexpr int64_t kSumRows = 32;

// sums [C] = parts [chunks, C] added up in order.
inline void add_parts(const float* parts, int64_t chunks, int64_t C, float* sums) {
  parallel(C, kGrain, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    std::fill(sums + begin, sums + end, 0.0f);
    for (int64_t k = 0; k < chunks; ++k) {
      const float* from = parts + k * C;
      for (int64_t c = begin; c < end; ++c) sums[c] += from[c];
    }
  });
}

}  // namespace fastssl
