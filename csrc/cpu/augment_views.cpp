// Views of decoded images; see kernels/augment_views/__init__.py for the formulas.
//
// One thread works on one view at a time, so that all its intermediate results stay in the cache.
// Planes have rows of `width` elements, the size rounded up to whole vectors.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <vector>

#include "augment_isa.h"
#include "pages.h"

namespace fastssl {
namespace {

int64_t whole_vectors(int64_t n) { return (n + 15) / 16 * 16; }

// Where a place outside [0, n) comes from once the ends are reflected.
int64_t reflected(int64_t place, int64_t n) {
  const int64_t period = std::max<int64_t>(2 * (n - 1), 1);
  place = (place % period + period) % period;
  return std::min(place, period - place);
}

// What a call shares between its views.
struct Call {
  const uint8_t* pixels;
  const int64_t *offsets, *shapes, *image, *boxes;
  const float* params;
  int64_t H, W, width, kernel_size, patch_size;
  bool cubic;
  float scale[3], shift[3];  // the normalisation as a product and a sum
  int64_t largest_h, largest_w;

  // Floats of scratch: 16 rows of a box, its rows resized to bytes, the view, its blurred rows.
  int64_t column_floats() const { return 16 * 3 * largest_w; }
  int64_t resized_floats() const { return 3 * largest_h * width / 4; }
  int64_t plane() const { return H * width; }
  int64_t blur_floats() const { return (H + kernel_size - 1) * width; }
  // A row with both ends reflected, and what a vector may read past it.
  int64_t line_floats() const { return whole_vectors(width + kernel_size); }
  int64_t scratch_floats() const {
    return std::max(column_floats(), blur_floats()) + resized_floats() + 3 * plane() +
           line_floats();
  }
};

// One row of a channel, normalised, to where it belongs in the result.
template <class T>
FASTSSL_INLINE void store_row(const Call& call, const float* row, int c, int64_t y, T* out) {
  const float scale = call.scale[c], shift = call.shift[c];
  const int64_t W = call.W, p = call.patch_size > 0 ? call.patch_size : W;
  // Without patches a row is in one piece.
  T* to = call.patch_size > 0 ? out + y / p * (W / p) * 3 * p * p + c * p * p + y % p * p
                              : out + (c * call.H + y) * W;
  for (int64_t x = 0; x < W; x += p, to += 3 * p * p) {
    for (int64_t i = 0; i < p; ++i) {
      if constexpr (std::is_same_v<T, uint8_t>) {
        // Adding 2^23 rounds to whole numbers, ties to even.
        to[i] = uint8_t(bits_of(row[x + i] * 255.0f + 0x1p23f));
      } else {
        store(to + i, row[x + i] * scale + shift);
      }
    }
  }
}

// Works on one view after another in scratch of its own.
class Worker {
 public:
  Worker(const Call& call, const Passes& passes, float* scratch) : call_(call), passes_(passes) {
    // The blur begins when the columns are used up.
    columns_ = blurred_ = scratch;
    resized_ = scratch + std::max(call.column_floats(), call.blur_floats());
    planes_ = resized_ + call.resized_floats();
    line_ = planes_ + 3 * call.plane();
  }

  // View r; `out` is the whole result.
  template <class T>
  void make(int64_t r, T* out) {
    const Params params(call_.params + r * kColumns);
    out += r * 3 * call_.H * call_.W;
    resize_columns(r, params.flip);
    colour(params);
    if (params.sigma > 0) make_gaussian(params.sigma);
    for (int c = 0; c < 3; ++c) {
      if (params.sigma > 0) blur_rows(c);
      for (int64_t y = 0; y < call_.H; ++y) {
        float* row = planes_ + c * call_.plane() + y * call_.width;
        if (params.sigma > 0) blur_columns(y, row);
        if (params.solarize) passes_.solarize_row(row, call_.width);
        with_best_isa([&]() FASTSSL_LAMBDA { store_row(call_, row, c, y, out); });
      }
    }
  }

 private:
  Row row_of(int64_t y) const {
    float* red = planes_ + y * call_.width;
    return {red, red + call_.plane(), red + 2 * call_.plane()};
  }

  void resize_columns(int64_t r, bool flip) {
    const int64_t* box = call_.boxes + r * 4;
    const int64_t image = call_.image[r], stride = call_.shapes[2 * image + 1] * 3;
    const int64_t h = box[3] - box[1], w = box[2] - box[0];
    across_.make(w, call_.W, call_.cubic, flip);
    down_.make(h, call_.H, call_.cubic, false);
    rows_ = h;
    const uint8_t* from = call_.pixels + call_.offsets[image] + box[1] * stride + box[0] * 3;
    uint8_t* to = reinterpret_cast<uint8_t*>(resized_);
    for (int64_t y = 0; y < h; y += 16) {
      const int64_t rows = std::min<int64_t>(16, h - y);
      passes_.load_rows(from + y * stride, stride, rows, w * 3, columns_);
      passes_.resample_columns(columns_, across_, rows, to + y * call_.width, call_.width,
                               h * call_.width);
    }
  }

  Row resize_row(int64_t y) {
    const Row row = row_of(y);
    float* const channels[3] = {row.r, row.g, row.b};
    for (int c = 0; c < 3; ++c) {
      const uint8_t* from =
          reinterpret_cast<const uint8_t*>(resized_) + (c * rows_ + down_.starts[y]) * call_.width;
      passes_.resample_rows(from, call_.width, down_.weights_of(y), down_.counts[y], channels[c]);
    }
    return row;
  }

  // The vertical pass of the resize, jitter and grey: fills the planes.
  void colour(const Params& params) {
    const int64_t n = call_.width;
    int contrast = 0;
    while (params.jitter && params.order[contrast] != kContrast) ++contrast;
    double sum = 0;
    for (int64_t y = 0; y < call_.H; ++y) {
      const Row row = resize_row(y);
      if (!params.jitter) continue;
      passes_.jitter_row(params, 0, contrast, 0.0f, row, n);
      sum += passes_.sum_of_luma(row, call_.W);
    }
    if (!params.jitter && !params.grey) return;
    const float mean = float(sum / double(call_.H * call_.W));
    for (int64_t y = 0; y < call_.H; ++y) {
      const Row row = row_of(y);
      if (params.jitter) passes_.jitter_row(params, contrast, 4, mean, row, n);
      if (params.grey) passes_.grey_row(row, n);
    }
  }

  // The horizontal pass over channel c, between reflections of its first and last rows.
  void blur_rows(int c) {
    const int64_t H = call_.H, W = call_.W, width = call_.width, radius = radius_;
    for (int64_t y = 0; y < H; ++y) {
      const float* row = planes_ + c * call_.plane() + y * width;
      std::copy_n(row, W, line_ + radius);
      for (int64_t i = 0; i < radius; ++i) {
        line_[i] = row[reflected(i - radius, W)];
        line_[radius + W + i] = row[reflected(W + i, W)];
      }
      passes_.weighted_rows(line_, 1, gaussian_.data(), 2 * radius + 1, width,
                            blurred_ + (radius + y) * width);
    }
    for (int64_t i = 0; i < radius; ++i) {
      std::copy_n(blurred_ + (radius + reflected(i - radius, H)) * width, width,
                  blurred_ + i * width);
      std::copy_n(blurred_ + (radius + reflected(H + i, H)) * width, width,
                  blurred_ + (radius + H + i) * width);
    }
  }

  void blur_columns(int64_t y, float* row) const {
    passes_.weighted_rows(blurred_ + y * call_.width, call_.width, gaussian_.data(),
                          2 * radius_ + 1, call_.width, row);
  }

  // Up to the radius beyond which weights are below 2^-26 of the largest, or that of the kernel.
  void make_gaussian(double sigma) {
    radius_ = int64_t(std::min(double(call_.kernel_size / 2), std::ceil(sigma * 6.01)));
    std::vector<double> weights(2 * radius_ + 1);
    double sum = 0;
    for (int64_t i = 0; i <= 2 * radius_; ++i) {
      const double distance = double(i - radius_) / sigma;
      sum += weights[i] = std::exp(-0.5 * distance * distance);
    }
    gaussian_.resize(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) gaussian_[i] = float(weights[i] / sum);
  }

  const Call& call_;
  const Passes& passes_;
  float *columns_, *blurred_, *resized_, *planes_, *line_;
  int64_t rows_ = 0, radius_ = 0;
  Filter across_, down_;
  std::vector<float> gaussian_;
};

void check_images(const Tensor& pixels, const Tensor& offsets, const Tensor& shapes) {
  const int64_t *offset = input<int64_t>(offsets), *shape = input<int64_t>(shapes);
  for (int64_t b = 0; b < offsets.numel(); ++b, shape += 2) {
    const bool fits = shape[0] >= 0 && shape[1] >= 0 && offset[b] >= 0 &&
                      shape[0] <= pixels.numel() && shape[1] <= pixels.numel() &&
                      shape[0] * shape[1] <= (pixels.numel() - offset[b]) / 3;
    STD_TORCH_CHECK(fits, "offsets and shapes must lie inside of the ", pixels.numel(),
                    " pixels, got ", shape[0], " x ", shape[1], " at ", offset[b]);
  }
}

// Also notes the largest box.
void check_views(int64_t num_images, int64_t num_views, Call& call) {
  for (int64_t r = 0; r < num_views; ++r) {
    const int64_t b = call.image[r], *box = call.boxes + r * 4;
    STD_TORCH_CHECK(b >= 0 && b < num_images, "image must lie in 0 .. ", num_images - 1, ", got ",
                    b);
    const int64_t* shape = call.shapes + 2 * b;
    const bool inside = 0 <= box[0] && box[0] < box[2] && box[2] <= shape[1] && 0 <= box[1] &&
                        box[1] < box[3] && box[3] <= shape[0];
    STD_TORCH_CHECK(inside, "boxes must lie inside of their images and hold a pixel, got ", box[0],
                    ", ", box[1], ", ", box[2], ", ", box[3], " in ", shape[0], " x ", shape[1]);
    call.largest_w = std::max(call.largest_w, box[2] - box[0]);
    call.largest_h = std::max(call.largest_h, box[3] - box[1]);
    const float* row = call.params + r * kColumns;
    bool seen[4] = {};
    for (int i = 6; i < 10; ++i) {
      if (row[i] >= 0 && row[i] < 4) seen[int(row[i])] = true;
    }
    STD_TORCH_CHECK(seen[0] && seen[1] && seen[2] && seen[3],
                    "params must hold a permutation of 0 .. 3 in columns 6 .. 9, got ", row[6],
                    ", ", row[7], ", ", row[8], ", ", row[9]);
    STD_TORCH_CHECK(std::abs(row[5]) <= 0.5f, "params must hold a hue of at most 0.5, got ",
                    row[5]);
    STD_TORCH_CHECK(row[11] >= 0, "params must hold a sigma >= 0, got ", row[11]);
  }
}

template <class T>
void make_views(const Call& call, Tensor& out) {
  const int64_t R = out.size(0);
  const int64_t chunks =
      std::max<int64_t>(1, std::min<int64_t>(R, torch::stable::get_num_threads()));
  std::array<int64_t, 2> scratch_size = {chunks, call.scratch_floats()};
  Tensor scratch =
      torch::stable::new_empty(out, {scratch_size.data(), scratch_size.size()}, ScalarType::Float);
  float* scratch_ptr = output<float>(scratch);
  T* out_ptr = output<T>(out);
  prefer_huge_pages(out_ptr, out.numel() * int64_t(sizeof(T)));
  const Passes passes = best_passes();
  // Views cost very different times; which thread makes one changes nothing in it.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Worker worker(call, passes, scratch_ptr + chunk * call.scratch_floats());
      for (int64_t r = next++; r < R; r = next++) worker.make(r, out_ptr);
    }
  });
}

void augment_views(Tensor pixels, Tensor offsets, Tensor shapes, Tensor image, Tensor boxes,
                   Tensor params, std::vector<int64_t> size, int64_t kernel_size, bool cubic,
                   std::vector<double> mean, std::vector<double> std, int64_t patch_size,
                   Tensor out) {
  check_cpu(pixels, "pixels");
  check_cpu(offsets, "offsets");
  check_cpu(shapes, "shapes");
  check_cpu(image, "image");
  check_cpu(boxes, "boxes");
  check_cpu(params, "params");
  check_cpu(out, "out");
  STD_TORCH_CHECK(params.size(1) == kColumns, "params must have ", kColumns, " columns");
  Call call{input<uint8_t>(pixels),
            input<int64_t>(offsets),
            input<int64_t>(shapes),
            input<int64_t>(image),
            input<int64_t>(boxes),
            input<float>(params),
            size[0],
            size[1],
            whole_vectors(size[1]),
            kernel_size,
            patch_size,
            cubic,
            {},
            {},
            0,
            0};
  for (int c = 0; c < 3; ++c) {
    call.scale[c] = float(1 / std[c]);
    call.shift[c] = float(-mean[c] / std[c]);
  }
  check_images(pixels, offsets, shapes);
  check_views(offsets.numel(), image.numel(), call);
  if (out.numel() == 0) return;
  if (out.scalar_type() == ScalarType::Byte) return make_views<uint8_t>(call, out);
  with_type(out.scalar_type(), "out",
            [&](auto* to) { make_views<std::remove_pointer_t<decltype(to)>>(call, out); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "augment_views(Tensor pixels, Tensor offsets, Tensor shapes, Tensor image, Tensor boxes, "
      "Tensor params, int[] size, int kernel_size, bool cubic, float[] mean, float[] std, "
      "int patch_size, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("augment_views", TORCH_BOX(&augment_views));
}

}  // namespace fastssl
