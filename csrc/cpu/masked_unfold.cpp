// Patches of the visible mask units; see kernels/masked_unfold/__init__.py for the formula.
// B images, C channels, K units kept of U, u tokens in a unit; three spatial dimensions (t, y, x).
#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

using Triple = std::array<int64_t, 3>;

FASTSSL_INLINE int64_t product(const Triple& v) { return v[0] * v[1] * v[2]; }

Triple triple(const std::vector<int64_t>& v, const char* name) {
  STD_TORCH_CHECK(v.size() == 3, name, " must have 3 entries");
  return {v[0], v[1], v[2]};
}

struct Geometry {
  Triple size, kernel, stride, padding, unit, units;

  Geometry(const Tensor& images, const std::vector<int64_t>& kernel_size,
           const std::vector<int64_t>& stride_, const std::vector<int64_t>& padding_,
           const std::vector<int64_t>& unit_size)
      : size{images.size(2), images.size(3), images.size(4)},
        kernel(triple(kernel_size, "kernel_size")),
        stride(triple(stride_, "stride")),
        padding(triple(padding_, "padding")),
        unit(triple(unit_size, "unit_size")) {
    for (int d = 0; d < 3; ++d) {
      units[d] = ((size[d] + 2 * padding[d] - kernel[d]) / stride[d] + 1) / unit[d];
    }
  }

  // The pixels that the windows of one unit's tokens span, along dimension d.
  int64_t extent(int d) const { return (unit[d] - 1) * stride[d] + kernel[d]; }
  int64_t unit_pixels(int d) const { return unit[d] * stride[d]; }
  // The first pixel that the windows of a unit span; negative inside the padding.
  Triple unit_start(int64_t id) const {
    const Triple index = {id / (units[1] * units[2]), id / units[2] % units[1], id % units[2]};
    Triple start;
    for (int d = 0; d < 3; ++d) start[d] = index[d] * unit_pixels(d) - padding[d];
    return start;
  }
  // The unit that a pixel belongs to; the last one owns what the grid leaves over.
  FASTSSL_INLINE int64_t unit_of(int d, int64_t pixel) const {
    return std::min(pixel / unit_pixels(d), units[d] - 1);
  }
  // One past the last pixel of a unit.
  FASTSSL_INLINE int64_t unit_end(int d, int64_t index) const {
    return index == units[d] - 1 ? size[d] : (index + 1) * unit_pixels(d);
  }
};

// ids_keep [B, K], int32 or int64.
struct Ids {
  const void* data;
  bool is_long;
  int64_t per_image;

  explicit Ids(const Tensor& ids)
      : data(ids.const_data_ptr()),
        is_long(ids.scalar_type() == ScalarType::Long),
        per_image(ids.size(1)) {
    check_cpu(ids, "ids_keep");
    STD_TORCH_CHECK(is_long || ids.scalar_type() == ScalarType::Int,
                    "ids_keep must be int32 or int64");
  }

  FASTSSL_INLINE int64_t operator[](int64_t i) const {
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  void check_range(int64_t batch, int64_t num_units) const {
    for (int64_t i = 0; i < batch * per_image; ++i) {
      const int64_t id = (*this)[i];
      STD_TORCH_CHECK(id >= 0 && id < num_units, "ids_keep must be in [0, ", num_units, "), got ",
                      id);
    }
  }
};

// ranks [B, U]: the position of each unit in its image's row of ids_keep, -1 if it is not kept.
int32_t* fill_ranks(const Ids& ids, int64_t batch, int64_t num_units, Tensor& ranks) {
  check_cpu(ranks, "ranks");
  int32_t* ranks_ptr = output<int32_t>(ranks);
  std::fill(ranks_ptr, ranks_ptr + batch * num_units, -1);
  for (int64_t i = 0; i < batch * ids.per_image; ++i) {
    ranks_ptr[i / ids.per_image * num_units + ids[i]] = int32_t(i % ids.per_image);
  }
  return ranks_ptr;
}

// Chunks of work: one per thread, fewer for small tensors. Each owns one row of scratch memory.
int64_t num_chunks(int64_t tasks, int64_t elements) {
  const int64_t wanted = std::min<int64_t>(torch::stable::get_num_threads(), elements / kGrain);
  return std::max<int64_t>(1, std::min(tasks, wanted));
}

// body(chunk, begin, end) over [0, tasks); body must be a FASTSSL_LAMBDA.
template <class F>
void parallel_chunks(int64_t tasks, int64_t chunks, const F& body) {
  parallel(chunks, 1, [&](int64_t first, int64_t last) FASTSSL_LAMBDA {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, chunk * tasks / chunks, (chunk + 1) * tasks / chunks);
    }
  });
}

template <class T, class O>
FASTSSL_INLINE void convert(const T* from, int64_t step, O* to, int64_t n) {
  if (step == 1) {
    for (int64_t i = 0; i < n; ++i) store(to + i, load(from + i));
  } else {
    for (int64_t i = 0; i < n; ++i) store(to + i, load(from + i * step));
  }
}

template <class O>
FASTSSL_INLINE void zero(O* to, int64_t n) {
  std::memset(static_cast<void*>(to), 0, n * sizeof(O));
}

// Pixels [begin, end), inside the image, of one row; zero in units whose entry of `ranks` (this
// row's, null: all are kept) is negative.
template <class T, class O>
FASTSSL_INLINE void copy_row(const Geometry& g, const T* row, int64_t step, const int32_t* ranks,
                             int64_t begin, int64_t end, O* to) {
  if (!ranks) return convert(row + begin * step, step, to, end - begin);
  while (begin < end) {
    const int64_t unit = g.unit_of(2, begin);
    const int64_t next = std::min(end, g.unit_end(2, unit));
    if (ranks[unit] >= 0) {
      convert(row + begin * step, step, to, next - begin);
    } else {
      zero(to, next - begin);
    }
    to += next - begin;
    begin = next;
  }
}

// One image of the batch, read by its strides.
template <class T>
struct Image {
  const T* pixels;
  int64_t channels;
  std::array<int64_t, 4> strides;  // c, t, y, x

  // As an integer: of a pixel in the padding, too, that no pointer may point to.
  FASTSSL_INLINE intptr_t address(const Triple& pixel) const {
    const int64_t offset = pixel[0] * strides[1] + pixel[1] * strides[2] + pixel[2] * strides[3];
    return reinterpret_cast<intptr_t>(pixels) + offset * int64_t(sizeof(T));
  }
};

// Hints that the bytes [p, p + n) will be read; any address may be hinted at.
FASTSSL_INLINE void prefetch(intptr_t p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(p + i));
}

// The pixels that the windows of one unit span: to [C, extent 0, extent 1, extent 2]. The rows are
// short and far apart, which hides them from the processor's prefetcher, so while a row is copied,
// the one `ahead` bytes further is fetched: the same row of the next unit.
template <class T, class O>
FASTSSL_INLINE void copy_unit(const Geometry& g, const Image<T>& image, const int32_t* ranks,
                              const Triple& start, intptr_t ahead, O* to) {
  const Triple extent = {g.extent(0), g.extent(1), g.extent(2)};
  const auto& [sc, st, sy, sx] = image.strides;
  // Pixels that lie further apart than cache lines are not worth fetching ahead.
  const int64_t row_bytes = sx * sizeof(T) <= 64 ? extent[2] * sx * int64_t(sizeof(T)) : 0;
  // The part of each row that lies inside the image.
  const int64_t left = std::min(std::max<int64_t>(-start[2], 0), extent[2]);
  const int64_t right = std::max(left, std::min(extent[2], g.size[2] - start[2]));
  for (int64_t c = 0; c < image.channels; ++c) {
    for (int64_t t = start[0]; t < start[0] + extent[0]; ++t) {
      for (int64_t y = start[1]; y < start[1] + extent[1]; ++y, to += extent[2]) {
        const int64_t offset = c * sc * int64_t(sizeof(T));
        prefetch(image.address({t, y, start[2]}) + offset + ahead, row_bytes);
        if (t < 0 || t >= g.size[0] || y < 0 || y >= g.size[1]) {
          zero(to, extent[2]);
          continue;
        }
        const int32_t* row_ranks =
            ranks ? ranks + (g.unit_of(0, t) * g.units[1] + g.unit_of(1, y)) * g.units[2] : nullptr;
        for (int64_t x = 0; x < left; ++x) store(to + x, 0.0f);
        const T* row = image.pixels + c * sc + t * st + y * sy;
        copy_row(g, row, sx, row_ranks, start[2] + left, start[2] + right, to + left);
        for (int64_t x = right; x < extent[2]; ++x) store(to + x, 0.0f);
      }
    }
  }
}

// Where the windows of one unit's tokens lie in the pixels that copy_unit gathers.
struct Windows {
  std::vector<int64_t> tokens;  // offset of each token's window, in the order of the output
  std::vector<int64_t> runs;    // offsets of a window's contiguous runs of kernel[2] pixels

  Windows(const Geometry& g, int64_t C, const std::optional<Tensor>& unit_order) {
    const int64_t plane = g.extent(1) * g.extent(2), row = g.extent(2);
    for (int64_t j = 0; j < product(g.unit); ++j) {
      const int64_t local = unit_order.has_value() ? input<int32_t>(*unit_order)[j] : j;
      tokens.push_back(local / (g.unit[1] * g.unit[2]) * g.stride[0] * plane +
                       local / g.unit[2] % g.unit[1] * g.stride[1] * row +
                       local % g.unit[2] * g.stride[2]);
    }
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t t = 0; t < g.kernel[0]; ++t) {
        for (int64_t y = 0; y < g.kernel[1]; ++y) {
          runs.push_back((c * g.extent(0) + t) * plane + y * row);
        }
      }
    }
  }
};

// A length known to the compiler (RUN > 0) turns each copy into one or two moves.
template <int64_t RUN, class O>
FASTSSL_INLINE void copy_windows(const Windows& windows, const O* pixels, int64_t run, O* to) {
  const int64_t n = RUN > 0 ? RUN : run;
  for (const int64_t token : windows.tokens) {
    for (const int64_t offset : windows.runs) {
      std::memcpy(static_cast<void*>(to), pixels + token + offset, n * sizeof(O));
      to += n;
    }
  }
}

template <class T, class O>
void forward(const Tensor& images, const Ids& ids, const std::optional<Tensor>& unit_order,
             const Geometry& g, const int32_t* ranks, Tensor& out) {
  const int64_t C = images.size(1), num_units = product(g.units), K = ids.per_image;
  const int64_t unit_elements = product(g.unit) * out.size(2), tasks = images.size(0) * K;
  const int64_t span = C * g.extent(0) * g.extent(1) * g.extent(2), image_stride = images.stride(0);
  const std::array<int64_t, 4> strides = {images.stride(1), images.stride(2), images.stride(3),
                                          images.stride(4)};
  const bool one_token = product(g.unit) == 1;
  const int64_t chunks = num_chunks(tasks, out.numel());
  const Windows windows(g, C, unit_order);
  std::array<int64_t, 2> scratch_size = {one_token ? 0 : chunks, span};
  Tensor scratch = torch::stable::new_empty(out, {scratch_size.data(), scratch_size.size()});
  O* scratch_ptr = output<O>(scratch);
  const T* images_ptr = input<T>(images);
  O* out_ptr = output<O>(out);
  prefer_huge_pages(out_ptr, out.numel() * int64_t(sizeof(O)));
  parallel_chunks(tasks, chunks, [&](int64_t chunk, int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / K, next = std::min(i + 1, end - 1);
      O* to = out_ptr + i * unit_elements;
      // The span of a unit of one token is its window.
      O* pixels = one_token ? to : scratch_ptr + chunk * span;
      const Image<T> image = {images_ptr + b * image_stride, C, strides};
      const Image<T> next_image = {images_ptr + next / K * image_stride, C, strides};
      const Triple start = g.unit_start(ids[i]);
      const intptr_t ahead = next_image.address(g.unit_start(ids[next])) - image.address(start);
      copy_unit(g, image, ranks ? ranks + b * num_units : nullptr, start, ahead, pixels);
      if (one_token) continue;
      if (g.kernel[2] == 7) {
        copy_windows<7>(windows, pixels, 7, to);
      } else {
        copy_windows<0>(windows, pixels, g.kernel[2], to);
      }
    }
  });
}

// The gradient of the patches, [B, K, u, C, kernel].
template <class O>
struct Patches {
  const O* data;
  int64_t channels, kept, tokens;  // C, K, u
  std::vector<int64_t> position;   // of each token of a unit, by its row-major index

  Patches(const Tensor& dout, const Geometry& g, int64_t C, int64_t K,
          const std::optional<Tensor>& unit_order)
      : data(input<O>(dout)), channels(C), kept(K), tokens(product(g.unit)), position(tokens) {
    for (int64_t j = 0; j < tokens; ++j) {
      position[unit_order.has_value() ? input<int32_t>(*unit_order)[j] : j] = j;
    }
  }
};

// The tokens along one dimension whose windows hold a pixel.
FASTSSL_INLINE std::array<int64_t, 2> holders(const Geometry& g, int d, int64_t pixel) {
  const int64_t past = pixel + g.padding[d] - g.kernel[d];
  return {past < 0 ? 0 : past / g.stride[d] + 1,
          std::min((pixel + g.padding[d]) / g.stride[d], g.units[d] * g.unit[d] - 1)};
}

// Adds to sums [C, W] what one row of tokens, (tt, ty, all x), holds of the row of pixels (t, y).
template <class O>
FASTSSL_INLINE void add_windows(const Geometry& g, const Patches<O>& patches, int64_t b,
                                const int32_t* ranks, int64_t tt, int64_t ty, int64_t t, int64_t y,
                                float* sums) {
  const int64_t W = g.size[2], window = product(g.kernel);
  const int64_t row_of_units = tt / g.unit[0] * g.units[1] + ty / g.unit[1];
  const int64_t run =
      (t + g.padding[0] - tt * g.stride[0]) * g.kernel[1] + y + g.padding[1] - ty * g.stride[1];
  for (int64_t tx = 0; tx < g.units[2] * g.unit[2]; ++tx) {
    const int64_t rank = ranks[row_of_units * g.units[2] + tx / g.unit[2]];
    if (rank < 0) continue;
    const int64_t local =
        (tt % g.unit[0] * g.unit[1] + ty % g.unit[1]) * g.unit[2] + tx % g.unit[2];
    const int64_t token = (b * patches.kept + rank) * patches.tokens + patches.position[local];
    const int64_t start = tx * g.stride[2] - g.padding[2];
    const int64_t first = std::max<int64_t>(0, -start), last = std::min(g.kernel[2], W - start);
    for (int64_t c = 0; c < patches.channels; ++c) {
      const O* from = patches.data + (token * patches.channels + c) * window + run * g.kernel[2];
      const int64_t to = c * W + start;
      for (int64_t j = first; j < last; ++j) sums[to + j] += load(from + j);
    }
  }
}

// One task owns one row of pixels in every channel and sums the windows that hold it in row-major
// order of their tokens, in float32.
template <class T, class O>
void backward(const Tensor& dout, const Ids& ids, const std::optional<Tensor>& unit_order,
              const Geometry& g, const int32_t* ranks, Tensor& dimages) {
  const int64_t C = dimages.size(1), W = g.size[2], num_units = product(g.units);
  const Patches<O> patches(dout, g, C, ids.per_image, unit_order);
  const int64_t tasks = dimages.size(0) * g.size[0] * g.size[1];
  const int64_t chunks = num_chunks(tasks, dimages.numel());
  std::array<int64_t, 2> scratch_size = {chunks, C * W};
  Tensor scratch = torch::stable::new_empty(dimages, {scratch_size.data(), scratch_size.size()},
                                            ScalarType::Float);
  float* scratch_ptr = output<float>(scratch);
  T* dimages_ptr = output<T>(dimages);
  parallel_chunks(tasks, chunks, [&](int64_t chunk, int64_t begin, int64_t end) FASTSSL_LAMBDA {
    float* sums = scratch_ptr + chunk * C * W;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % g.size[1], t = i / g.size[1] % g.size[0];
      const int64_t b = i / (g.size[0] * g.size[1]);
      const int32_t* image_ranks = ranks + b * num_units;
      zero(sums, C * W);
      const auto [t_first, t_last] = holders(g, 0, t);
      const auto [y_first, y_last] = holders(g, 1, y);
      for (int64_t tt = t_first; tt <= t_last; ++tt) {
        for (int64_t ty = y_first; ty <= y_last; ++ty) {
          add_windows(g, patches, b, image_ranks, tt, ty, t, y, sums);
        }
      }
      const int32_t* row_ranks =
          image_ranks + (g.unit_of(0, t) * g.units[1] + g.unit_of(1, y)) * g.units[2];
      for (int64_t c = 0; c < C; ++c) {
        T* to = dimages_ptr + (((b * C + c) * g.size[0] + t) * g.size[1] + y) * W;
        copy_row(g, sums + c * W, 1, row_ranks, 0, W, to);
      }
    }
  });
}

void masked_unfold_fwd(Tensor images, Tensor ids_keep, std::optional<Tensor> unit_order,
                       std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> unit_size,
                       std::optional<Tensor> ranks, Tensor out) {
  STD_TORCH_CHECK(images.is_cpu() && images.dim() == 5,
                  "images must be [B, C, T, H, W] on the CPU");
  check_cpu(out, "out");
  if (out.numel() == 0) return;
  const Geometry g(images, kernel_size, stride, padding, unit_size);
  const Ids ids(ids_keep);
  const int64_t num_units = product(g.units);
  ids.check_range(images.size(0), num_units);
  const int32_t* ranks_ptr =
      ranks.has_value() ? fill_ranks(ids, images.size(0), num_units, *ranks) : nullptr;
  with_type(images.scalar_type(), "images", [&](auto* in) {
    using T = std::remove_pointer_t<decltype(in)>;
    with_type(out.scalar_type(), "out", [&](auto* to) {
      using O = std::remove_pointer_t<decltype(to)>;
      forward<T, O>(images, ids, unit_order, g, ranks_ptr, out);
    });
  });
}

void masked_unfold_bwd(Tensor dout, Tensor ids_keep, std::optional<Tensor> unit_order,
                       std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> unit_size, Tensor ranks,
                       Tensor dimages) {
  check_cpu(dout, "dout");
  check_cpu(dimages, "dimages");
  if (dimages.numel() == 0) return;
  const Geometry g(dimages, kernel_size, stride, padding, unit_size);
  const Ids ids(ids_keep);
  const int64_t num_units = product(g.units);
  ids.check_range(dimages.size(0), num_units);
  const int32_t* ranks_ptr = fill_ranks(ids, dimages.size(0), num_units, ranks);
  with_type(dimages.scalar_type(), "dimages", [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    with_type(dout.scalar_type(), "dout", [&](auto* in) {
      using O = std::remove_pointer_t<decltype(in)>;
      backward<T, O>(dout, ids, unit_order, g, ranks_ptr, dimages);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "masked_unfold_fwd(Tensor images, Tensor ids_keep, Tensor? unit_order, int[] kernel_size, "
      "int[] stride, int[] padding, int[] unit_size, Tensor(a!)? ranks, Tensor(b!) out) -> ()");
  m.def(
      "masked_unfold_bwd(Tensor dout, Tensor ids_keep, Tensor? unit_order, int[] kernel_size, "
      "int[] stride, int[] padding, int[] unit_size, Tensor(a!) ranks, Tensor(b!) dimages) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("masked_unfold_fwd", TORCH_BOX(&masked_unfold_fwd));
  m.impl("masked_unfold_bwd", TORCH_BOX(&masked_unfold_bwd));
}

}  // namespace fastssl
