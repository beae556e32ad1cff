// Decoder input of a masked autoencoder; see kernels/masked_scatter/__init__.py for the formula.
// B images, P prefix tokens, K visible tokens, N tokens, D embedding.
#include <algorithm>
#include <optional>

#include "indices.h"
#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

// Output positions that one task sums over the batch at a time.
constexpr int64_t kTile = 4;

// The row of x that output row `o` of one image comes from, or -1 for the mask token.
template <class I>
FASTSSL_INLINE int64_t source_row(const I* ids_restore, int64_t o, int64_t P, int64_t K) {
  if (o < P) return o;
  const int64_t rank = ids_restore[o - P];
  return rank < K ? P + rank : -1;
}

template <class T, class O, class I>
void forward(const Tensor& x, const Tensor& mask_token, const Tensor& ids_restore,
             const std::optional<Tensor>& pos, int64_t P, Tensor& out) {
  const int64_t B = x.size(0), K = x.size(1) - P, D = x.size(2), N = ids_restore.size(1);
  check_indices<I>(ids_restore, "ids_restore", N);
  const T* x_ptr = input<T>(x);
  const float* mask_ptr = input<float>(mask_token);
  const I* ids_ptr = input<I>(ids_restore);
  const float* pos_ptr = pos.has_value() ? input<float>(*pos) : nullptr;
  O* out_ptr = output<O>(out);
  prefer_huge_pages(out_ptr, out.numel() * sizeof(O));
  parallel(B * (P + N), grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (P + N), o = row % (P + N);
      const int64_t source = source_row(ids_ptr + b * N, o, P, K);
      O* to = out_ptr + row * D;
      const float* add = pos_ptr ? pos_ptr + o * D : nullptr;
      if (source >= 0) {
        const T* from = x_ptr + (b * (P + K) + source) * D;
        if (add) {
          for (int64_t d = 0; d < D; ++d) store(to + d, load(from + d) + add[d]);
        } else {
          for (int64_t d = 0; d < D; ++d) store(to + d, load(from + d));
        }
      } else if (add) {
        for (int64_t d = 0; d < D; ++d) store(to + d, mask_ptr[d] + add[d]);
      } else {
        for (int64_t d = 0; d < D; ++d) store(to + d, mask_ptr[d]);
      }
    }
  });
}

// One task owns a tile of output positions in every image, so that dpos needs no atomics and its
// order of addition does not depend on the threads; a tile, since longer runs of memory are faster.
// partial [P + N, D] receives the mask token's share.
template <class T, class O, class I>
void backward(const Tensor& dout, const Tensor& ids_restore, int64_t P, Tensor& dx,
              const std::optional<Tensor>& partial, const std::optional<Tensor>& dpos) {
  const int64_t B = dx.size(0), K = dx.size(1) - P, D = dx.size(2), N = ids_restore.size(1);
  check_indices<I>(ids_restore, "ids_restore", N);
  const O* dout_ptr = input<O>(dout);
  const I* ids_ptr = input<I>(ids_restore);
  T* dx_ptr = output<T>(dx);
  float* partial_ptr =
      partial.has_value() ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr;
  float* dpos_ptr = dpos.has_value() ? static_cast<float*>(dpos->mutable_data_ptr()) : nullptr;
  const int64_t tiles = (P + N + kTile - 1) / kTile;
  parallel(tiles, grain_rows(B * D * kTile), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    const int64_t first = begin * kTile, last = std::min(end * kTile, P + N);
    if (partial_ptr) std::fill(partial_ptr + first * D, partial_ptr + last * D, 0.0f);
    if (dpos_ptr) std::fill(dpos_ptr + first * D, dpos_ptr + last * D, 0.0f);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t stop = std::min((tile + 1) * kTile, P + N);
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t o = tile * kTile; o < stop; ++o) {
          const O* from = dout_ptr + (b * (P + N) + o) * D;
          const int64_t source = source_row(ids_ptr + b * N, o, P, K);
          if (source >= 0) {
            T* to = dx_ptr + (b * (P + K) + source) * D;
            for (int64_t d = 0; d < D; ++d) store(to + d, load(from + d));
          } else if (partial_ptr) {
            float* sum = partial_ptr + o * D;
            for (int64_t d = 0; d < D; ++d) sum[d] += load(from + d);
          }
          if (dpos_ptr) {
            float* sum = dpos_ptr + o * D;
            for (int64_t d = 0; d < D; ++d) sum[d] += load(from + d);
          }
        }
      }
    }
  });
}

void masked_scatter_fwd(Tensor x, Tensor mask_token, Tensor ids_restore, std::optional<Tensor> pos,
                        int64_t num_prefix_tokens, Tensor out) {
  check_cpu(x, "x");
  check_cpu(mask_token, "mask_token");
  check_cpu(ids_restore, "ids_restore");
  check_cpu(out, "out");
  if (pos.has_value()) check_cpu(*pos, "pos");
  with_index_type(ids_restore.scalar_type(), "ids_restore", [&](auto* index) {
    using I = std::remove_pointer_t<decltype(index)>;
    with_type(x.scalar_type(), "x", [&](auto* in) {
      using T = std::remove_pointer_t<decltype(in)>;
      if (out.scalar_type() == x.scalar_type()) {
        forward<T, T, I>(x, mask_token, ids_restore, pos, num_prefix_tokens, out);
      } else {
        STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out must be x's dtype or float32");
        forward<T, float, I>(x, mask_token, ids_restore, pos, num_prefix_tokens, out);
      }
    });
  });
}

void masked_scatter_bwd(Tensor dout, Tensor ids_restore, int64_t num_prefix_tokens, Tensor dx,
                        std::optional<Tensor> partial, std::optional<Tensor> dpos) {
  check_cpu(dout, "dout");
  check_cpu(ids_restore, "ids_restore");
  check_cpu(dx, "dx");
  if (partial.has_value()) check_cpu(*partial, "partial");
  if (dpos.has_value()) check_cpu(*dpos, "dpos");
  with_index_type(ids_restore.scalar_type(), "ids_restore", [&](auto* index) {
    using I = std::remove_pointer_t<decltype(index)>;
    with_type(dx.scalar_type(), "dx", [&](auto* in) {
      using T = std::remove_pointer_t<decltype(in)>;
      if (dout.scalar_type() == dx.scalar_type()) {
        backward<T, T, I>(dout, ids_restore, num_prefix_tokens, dx, partial, dpos);
      } else {
        STD_TORCH_CHECK(dout.scalar_type() == ScalarType::Float,
                        "dout must be dx's dtype or float32");
        backward<T, float, I>(dout, ids_restore, num_prefix_tokens, dx, partial, dpos);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "masked_scatter_fwd(Tensor x, Tensor mask_token, Tensor ids_restore, Tensor? pos, "
      "int num_prefix_tokens, Tensor(a!) out) -> ()");
  m.def(
      "masked_scatter_bwd(Tensor dout, Tensor ids_restore, int num_prefix_tokens, Tensor(a!) dx, "
      "Tensor(b!)? partial, Tensor(c!)? dpos) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("masked_scatter_fwd", TORCH_BOX(&masked_scatter_fwd));
  m.impl("masked_scatter_bwd", TORCH_BOX(&masked_scatter_bwd));
}

}  // namespace fastssl
