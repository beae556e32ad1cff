// Pooling of mask units; see kernels/mask_unit_pool/__init__.py for the formula.
// B images, N tokens, C channels, R = B N / q_stride rows of the result.
#include <cstdint>
#include <cstring>
#include <optional>

#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

// The bits of an element as an integer of its own width: no conversion, and twice the lanes.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
  static constexpr Signed kLargest = 0x7fffffff, kInfinity = 0x7f800000;
};
template <>
struct Bits<BFloat16> {
  using Unsigned = uint16_t;
  using Signed = int16_t;
  static constexpr Signed kLargest = 0x7fff, kInfinity = 0x7f80;
};
template <>
struct Bits<Half> {
  using Unsigned = uint16_t;
  using Signed = int16_t;
  static constexpr Signed kLargest = 0x7fff, kInfinity = 0x7c00;
};

// An integer that orders as the number does: both zeros are equal, and every NaN is the largest.
template <class T>
FASTSSL_INLINE typename Bits<T>::Signed key_of(typename Bits<T>::Unsigned bits) {
  using S = typename Bits<T>::Signed;
  const S magnitude = S(bits & Bits<T>::kLargest);
  const S negated = S(-magnitude);
  const S key = S(bits) < 0 ? negated : magnitude;
  return magnitude > Bits<T>::kInfinity ? Bits<T>::kLargest : key;
}

// Row of x that holds the first member of the group whose maximum is row `row` of the result.
FASTSSL_INLINE int64_t first_member(int64_t row, int64_t pooled_size, int64_t q_stride) {
  return row / pooled_size * pooled_size * q_stride + row % pooled_size;
}

// Takes one member of a group, C channels wide, into the running maximum. By value and on its own:
// what is written as bytes could otherwise be C itself, and the loop would not become vectors.
template <class T, bool kSaves>
FASTSSL_INLINE void take(const typename Bits<T>::Unsigned* __restrict from, uint8_t member,
                         int64_t C, typename Bits<T>::Unsigned* __restrict best,
                         uint8_t* __restrict argmax) {
  for (int64_t c = 0; c < C; ++c) {
    const auto value = from[c], top = best[c];
    const bool better = key_of<T>(value) > key_of<T>(top);
    best[c] = better ? value : top;
    if (kSaves) {
      const uint8_t before = argmax[c];
      argmax[c] = better ? member : before;
    }
  }
}

// The running maximum lives in the row of the result, which stays in the cache. kSaves: also
// argmax.
template <class T, bool kSaves>
void forward(const Tensor& x, int64_t pooled_size, int64_t q_stride, Tensor& out,
             uint8_t* argmax_ptr) {
  using U = typename Bits<T>::Unsigned;
  const int64_t R = out.size(0) * out.size(1), C = out.size(2);
  const U* x_ptr = input<U>(x);
  U* out_ptr = output<U>(out);
  prefer_huge_pages(out_ptr, R * C * sizeof(U));
  prefer_huge_pages(argmax_ptr, kSaves ? R * C : 0);
  parallel(R, grain_rows(q_stride * C), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      const U* from = x_ptr + first_member(row, pooled_size, q_stride) * C;
      U* best = out_ptr + row * C;
      uint8_t* argmax = kSaves ? argmax_ptr + row * C : nullptr;
      std::memcpy(best, from, C * sizeof(U));
      if (kSaves) std::memset(argmax, 0, C);
      for (int64_t r = 1; r < q_stride; ++r) {
        take<T, kSaves>(from + r * pooled_size * C, uint8_t(r), C, best, argmax);
      }
    }
  });
}

template <class T>
void backward(const Tensor& dout, const Tensor& argmax, int64_t pooled_size, int64_t q_stride,
              Tensor& dx) {
  using U = typename Bits<T>::Unsigned;
  const int64_t R = dout.size(0) * dout.size(1), C = dout.size(2);
  const U* dout_ptr = input<U>(dout);
  const uint8_t* argmax_ptr = input<uint8_t>(argmax);
  U* dx_ptr = output<U>(dx);
  prefer_huge_pages(dx_ptr, R * C * q_stride * sizeof(U));
  parallel(R, grain_rows(q_stride * C), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      const U* from = dout_ptr + row * C;
      const uint8_t* members = argmax_ptr + row * C;
      for (int64_t r = 0; r < q_stride; ++r) {
        const int64_t token = first_member(row, pooled_size, q_stride) + r * pooled_size;
        U* __restrict to = dx_ptr + token * C;
        const uint8_t member = uint8_t(r);
        for (int64_t c = 0; c < C; ++c) to[c] = members[c] == member ? from[c] : U(0);
      }
    }
  });
}

void check_sizes(const Tensor& whole, const Tensor& pooled, int64_t unit_size, int64_t q_stride) {
  STD_TORCH_CHECK(q_stride > 0 && q_stride <= 256 && unit_size > 0 && unit_size % q_stride == 0,
                  "unit_size must be divisible by q_stride, at most 256");
  STD_TORCH_CHECK(whole.dim() == 3 && pooled.dim() == 3 && whole.size(0) == pooled.size(0) &&
                      whole.size(1) % unit_size == 0 &&
                      whole.size(1) == pooled.size(1) * q_stride && whole.size(2) == pooled.size(2),
                  "x must be [B, N, C] and out [B, N / q_stride, C]");
}

void check_argmax(const Tensor& argmax, const Tensor& pooled) {
  check_cpu(argmax, "argmax");
  STD_TORCH_CHECK(argmax.scalar_type() == ScalarType::Byte && argmax.numel() == pooled.numel(),
                  "argmax must be uint8 of out's shape");
}

void mask_unit_pool_fwd(Tensor x, int64_t unit_size, int64_t q_stride, Tensor out,
                        std::optional<Tensor> argmax) {
  check_cpu(x, "x");
  check_cpu(out, "out");
  check_sizes(x, out, unit_size, q_stride);
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), "out must have x's dtype");
  if (argmax.has_value()) check_argmax(*argmax, out);
  with_type(x.scalar_type(), "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (argmax.has_value()) {
      forward<T, true>(x, unit_size / q_stride, q_stride, out, output<uint8_t>(*argmax));
    } else {
      forward<T, false>(x, unit_size / q_stride, q_stride, out, nullptr);
    }
  });
}

void mask_unit_pool_bwd(Tensor dout, Tensor argmax, int64_t unit_size, int64_t q_stride,
                        Tensor dx) {
  check_cpu(dout, "dout");
  check_cpu(dx, "dx");
  check_sizes(dx, dout, unit_size, q_stride);
  check_argmax(argmax, dout);
  STD_TORCH_CHECK(dx.scalar_type() == dout.scalar_type(), "dx must have dout's dtype");
  with_type(dx.scalar_type(), "dx", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward<T>(dout, argmax, unit_size / q_stride, q_stride, dx);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "mask_unit_pool_fwd(Tensor x, int unit_size, int q_stride, Tensor(a!) out, "
      "Tensor(b!)? argmax) -> ()");
  m.def(
      "mask_unit_pool_bwd(Tensor dout, Tensor argmax, int unit_size, int q_stride, "
      "Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("mask_unit_pool_fwd", TORCH_BOX(&mask_unit_pool_fwd));
  m.impl("mask_unit_pool_bwd", TORCH_BOX(&mask_unit_pool_bwd));
}

}  // namespace fastssl
