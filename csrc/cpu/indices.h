// Bounds of index tensors.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastssl {

// A wrong index would read or write outside the tensors, or leave a row unwritten; reading them all
// costs a thousandth of the copy.
template <class I>
void check_indices(const Tensor& ids, const char* name, int64_t limit) {
  const I* ptr = input<I>(ids);
  const int64_t count = ids.numel();
  I smallest = 0, largest = -1;
  with_best_isa([&]() FASTSSL_LAMBDA {
    for (int64_t i = 0; i < count; ++i) {
      smallest = std::min(smallest, ptr[i]);
      largest = std::max(largest, ptr[i]);
    }
  });
  STD_TORCH_CHECK(smallest >= 0 && largest < limit, name, " must lie in 0 .. ", limit - 1, ", got ",
                  smallest < 0 ? smallest : largest);
}

}  // namespace fastssl
