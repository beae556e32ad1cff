// What linear_dino_cross_entropy does to the prototypes [K, D] beside its matrix products and the
// kernels of view_cross_entropy.cuh: a warp for each prototype.
#pragma once

#include "device.cuh"

namespace fastssl::linear_dino {

constexpr int kThreads = 256;
constexpr float kSmallestNorm = 1e-12f;

FASTSSL_DEVICE int64_t own_row() {
  return int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}

// The sum of a * b over a row, the same in all lanes.
template <int V, class A, class B>
FASTSSL_DEVICE float inner_product(const A* a, const B* b, int D) {
  float sum = 0.0f;
  for (int d = threadIdx.x % kWarp * V; d < D; d += kWarp * V) {
    const Vector<A, V> x = load<V>(a + d);
    const Vector<B, V> y = load<V>(b + d);
#pragma unroll
    for (int v = 0; v < V; ++v) sum = fmaf(to_float(x.x[v]), to_float(y.x[v]), sum);
  }
  return warp_sum(sum);
}

// scale [K] = 1 / |prototype|.
template <class P, int V>
__global__ void __launch_bounds__(kThreads)
    prototype_scale_kernel(const P* prototypes, int64_t K, int D, float* scale) {
  const int64_t k = own_row();
  if (k >= K) return;
  const P* row = prototypes + k * D;
  const float norm = sqrtf(inner_product<V>(row, row, D));
  if (threadIdx.x % kWarp == 0) scale[k] = 1.0f / fmaxf(norm, kSmallestNorm);
}

// From `product` [K, D], the gradient's product with the features, to the prototypes' gradient:
// without its part along the prototype where logits were divided by the length (scale is not null).
// dprototypes may be the product.
template <class P, class G, int V>
__global__ void __launch_bounds__(kThreads)
    prototype_gradient_kernel(const G* product, const P* prototypes, const float* scale, int64_t K,
                              int D, P* dprototypes) {
  const int64_t k = own_row();
  if (k >= K) return;
  const G* g = product + k * D;
  const P* w = prototypes + k * D;
  const float s = scale ? scale[k] : 0.0f;
  const float along = scale ? inner_product<V>(w, g, D) * s * s : 0.0f;
  for (int d = threadIdx.x % kWarp * V; d < D; d += kWarp * V) {
    const Vector<G, V> x = load<V>(g + d);
    const Vector<P, V> y = load<V>(w + d);
    Vector<P, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v)
      convert(fmaf(-along, to_float(y.x[v]), to_float(x.x[v])), &out.x[v]);
    store<V>(out, dprototypes + k * D + d);
  }
}

}  // namespace fastssl::linear_dino
