// Pixel loss of a masked autoencoder; see kernels/masked_patch_mse/__init__.py for the formula.
// B images or clips, N patches in each, p = C * pt * ph * pw values in a patch.
#include <cmath>
#include <optional>

#include "simd.h"

namespace fastssl {
namespace {

constexpr float kEps = 1e-6f;
constexpr int64_t kCacheLine = 64;
// The token whose memory is fetched while another is worked on: this many further on.
constexpr int64_t kAhead = 2;

struct Patches;
// Reads the patch that begins at `from` into float32, in the prediction's order.
using Reader = void (*)(const char* from, const Patches& g, float* tile);

// Where the patches lie in the images and in which order a prediction lists their values.
struct Patches {
  const char* images;
  int64_t item;                // bytes of one pixel
  Reader read;                 // for the images' type
  int64_t C, pt, ph, pw;       // one patch
  int64_t N, grid_h, grid_w;   // the patches of one image
  int64_t sb, sc, st, sh, sw;  // strides of the images
  bool channels_last;          // (t, row, column, channel), else (channel, t, row, column)

  int64_t size() const { return C * pt * ph * pw; }
  const char* patch(int64_t token) const {
    const int64_t b = token / N, n = token % N;
    const int64_t x = n % grid_w, y = n / grid_w % grid_h, t = n / (grid_w * grid_h);
    return images + (b * sb + t * pt * st + y * ph * sh + x * pw * sw) * item;
  }
};

template <class X>
FASTSSL_INLINE void copy_row(const X* from, int64_t stride, int64_t n, float* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from + i);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from + i * stride);
  }
}

// One row of a patch, all channels, as (column, channel).
template <class X>
FASTSSL_INLINE void interleave_row(const X* from, const Patches& g, float* to) {
  if (g.C == 3 && g.sw == 1) {
    const X *r = from, *gr = from + g.sc, *b = from + 2 * g.sc;
    for (int64_t i = 0; i < g.pw; ++i) {
      to[3 * i] = load(r + i);
      to[3 * i + 1] = load(gr + i);
      to[3 * i + 2] = load(b + i);
    }
  } else if (g.C == 1 || (g.sc == 1 && g.sw == g.C)) {
    copy_row(from, g.C == 1 ? g.sw : 1, g.pw * g.C, to);
  } else {
    for (int64_t c = 0; c < g.C; ++c) {
      for (int64_t i = 0; i < g.pw; ++i) to[i * g.C + c] = load(from + c * g.sc + i * g.sw);
    }
  }
}

// Compiled apart from the loops that follow, once per type of image and not once per pair of types.
template <class X>
void read_patch(const char* bytes, const Patches& g, float* tile) {
  with_best_isa([&]() FASTSSL_LAMBDA {
    const X* from = reinterpret_cast<const X*>(bytes);
    float* to = tile;
    if (g.channels_last) {
      for (int64_t t = 0; t < g.pt; ++t) {
        for (int64_t y = 0; y < g.ph; ++y, to += g.pw * g.C) {
          interleave_row(from + t * g.st + y * g.sh, g, to);
        }
      }
    } else {
      for (int64_t c = 0; c < g.C; ++c) {
        for (int64_t t = 0; t < g.pt; ++t) {
          for (int64_t y = 0; y < g.ph; ++y, to += g.pw) {
            copy_row(from + c * g.sc + t * g.st + y * g.sh, g.sw, g.pw, to);
          }
        }
      }
    }
  });
}

// Always inlined: the compiler drops a call of a function that does nothing but prefetch.
FASTSSL_INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(from + i);
}

// The rows of a patch lie an image's width apart, where the hardware does not look ahead.
FASTSSL_INLINE void prefetch_patch(const char* from, const Patches& g) {
  if (g.sw != 1) return;
  for (int64_t c = 0; c < g.C; ++c) {
    for (int64_t t = 0; t < g.pt; ++t) {
      for (int64_t y = 0; y < g.ph; ++y) {
        prefetch(from + (c * g.sc + t * g.st + y * g.sh) * g.item, g.pw * g.item);
      }
    }
  }
}

struct Stats {
  float mean = 0.0f, inv_std = 1.0f;
};

// Sum of f(i) over [0, n), as four running sums over a quarter each: one would wait for its adder.
template <class F>
FASTSSL_INLINE float sum_of(int64_t n, const F& f) {
  const int64_t q = n / 4;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < q; ++i) {
    a += f(i);
    b += f(i + q);
    c += f(i + 2 * q);
    d += f(i + 3 * q);
  }
  for (int64_t i = 4 * q; i < n; ++i) a += f(i);
  return (a + b) + (c + d);
}

// Mean first: a sum of squares less the squared mean loses every digit beside a large mean.
FASTSSL_INLINE Stats patch_stats(const float* tile, int64_t p) {
  float mean = sum_of(p, [&](int64_t i) FASTSSL_LAMBDA { return tile[i]; }) / float(p);
  // What the rounded sum left over.
  mean += sum_of(p, [&](int64_t i) FASTSSL_LAMBDA { return tile[i] - mean; }) / float(p);
  const float squares = sum_of(p, [&](int64_t i) FASTSSL_LAMBDA {
    const float d = tile[i] - mean;
    return d * d;
  });
  return {mean, 1.0f / std::sqrt(squares / float(p - 1) + kEps)};
}

template <class T>
FASTSSL_INLINE float squared_error(const T* pred, const float* tile, Stats s, int64_t p) {
  return sum_of(p, [&](int64_t i) FASTSSL_LAMBDA {
    const float d = load(pred + i) - (tile[i] - s.mean) * s.inv_std;
    return d * d;
  });
}

// Runs body(token, row, tile) over all tokens, row the token's prediction and tile its patch in
// float32, both null for a token outside the loss. Each worker owns a span of tokens and one tile.
template <class T, class F>
void for_each_token(const Tensor& pred, const Tensor& mask, const Patches& g, Tensor& scratch,
                    const F& body) {
  const int64_t tokens = mask.numel(), workers = scratch.size(0), p = g.size();
  const int64_t stride_b = pred.stride(0), stride_n = pred.stride(1);
  const T* pred_ptr = input<T>(pred);
  const float* mask_ptr = input<float>(mask);
  float* tiles = output<float>(scratch);
  parallel(workers, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t last = tokens * (w + 1) / workers;
      float* tile = tiles + w * p;
      for (int64_t i = tokens * w / workers; i < last; ++i) {
        const int64_t next = i + kAhead;
        if (next < last && mask_ptr[next] != 0.0f) {
          const T* row = pred_ptr + next / g.N * stride_b + next % g.N * stride_n;
          prefetch(reinterpret_cast<const char*>(row), p * int64_t(sizeof(T)));
          prefetch_patch(g.patch(next), g);
        }
        if (mask_ptr[i] == 0.0f) {
          body(i, static_cast<const T*>(nullptr), nullptr);
        } else {
          g.read(g.patch(i), g, tile);
          body(i, pred_ptr + i / g.N * stride_b + i % g.N * stride_n, tile);
        }
      }
    }
  });
}

template <class T>
void forward(const Tensor& pred, const Tensor& mask, const Patches& g, Tensor& scratch,
             Tensor& token_losses, const std::optional<Tensor>& stats) {
  const int64_t p = g.size();
  float* losses = output<float>(token_losses);
  float* stats_ptr = stats.has_value() ? static_cast<float*>(stats->mutable_data_ptr()) : nullptr;
  for_each_token<T>(pred, mask, g, scratch,
                    [&](int64_t i, const T* row, const float* tile) FASTSSL_LAMBDA {
                      Stats s;
                      if (row && stats_ptr) s = patch_stats(tile, p);
                      losses[i] = row ? squared_error(row, tile, s, p) / float(p) : 0.0f;
                      if (stats_ptr) {
                        stats_ptr[2 * i] = s.mean;
                        stats_ptr[2 * i + 1] = s.inv_std;
                      }
                    });
}

template <class T>
void backward(float dloss, const Tensor& pred, const Tensor& mask, const Patches& g,
              const std::optional<Tensor>& stats, Tensor& scratch, Tensor& dpred) {
  const int64_t p = g.size();
  const float* mask_ptr = input<float>(mask);
  const float* stats_ptr = stats.has_value() ? input<float>(*stats) : nullptr;
  T* dpred_ptr = output<T>(dpred);
  for_each_token<T>(pred, mask, g, scratch,
                    [&](int64_t i, const T* row, const float* tile) FASTSSL_LAMBDA {
                      T* to = dpred_ptr + i * p;
                      if (!row) {
                        std::memset(to, 0, p * sizeof(T));
                        return;
                      }
                      const float mean = stats_ptr ? stats_ptr[2 * i] : 0.0f;
                      const float inv_std = stats_ptr ? stats_ptr[2 * i + 1] : 1.0f;
                      const float scale = dloss * mask_ptr[i];
                      for (int64_t j = 0; j < p; ++j) {
                        store(to + j, scale * (load(row + j) - (tile[j] - mean) * inv_std));
                      }
                    });
}

// loss = sum(mask * token_losses) * inv_total, inv_total = 1 / sum(mask); both 0 for an empty mask.
void reduce(const Tensor& token_losses, const Tensor& mask, Tensor& loss, Tensor& inv_total) {
  const float *losses = input<float>(token_losses), *weights = input<float>(mask);
  double sum = 0.0, total = 0.0;
  for (int64_t i = 0; i < mask.numel(); ++i) {
    sum += double(weights[i]) * double(losses[i]);
    total += double(weights[i]);
  }
  const double inverse = total != 0.0 ? 1.0 / total : 0.0;
  *output<float>(loss) = float(sum * inverse);
  *output<float>(inv_total) = float(inverse);
}

Patches describe(const Tensor& pred, const Tensor& images, int64_t pt, int64_t ph, int64_t pw,
                 bool channels_last) {
  Patches g;
  g.images = static_cast<const char*>(images.const_data_ptr());
  with_type(images.scalar_type(), "images", [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    g.item = sizeof(X), g.read = read_patch<X>;
  });
  g.C = images.size(1), g.pt = pt, g.ph = ph, g.pw = pw;
  g.N = pred.size(1), g.grid_h = images.size(3) / ph, g.grid_w = images.size(4) / pw;
  g.sb = images.stride(0), g.sc = images.stride(1), g.st = images.stride(2);
  g.sh = images.stride(3), g.sw = images.stride(4);
  g.channels_last = channels_last;
  STD_TORCH_CHECK(pred.is_cpu() && images.is_cpu(), "pred and images must be on the CPU");
  STD_TORCH_CHECK(pred.size(2) == g.size(), "pred must hold p values per token");
  STD_TORCH_CHECK(pred.stride(2) == 1, "pred must hold a token as one span");
  STD_TORCH_CHECK(images.size(2) / pt * g.grid_h * g.grid_w == g.N, "pred must hold N tokens");
  return g;
}

void masked_patch_mse_fwd(Tensor pred, Tensor images, Tensor mask, int64_t pt, int64_t ph,
                          int64_t pw, bool channels_last, Tensor scratch, Tensor token_losses,
                          std::optional<Tensor> stats, Tensor loss, Tensor inv_total) {
  const Patches g = describe(pred, images, pt, ph, pw, channels_last);
  check_cpu(mask, "mask");
  with_type(pred.scalar_type(), "pred", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward<T>(pred, mask, g, scratch, token_losses, stats);
  });
  reduce(token_losses, mask, loss, inv_total);
}

void masked_patch_mse_bwd(Tensor dloss, Tensor pred, Tensor images, Tensor mask,
                          std::optional<Tensor> stats, Tensor inv_total, int64_t pt, int64_t ph,
                          int64_t pw, bool channels_last, Tensor scratch, Tensor dpred) {
  const Patches g = describe(pred, images, pt, ph, pw, channels_last);
  check_cpu(mask, "mask");
  check_cpu(dpred, "dpred");
  const float scale = *input<float>(dloss) * *input<float>(inv_total) * 2.0f / float(g.size());
  with_type(pred.scalar_type(), "pred", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward<T>(scale, pred, mask, g, stats, scratch, dpred);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "masked_patch_mse_fwd(Tensor pred, Tensor images, Tensor mask, int patch_t, int patch_h, "
      "int patch_w, bool channels_last, Tensor(a!) scratch, Tensor(b!) token_losses, "
      "Tensor(c!)? stats, Tensor(d!) loss, Tensor(e!) inv_total) -> ()");
  m.def(
      "masked_patch_mse_bwd(Tensor dloss, Tensor pred, Tensor images, Tensor mask, Tensor? stats, "
      "Tensor inv_total, int patch_t, int patch_h, int patch_w, bool channels_last, "
      "Tensor(a!) scratch, Tensor(b!) dpred) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("masked_patch_mse_fwd", TORCH_BOX(&masked_patch_mse_fwd));
  m.impl("masked_patch_mse_bwd", TORCH_BOX(&masked_patch_mse_bwd));
}

}  // namespace fastssl
