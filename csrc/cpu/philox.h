// Philox4x32-10 (Salmon et al., SC 2011) in lanes; the integers are those of
// kernels/common/philox.py.
#pragma once

#include "simd.h"

namespace fastssl {

constexpr int kPhiloxLanes = 16;

// On entry lane i's counter is c[0][i] .. c[3][i], on return its four words stand there.
FASTSSL_INLINE void philox(uint32_t (&c)[4][kPhiloxLanes], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c[0][i];
      const uint64_t p1 = uint64_t(0xCD9E8D57u) * c[2][i];
      c[0][i] = uint32_t(p1 >> 32) ^ c[1][i] ^ k0;
      c[1][i] = uint32_t(p1);
      c[2][i] = uint32_t(p0 >> 32) ^ c[3][i] ^ k1;
      c[3][i] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// A word as a float in [0, 1), on a grid of 2^-24.
FASTSSL_INLINE float uniform(uint32_t word) { return float(int32_t(word >> 8)) * 0x1p-24f; }

}  // namespace fastssl
