// The passes of a resize, the colours and the passes of a blur over whole vectors: see
// augment_views.cpp. The length of a row of floats, `width`, is a multiple of 16.
//
// Included once per instruction set, inside a namespace of its own that has the vectors and their
// conversions, and with FASTSSL_TARGET set; hence no include guard. Plain loops in a lambda of
// `with_best_isa` would not do: sums have to stay in registers over loops of unknown length, and
// the choices that a hue takes are made branches of, which no loop is vectorised with.

typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int kParts = 16 / kLanes;  // vectors that hold 16 values

FASTSSL_TARGET inline Floats& at(float* row, int64_t i) {
  return *reinterpret_cast<Floats*>(row + i);
}

FASTSSL_TARGET inline Floats at(const float* row, int64_t i) {
  return *reinterpret_cast<const Floats*>(row + i);
}

// [16 rows][16 bytes] -> [16 bytes][16 rows]: a perfect shuffle of all the bytes, four times.
FASTSSL_TARGET inline void transpose(Bytes* block) {
  Bytes other[16];
  for (int round = 0; round < 4; ++round) {
    const Bytes* from = round % 2 ? other : block;
    Bytes* to = round % 2 ? block : other;
    for (int i = 0; i < 8; ++i) {
      const Bytes a = from[i], b = from[i + 8];
      to[2 * i] = FASTSSL_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] =
          FASTSSL_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }
}

// (hi * 2^kSplit + lo) / 2^kPrecision, rounded to 8 bits; both are whole numbers.
FASTSSL_TARGET inline Ints round_to_levels(const Floats& hi, const Floats& lo) {
  const Ints sums = (to_ints(hi) << kSplit) + to_ints(lo);
  const Ints levels = (sums + (1 << (kPrecision - 1))) >> kPrecision;
  const Ints positive = levels < 0 ? Ints{} : levels;
  return positive > 255 ? Ints{} + 255 : positive;
}

// `rows` (at most 16) rows of n bytes -> [n][16] floats; rows that are missing repeat the last.
FASTSSL_TARGET inline void load_rows(const uint8_t* from, int64_t stride, int64_t rows, int64_t n,
                                     float* to) {
  Bytes block[16];
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(block);
  int64_t x = 0;
  for (; x + 16 <= n; x += 16) {
    for (int64_t r = 0; r < 16; ++r) {
      block[r] = *reinterpret_cast<const Bytes*>(from + std::min(r, rows - 1) * stride + x);
    }
    transpose(block);
    for (int i = 0; i < 256; i += kLanes) at(to, x * 16 + i) = from_bytes(bytes + i);
  }
  if (x == n) return;
  for (int64_t r = 0; r < 16; ++r) {
    // What follows the last row may not be ours to read.
    block[r] = Bytes{};
    std::memcpy(&block[r], from + std::min(r, rows - 1) * stride + x, n - x);
  }
  transpose(block);
  for (int64_t i = 0; i < (n - x) * 16; i += kLanes) at(to, x * 16 + i) = from_bytes(bytes + i);
}

// The horizontal pass over 16 rows: from [w * 3][16] to `rows` rows of planes of bytes.
FASTSSL_TARGET inline void resample_columns(const float* from, const Filter& filter, int64_t rows,
                                            uint8_t* to, int64_t width, int64_t plane) {
  const int64_t size = filter.size();
  for (int64_t x = 0; x < size; x += 16) {
    Bytes blocks[3][16];
    for (int64_t i = 0; i < 16; ++i) {
      // Columns that pad a row repeat its last one.
      const int64_t column = std::min(x + i, size - 1), taps = filter.counts[column];
      const float *pixels = from + int64_t(filter.starts[column]) * 48,
                  *weights = filter.weights_of(column);
      Floats hi[3][kParts] = {}, lo[3][kParts] = {};
      for (int64_t k = 0; k < taps; ++k) {
        for (int c = 0; c < 3; ++c) {
          for (int p = 0; p < kParts; ++p) {
            const Floats v = at(pixels, k * 48 + c * 16 + p * kLanes);
            hi[c][p] += weights[2 * k] * v;
            lo[c][p] += weights[2 * k + 1] * v;
          }
        }
      }
      for (int c = 0; c < 3; ++c) {
        uint8_t* bytes = reinterpret_cast<uint8_t*>(&blocks[c][i]);
        for (int p = 0; p < kParts; ++p) {
          to_bytes(round_to_levels(hi[c][p], lo[c][p]), bytes + p * kLanes);
        }
      }
    }
    for (int c = 0; c < 3; ++c) {
      transpose(blocks[c]);
      for (int64_t r = 0; r < rows; ++r) {
        *reinterpret_cast<Bytes*>(to + c * plane + r * width + x) = blocks[c][r];
      }
    }
  }
}

// The vertical pass for one row of one plane: to levels / 255.
FASTSSL_TARGET inline void resample_rows(const uint8_t* from, int64_t width, const float* weights,
                                         int64_t taps, float* to) {
  constexpr int kVectors = 2 * kParts > 4 ? 4 : 2 * kParts;
  int64_t x = 0;
  for (; x + kVectors * kLanes <= width; x += kVectors * kLanes) {
    Floats hi[kVectors] = {}, lo[kVectors] = {};
    for (int64_t k = 0; k < taps; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        const Floats pixels = from_bytes(from + k * width + x + v * kLanes);
        hi[v] += weights[2 * k] * pixels;
        lo[v] += weights[2 * k + 1] * pixels;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      at(to, x + v * kLanes) = to_floats(round_to_levels(hi[v], lo[v])) * (1.0f / 255);
    }
  }
  for (; x < width; x += kLanes) {
    Floats hi = {}, lo = {};
    for (int64_t k = 0; k < taps; ++k) {
      const Floats pixels = from_bytes(from + k * width + x);
      hi += weights[2 * k] * pixels;
      lo += weights[2 * k + 1] * pixels;
    }
    at(to, x) = to_floats(round_to_levels(hi, lo)) * (1.0f / 255);
  }
}

FASTSSL_TARGET inline Floats clip(const Floats& x) {
  const Floats positive = Floats{} > x ? Floats{} : x, one = Floats{} + 1.0f;
  return one < positive ? one : positive;
}

FASTSSL_TARGET inline Floats luma(const Floats& r, const Floats& g, const Floats& b) {
  return kLuma[0] * r + kLuma[1] * g + kLuma[2] * b;
}

// Every channel to clip(factor * channel + other), with other the same for all pixels.
FASTSSL_TARGET inline void scale_row(const Row& row, int64_t width, float factor, float other) {
  for (float* channel : {row.r, row.g, row.b}) {
    for (int64_t i = 0; i < width; i += kLanes) {
      at(channel, i) = clip(at(channel, i) * factor + other);
    }
  }
}

FASTSSL_TARGET inline void saturate_row(const Row& row, int64_t width, float factor) {
  for (int64_t i = 0; i < width; i += kLanes) {
    Floats &r = at(row.r, i), &g = at(row.g, i), &b = at(row.b, i);
    const Floats other = luma(r, g, b) * (1.0f - factor);
    r = clip(r * factor + other);
    g = clip(g * factor + other);
    b = clip(b * factor + other);
  }
}

// A channel as a function of its phase, in sixths of a turn and above -6.
FASTSSL_TARGET inline Floats hue_channel(const Floats& value, const Floats& chroma,
                                         const Floats& phase) {
  const Floats positive = phase + 6.0f;
  const Floats rising = positive - 6.0f * to_floats(to_ints(positive * (1.0f / 6.0f)));
  const Floats falling = 4.0f - rising;
  return value - chroma * clip(rising < falling ? rising : falling);
}

FASTSSL_TARGET inline void turn_hue_row(const Row& row, int64_t width, float shift) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats r = at(row.r, i), g = at(row.g, i), b = at(row.b, i);
    const Floats high = r > g ? r : g, low = r < g ? r : g;
    const Floats value = high > b ? high : b, chroma = value - (low < b ? low : b);
    const Floats in_red = g - b, in_green = 2.0f * chroma + b - r, in_blue = 4.0f * chroma + r - g;
    const Floats sector = r == value ? in_red : (g == value ? in_green : in_blue);
    const Floats divisor = chroma == 0.0f ? Floats{} + 1.0f : chroma;
    const Floats hue = sector / divisor + 6.0f * shift;
    at(row.r, i) = hue_channel(value, chroma, hue + 5.0f);
    at(row.g, i) = hue_channel(value, chroma, hue + 3.0f);
    at(row.b, i) = hue_channel(value, chroma, hue + 1.0f);
  }
}

// Positions [from, to) of the order of a jitter; `mean` is that of the luma before the contrast.
FASTSSL_TARGET inline void jitter_row(const Params& params, int from, int to, float mean,
                                      const Row& row, int64_t width) {
  for (int i = from; i < to; ++i) {
    const float factor = params.factors[params.order[i]];
    switch (params.order[i]) {
      case kBrightness:
        scale_row(row, width, factor, 0.0f);
        break;
      case kContrast:
        scale_row(row, width, factor, mean * (1.0f - factor));
        break;
      case kSaturation:
        saturate_row(row, width, factor);
        break;
      case kHue:
        turn_hue_row(row, width, factor);
    }
  }
}

// Over the first n pixels, in an order that depends on n only.
FASTSSL_TARGET inline double sum_of_luma(const Row& row, int64_t n) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += luma(at(row.r, i), at(row.g, i), at(row.b, i));
  double sum = 0;
  for (; i < n; ++i) sum += kLuma[0] * row.r[i] + kLuma[1] * row.g[i] + kLuma[2] * row.b[i];
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

FASTSSL_TARGET inline void grey_row(const Row& row, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    at(row.r, i) = at(row.g, i) = at(row.b, i) = luma(at(row.r, i), at(row.g, i), at(row.b, i));
  }
}

// x and 1 - x meet at the threshold of a half.
FASTSSL_TARGET inline void solarize_row(float* row, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats x = at(row, i), inverse = 1.0f - x;
    at(row, i) = x < inverse ? x : inverse;
  }
}

// to[x] = sum over k of weights[k] * from[k * stride + x].
FASTSSL_TARGET inline void weighted_rows(const float* from, int64_t stride, const float* weights,
                                         int64_t taps, int64_t width, float* to) {
  constexpr int kVectors = 8;
  int64_t x = 0;
  for (; x + kVectors * kLanes <= width; x += kVectors * kLanes) {
    Floats sums[kVectors] = {};
    for (int64_t k = 0; k < taps; ++k) {
      const float* row = from + k * stride + x;
      for (int v = 0; v < kVectors; ++v) sums[v] += weights[k] * at(row, v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) at(to, x + v * kLanes) = sums[v];
  }
  for (; x < width; x += kLanes) {
    Floats sum = {};
    for (int64_t k = 0; k < taps; ++k) sum += weights[k] * at(from, k * stride + x);
    at(to, x) = sum;
  }
}
