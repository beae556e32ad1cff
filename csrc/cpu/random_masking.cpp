// Random masking by a stable sort of the noise; see kernels/random_masking/__init__.py.
// B images, N tokens, K kept ones.
#include <algorithm>
#include <utility>

#include "simd.h"

namespace fastssl {
namespace {

constexpr int kDigits = 4, kDigitBits = 8, kBuckets = 1 << kDigitBits;

// The float's order as an unsigned integer: -0.0 equals 0.0, every NaN is above infinity.
FASTSSL_INLINE uint32_t sort_key(float value) {
  const uint32_t bits = bits_of(value);
  uint32_t key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  key = bits == 0x80000000u ? 0x80000000u : key;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0xffffffffu : key;
}

// Sorts items (key << 32 | index) by key, least significant digit first; every pass is stable.
// A row of 100 to 4096 takes 1 to 20 us so, a third to a sixth of std::sort; counting ranks with
// AVX-512 wins below 80 only, by less than half a microsecond.
FASTSSL_INLINE const uint64_t* radix_sort(uint64_t* items, uint64_t* spare, int64_t N) {
  uint32_t starts[kDigits][kBuckets] = {};
  for (int64_t n = 0; n < N; ++n) {
    for (int d = 0; d < kDigits; ++d) {
      ++starts[d][items[n] >> (32 + d * kDigitBits) & (kBuckets - 1)];
    }
  }
  for (int d = 0; d < kDigits; ++d) {
    uint32_t sum = 0;
    for (uint32_t& start : starts[d]) sum += std::exchange(start, sum);
    for (int64_t n = 0; n < N; ++n) {
      spare[starts[d][items[n] >> (32 + d * kDigitBits) & (kBuckets - 1)]++] = items[n];
    }
    std::swap(items, spare);
  }
  return items;
}

template <class T>
void mask_rows(const Tensor& noise, Tensor& scratch, Tensor& ids_keep, Tensor& ids_restore,
               Tensor& mask) {
  const int64_t B = noise.size(0), N = noise.size(1), K = ids_keep.size(1);
  const int64_t chunks = scratch.size(0);
  const T* noise_ptr = input<T>(noise);
  uint64_t* scratch_ptr = output<uint64_t>(scratch);
  int32_t* keep_ptr = output<int32_t>(ids_keep);
  int32_t* restore_ptr = output<int32_t>(ids_restore);
  float* mask_ptr = output<float>(mask);
  parallel(chunks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      uint64_t* items = scratch_ptr + chunk * 2 * N;
      for (int64_t b = chunk * B / chunks; b < (chunk + 1) * B / chunks; ++b) {
        const T* row = noise_ptr + b * N;
        for (int64_t n = 0; n < N; ++n) {
          items[n] = uint64_t(sort_key(load(row + n))) << 32 | uint64_t(n);
        }
        const uint64_t* sorted = radix_sort(items, items + N, N);
        for (int64_t k = 0; k < K; ++k) keep_ptr[b * K + k] = int32_t(sorted[k]);
        for (int64_t rank = 0; rank < N; ++rank) {
          const int64_t n = b * N + int64_t(uint32_t(sorted[rank]));
          restore_ptr[n] = int32_t(rank);
          mask_ptr[n] = rank < K ? 0.0f : 1.0f;
        }
      }
    }
  });
}

// scratch int64 [chunks, 2, N]: one chunk of rows is one task.
void random_masking(Tensor noise, Tensor scratch, Tensor ids_keep, Tensor ids_restore,
                    Tensor mask) {
  check_cpu(noise, "noise");
  check_cpu(scratch, "scratch");
  check_cpu(ids_keep, "ids_keep");
  check_cpu(ids_restore, "ids_restore");
  check_cpu(mask, "mask");
  STD_TORCH_CHECK(scratch.numel() == scratch.size(0) * 2 * noise.size(1), "scratch is too small");
  STD_TORCH_CHECK(ids_keep.size(1) <= noise.size(1), "len_keep must be at most N");
  with_type(noise.scalar_type(), "noise", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    mask_rows<T>(noise, scratch, ids_keep, ids_restore, mask);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "random_masking(Tensor noise, Tensor(a!) scratch, Tensor(b!) ids_keep, "
      "Tensor(c!) ids_restore, Tensor(d!) mask) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("random_masking", TORCH_BOX(&random_masking));
}

}  // namespace fastssl
