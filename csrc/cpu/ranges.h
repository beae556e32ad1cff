// Parts and blocks of a range.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastssl {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `i` of `parts` equal ones of [0, n).
inline Range part_of(int64_t n, int64_t i, int64_t parts) {
  return {n * i / parts, n * (i + 1) / parts};
}

// Block `i` of blocks of `size` of [0, n).
inline Range block_of(int64_t n, int64_t i, int64_t size) {
  return {i * size, std::min(n, (i + 1) * size)};
}

}  // namespace fastssl
