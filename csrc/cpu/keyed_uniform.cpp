// Uniform numbers keyed by sample; see kernels/keyed_uniform/__init__.py for the formula.
#include <algorithm>

#include "philox.h"

namespace fastssl {
namespace {

// Walks through the B * Q Philox blocks, row after row.
struct Block {
  int64_t b, q;
  FASTSSL_INLINE void advance(int64_t Q) {
    if (++q == Q) {
      q = 0;
      ++b;
    }
  }
};

// key0 and key1 hold 32 bits each.
void keyed_uniform(Tensor samples, int64_t key0, int64_t key1, Tensor out) {
  check_cpu(samples, "samples");
  check_cpu(out, "out");
  STD_TORCH_CHECK(samples.scalar_type() == ScalarType::Long, "samples must be int64");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out must be float32");
  STD_TORCH_CHECK(out.size(0) == samples.size(0), "out must hold a row per sample");
  const int64_t num = out.size(1), Q = (num + 3) / 4;
  const int64_t* samples_ptr = input<int64_t>(samples);
  float* out_ptr = output<float>(out);
  parallel(out.size(0) * Q, kGrain / 4, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    Block from{begin / Q, begin % Q}, to = from;
    for (int64_t first = begin; first < end; first += kPhiloxLanes) {
      const int lanes = int(std::min<int64_t>(kPhiloxLanes, end - first));
      uint32_t c[4][kPhiloxLanes] = {};
      for (int i = 0; i < lanes; ++i, from.advance(Q)) {
        const uint64_t sample = uint64_t(samples_ptr[from.b]);
        c[0][i] = uint32_t(from.q);
        c[2][i] = uint32_t(sample);
        c[3][i] = uint32_t(sample >> 32);
      }
      philox(c, uint32_t(key0), uint32_t(key1));
      float value[kPhiloxLanes][4];
      for (int i = 0; i < kPhiloxLanes; ++i) {
        for (int w = 0; w < 4; ++w) value[i][w] = uniform(c[w][i]);
      }
      for (int i = 0; i < lanes; ++i, to.advance(Q)) {
        const int64_t p = 4 * to.q;
        float* row = out_ptr + to.b * num + p;
        if (p + 4 <= num) {
          std::memcpy(row, value[i], sizeof(value[i]));
        } else {
          std::copy_n(value[i], num - p, row);
        }
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def("keyed_uniform(Tensor samples, int key0, int key1, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("keyed_uniform", TORCH_BOX(&keyed_uniform));
}

}  // namespace fastssl
