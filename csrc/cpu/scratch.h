// Scratch memory of an op.
#pragma once

#include "simd.h"

namespace fastssl {

// `count` elements of T from where a cache line begins, for as long as this lives.
template <class T>
struct Scratch {
  static constexpr int64_t kLine = 64;
  Tensor memory;
  T* data;

  Scratch(const Tensor& like, int64_t count)
      : memory(torch::stable::new_empty(like, {count * int64_t(sizeof(T)) + kLine},
                                        ScalarType::Byte)) {
    auto* bytes = output<uint8_t>(memory);
    data =
        reinterpret_cast<T*>(bytes + (kLine - reinterpret_cast<uintptr_t>(bytes) % kLine) % kLine);
  }
};

}  // namespace fastssl
