// The weights of a resize; see kernels/augment_views/__init__.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastssl {

// A weight of 2^-kPrecision units is hi * 2^kSplit + lo, so that float32 holds the sums of either
// with pixels exactly, of lo for up to 1028 pixels.
constexpr int kPrecision = 22, kSplit = 7;

// The weights that take a row of pixels to one of another length: Pillow's, in its order of
// operations.
class Filter {
 public:
  std::vector<int32_t> starts, counts;

  int64_t size() const { return int64_t(starts.size()); }
  const float* weights_of(int64_t x) const { return weights_.data() + x * 2 * taps_; }

  void make(int64_t length, int64_t size, bool cubic, bool mirrored) {
    const double scale = double(length) / double(size), reach = std::max(scale, 1.0);
    const double support = (cubic ? 2.0 : 1.0) * reach;
    taps_ = 2 * int64_t(support) + 3;
    starts.resize(size);
    counts.resize(size);
    values_.resize(taps_);
    weights_.resize(size * 2 * taps_);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t x = mirrored ? size - 1 - i : i;
      const double center = (double(i) + 0.5) * scale;
      const int64_t start = std::max<int64_t>(0, int64_t(center - support + 0.5));
      const int64_t stop = std::min(length, int64_t(center + support + 0.5));
      starts[x] = int32_t(start);
      counts[x] = int32_t(stop - start);
      double sum = 0;
      for (int64_t k = start; k < stop; ++k) {
        const double distance = std::abs((double(k) - center + 0.5) / reach);
        values_[k - start] = cubic ? cubic_at(distance) : std::max(0.0, 1.0 - distance);
        sum += values_[k - start];
      }
      float* to = weights_.data() + x * 2 * taps_;
      for (int64_t k = 0; k < stop - start; ++k, to += 2) {
        const double exact = values_[k] / sum * (1 << kPrecision);
        const int32_t weight = int32_t(exact + (exact < 0 ? -0.5 : 0.5));
        const int32_t hi = (weight + (1 << (kSplit - 1))) >> kSplit;
        to[0] = float(hi);
        to[1] = float(weight - hi * (1 << kSplit));
      }
    }
  }

 private:
  static double cubic_at(double x) {
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
  }

  int64_t taps_ = 0;
  std::vector<double> values_;
  std::vector<float> weights_;  // [size][taps] pairs of hi and lo
};

}  // namespace fastssl
