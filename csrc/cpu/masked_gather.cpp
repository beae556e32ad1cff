// Encoder input of a masked autoencoder; see kernels/masked_gather/__init__.py for the formula.
// B images, P prefix tokens, K visible tokens, N tokens, D embedding.
#include <algorithm>
#include <optional>
#include <type_traits>

#include "indices.h"
#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

template <class To, class From>
FASTSSL_INLINE void copy_row(To* to, const From* from, int64_t D) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, D * sizeof(To));
  } else {
    for (int64_t d = 0; d < D; ++d) store(to + d, load(from + d));
  }
}

template <class T, class O, class I>
void forward(const Tensor& x, const Tensor& ids_keep, const std::optional<Tensor>& pos, int64_t P,
             Tensor& out) {
  const int64_t B = x.size(0), N = x.size(1) - P, D = x.size(2), K = ids_keep.size(1);
  check_indices<I>(ids_keep, "ids_keep", N);
  const T* x_ptr = input<T>(x);
  const I* ids_ptr = input<I>(ids_keep);
  const float* pos_ptr = pos.has_value() ? input<float>(*pos) : nullptr;
  O* out_ptr = output<O>(out);
  prefer_huge_pages(out_ptr, out.numel() * sizeof(O));
  parallel(B * (P + K), grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (P + K), o = row % (P + K);
      const int64_t source = o < P ? o : P + ids_ptr[b * K + o - P];
      const T* from = x_ptr + (b * (P + N) + source) * D;
      O* to = out_ptr + row * D;
      if (pos_ptr) {
        const float* add = pos_ptr + source * D;
        for (int64_t d = 0; d < D; ++d) store(to + d, load(from + d) + add[d]);
      } else {
        copy_row(to, from, D);
      }
    }
  });
}

// One task owns one token position in every image, so that dpos needs no atomics and its order of
// addition does not depend on the threads; without dpos a task is a run of rows of dx.
template <class T, class O, class I>
void backward(const Tensor& dout, const Tensor& ids_restore, int64_t P, Tensor& dx,
              const std::optional<Tensor>& dpos) {
  const int64_t B = dx.size(0), N = dx.size(1) - P, D = dx.size(2), K = dout.size(1) - P;
  const O* dout_ptr = input<O>(dout);
  const I* ids_ptr = input<I>(ids_restore);
  T* dx_ptr = output<T>(dx);
  prefer_huge_pages(dx_ptr, dx.numel() * sizeof(T));
  // The row of dout that goes to row n of image b, or null where it was removed.
  const auto source = [&](int64_t b, int64_t n) FASTSSL_LAMBDA {
    const int64_t rank = n < P ? n : P + ids_ptr[b * N + n - P];
    return rank < P + K ? dout_ptr + (b * (P + K) + rank) * D : nullptr;
  };
  const auto fill_dx = [&](const O* from, int64_t row) FASTSSL_LAMBDA {
    if (from) {
      copy_row(dx_ptr + row * D, from, D);
    } else {
      std::memset(static_cast<void*>(dx_ptr + row * D), 0, D * sizeof(T));
    }
  };
  if (!dpos.has_value()) {
    return parallel(B * (P + N), grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t row = begin; row < end; ++row) {
        fill_dx(source(row / (P + N), row % (P + N)), row);
      }
    });
  }
  float* dpos_ptr = static_cast<float*>(dpos->mutable_data_ptr());
  parallel(P + N, grain_rows(B * D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t n = begin; n < end; ++n) {
      float* sum = dpos_ptr + n * D;
      std::fill(sum, sum + D, 0.0f);
      for (int64_t b = 0; b < B; ++b) {
        const O* from = source(b, n);
        fill_dx(from, b * (P + N) + n);
        if (!from) continue;
        for (int64_t d = 0; d < D; ++d) sum[d] += load(from + d);
      }
    }
  });
}

void masked_gather_fwd(Tensor x, Tensor ids_keep, std::optional<Tensor> pos,
                       int64_t num_prefix_tokens, Tensor out) {
  check_cpu(x, "x");
  check_cpu(ids_keep, "ids_keep");
  check_cpu(out, "out");
  if (pos.has_value()) check_cpu(*pos, "pos");
  with_index_type(ids_keep.scalar_type(), "ids_keep", [&](auto* index) {
    using I = std::remove_pointer_t<decltype(index)>;
    with_type(x.scalar_type(), "x", [&](auto* in) {
      using T = std::remove_pointer_t<decltype(in)>;
      if (out.scalar_type() == x.scalar_type()) {
        forward<T, T, I>(x, ids_keep, pos, num_prefix_tokens, out);
      } else {
        STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out must be x's dtype or float32");
        forward<T, float, I>(x, ids_keep, pos, num_prefix_tokens, out);
      }
    });
  });
}

void masked_gather_bwd(Tensor dout, Tensor ids_restore, int64_t num_prefix_tokens, Tensor dx,
                       std::optional<Tensor> dpos) {
  check_cpu(dout, "dout");
  check_cpu(ids_restore, "ids_restore");
  check_cpu(dx, "dx");
  if (dpos.has_value()) check_cpu(*dpos, "dpos");
  with_index_type(ids_restore.scalar_type(), "ids_restore", [&](auto* index) {
    using I = std::remove_pointer_t<decltype(index)>;
    check_indices<I>(ids_restore, "ids_restore", dx.size(1) - num_prefix_tokens);
    with_type(dx.scalar_type(), "dx", [&](auto* in) {
      using T = std::remove_pointer_t<decltype(in)>;
      if (dout.scalar_type() == dx.scalar_type()) {
        backward<T, T, I>(dout, ids_restore, num_prefix_tokens, dx, dpos);
      } else {
        STD_TORCH_CHECK(dout.scalar_type() == ScalarType::Float,
                        "dout must be dx's dtype or float32");
        backward<T, float, I>(dout, ids_restore, num_prefix_tokens, dx, dpos);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "masked_gather_fwd(Tensor x, Tensor ids_keep, Tensor? pos, int num_prefix_tokens, "
      "Tensor(a!) out) -> ()");
  m.def(
      "masked_gather_bwd(Tensor dout, Tensor ids_restore, int num_prefix_tokens, Tensor(a!) dx, "
      "Tensor(b!)? dpos) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("masked_gather_fwd", TORCH_BOX(&masked_gather_fwd));
  m.impl("masked_gather_bwd", TORCH_BOX(&masked_gather_bwd));
}

}  // namespace fastssl
