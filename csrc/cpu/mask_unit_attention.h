// The sizes of a call of mask_unit_attention; see kernels/mask_unit_attention.
#pragma once

#include <algorithm>
#include <cmath>

#include "ranges.h"
#include "softmax.h"

namespace fastssl {

struct Geometry {
  int64_t heads, head_dim, unit_size, q_stride;
  int64_t group;  // units worked on at once

  int64_t dim() const { return heads * head_dim; }
  int64_t token_stride() const { return 3 * dim(); }
  int64_t unit_queries() const { return unit_size / q_stride; }
  float scale() const { return 1.0f / std::sqrt(float(head_dim)); }
};

}  // namespace fastssl
