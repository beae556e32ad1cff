// linear_dino_cross_entropy: launches of the kernels in linear_dino_cross_entropy.cuh. The loss is
// that of dino_cross_entropy.cu, block by block of prototypes.
#include "linear_dino_cross_entropy.cuh"

#include "launch.cuh"

namespace fastssl::linear_dino {
namespace {

constexpr int kPerBlock = kThreads / kWarp;

int64_t blocks(int64_t K) { return (K + kPerBlock - 1) / kPerBlock; }

// Calls f(X* type) with null.
template <class F>
void with_element(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f((float*)nullptr);
    case ScalarType::BFloat16:
      return f((BFloat16*)nullptr);
    case ScalarType::Half:
      return f((Half*)nullptr);
    default:
      STD_TORCH_CHECK(false, "prototypes must be float32, bfloat16 or float16");
  }
}

// Calls f(std::integral_constant<int, V>): four elements at a time where rows allow it.
template <class F>
void with_vectors(bool vectors, const F& f) {
  if (vectors) {
    f(std::integral_constant<int, 4>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

void prototype_scale(Tensor prototypes, Tensor scale) {
  const DeviceGuard guard(prototypes.get_device_index());
  check_cuda(prototypes, "prototypes");
  const int64_t K = prototypes.size(0), D = prototypes.size(1);
  with_element(prototypes.scalar_type(), [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    with_vectors(D % 4 == 0 && is_aligned(prototypes), [&](auto v) {
      launch(prototype_scale_kernel<P, decltype(v)::value>, blocks(K), kThreads, 0, 0,
             current_stream(prototypes), input<P>(prototypes), K, int(D), output<float>(scale));
    });
  });
}

void prototype_gradient(Tensor product, Tensor prototypes, std::optional<Tensor> scale,
                        Tensor dprototypes) {
  const DeviceGuard guard(product.get_device_index());
  check_cuda(product, "product"), check_cuda(prototypes, "prototypes");
  check_cuda(dprototypes, "dprototypes");
  STD_TORCH_CHECK(prototypes.scalar_type() == dprototypes.scalar_type(), "dtypes must agree");
  const int64_t K = prototypes.size(0), D = prototypes.size(1);
  const bool vectors =
      D % 4 == 0 && is_aligned(product) && is_aligned(prototypes) && is_aligned(dprototypes);
  with_element(prototypes.scalar_type(), [&](auto* p) {
    with_element(product.scalar_type(), [&](auto* g) {
      using P = std::remove_pointer_t<decltype(p)>;
      using G = std::remove_pointer_t<decltype(g)>;
      with_vectors(vectors, [&](auto v) {
        launch(prototype_gradient_kernel<P, G, decltype(v)::value>, blocks(K), kThreads, 0, 0,
               current_stream(product), input<G>(product), input<P>(prototypes),
               input<float>(scale), K, int(D), output<P>(dprototypes));
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_cuda, m) {
  m.def("linear_dino_prototype_scale(Tensor prototypes, Tensor(a!) scale) -> ()");
  m.def(
      "linear_dino_prototype_gradient(Tensor product, Tensor prototypes, Tensor? scale, "
      "Tensor(a!) dprototypes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_cuda, CUDA, m) {
  m.impl("linear_dino_prototype_scale", TORCH_BOX(&prototype_scale));
  m.impl("linear_dino_prototype_gradient", TORCH_BOX(&prototype_gradient));
}

}  // namespace fastssl::linear_dino
