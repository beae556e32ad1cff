// What linear_dino_cross_entropy does to the prototypes [K, D] beside its matrix products.
#include <cmath>
#include <optional>

#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

constexpr float kSmallestNorm = 1e-12f;

template <class P>
FASTSSL_INLINE float squared_norm(const P* row, int64_t D) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += load(row + d) * load(row + d);
  return sum;
}

template <class P, class G>
FASTSSL_INLINE float inner_product(const P* a, const G* b, int64_t D) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += load(a + d) * load(b + d);
  return sum;
}

// scale [K] = 1 / |prototype|.
void linear_dino_prototype_scale(Tensor prototypes, Tensor scale) {
  check_cpu(prototypes, "prototypes");
  const int64_t K = prototypes.size(0), D = prototypes.size(1);
  float* to = output<float>(scale);
  with_type(prototypes.scalar_type(), "prototypes", [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const P* from = input<P>(prototypes);
    parallel(K, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t k = begin; k < end; ++k) {
        to[k] = 1.0f / std::max(std::sqrt(squared_norm(from + k * D, D)), kSmallestNorm);
      }
    });
  });
}

template <class P, class G>
void project(const Tensor& product, const Tensor& prototypes, const std::optional<Tensor>& scale,
             const std::optional<Tensor>& lengths, Tensor& dprototypes, float* dlengths) {
  const int64_t K = prototypes.size(0), D = prototypes.size(1);
  const G* g = input<G>(product);
  const P* w = input<P>(prototypes);
  const float* scale_ptr = scale ? input<float>(*scale) : nullptr;
  const float* lengths_ptr = lengths ? input<float>(*lengths) : nullptr;
  P* to = output<P>(dprototypes);
  parallel(K, grain_rows(D), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t k = begin; k < end; ++k) {
      const G* g_row = g + k * D;
      const P* w_row = w + k * D;
      P* row = to + k * D;
      const float s = scale_ptr ? scale_ptr[k] : 0.0f;
      const float inner = scale_ptr ? inner_product(w_row, g_row, D) : 0.0f;
      const float along = inner * s * s;
      if (dlengths) dlengths[k] = inner / lengths_ptr[k];
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) store(row + d, load(g_row + d) - along * load(w_row + d));
    }
  });
}

// From `product` [K, D], the gradient's product with the features, to the prototypes' gradient:
// without its part along the prototype where logits were divided by the norm, and with learned
// lengths to these'. dprototypes may be the product.
void linear_dino_prototype_gradient(Tensor product, Tensor prototypes, std::optional<Tensor> scale,
                                    std::optional<Tensor> lengths, Tensor dprototypes,
                                    std::optional<Tensor> dlengths) {
  check_cpu(product, "product");
  check_cpu(prototypes, "prototypes");
  check_cpu(dprototypes, "dprototypes");
  STD_TORCH_CHECK(!dlengths || (lengths && scale), "dlengths needs lengths and scale");
  float* dlengths_ptr = dlengths ? output<float>(*dlengths) : nullptr;
  with_type(prototypes.scalar_type(), "prototypes", [&](auto* p) {
    with_type(product.scalar_type(), "product", [&](auto* g) {
      using P = std::remove_pointer_t<decltype(p)>;
      using G = std::remove_pointer_t<decltype(g)>;
      project<P, G>(product, prototypes, scale, lengths, dprototypes, dlengths_ptr);
    });
  });
}

// For a gradient [K, D] that matrix products are about to fill block by block.
void linear_dino_prepare_gradient(Tensor dprototypes) {
  check_cpu(dprototypes, "dprototypes");
  const int64_t size = dprototypes.scalar_type() == ScalarType::Float ? 4 : 2;
  prefer_huge_pages(dprototypes.mutable_data_ptr(), dprototypes.numel() * size);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def("linear_dino_prototype_scale(Tensor prototypes, Tensor(a!) scale) -> ()");
  m.def(
      "linear_dino_prototype_gradient(Tensor product, Tensor prototypes, Tensor? scale, "
      "Tensor? lengths, Tensor(a!) dprototypes, Tensor(b!)? dlengths) -> ()");
  m.def("linear_dino_prepare_gradient(Tensor(a!) dprototypes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("linear_dino_prototype_scale", TORCH_BOX(&linear_dino_prototype_scale));
  m.impl("linear_dino_prototype_gradient", TORCH_BOX(&linear_dino_prototype_gradient));
  m.impl("linear_dino_prepare_gradient", TORCH_BOX(&linear_dino_prepare_gradient));
}

}  // namespace fastssl
