// What the CUDA kernels need of the device. Kernels are written with nothing else, so that
// tests/cuda_emulator.h, which stands in for this file's first half, can run them on the host.
#pragma once

#include <cfloat>
#include <cstdint>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTSSL_DEVICE __device__ __forceinline__
#define FASTSSL_HOST_DEVICE __host__ __device__ __forceinline__

namespace fastssl {

using BFloat16 = __nv_bfloat16;
using Half = __half;

FASTSSL_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
FASTSSL_DEVICE float to_float(Half x) { return __half2float(x); }
FASTSSL_DEVICE void convert(float x, BFloat16* to) { *to = __float2bfloat16_rn(x); }
FASTSSL_DEVICE void convert(float x, Half* to) { *to = __float2half_rn(x); }

// The block's dynamic shared memory.
FASTSSL_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// 2^x to 2^-22, 0 where it would be subnormal.
FASTSSL_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A product that the compiler never contracts with a sum: the same bits in every kernel.
FASTSSL_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }

template <class X>
FASTSSL_DEVICE X shuffle_xor(X x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

FASTSSL_DEVICE void block_sync() { __syncthreads(); }

// All blocks of the cluster; clusters begin with sm_90, below which a launch has none.
FASTSSL_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// What `p` in this block's shared memory is in that of the cluster's block `rank`.
FASTSSL_DEVICE float* in_block(float* p, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  return p;
#endif
}

}  // namespace fastssl
#endif  // __CUDACC__

namespace fastssl {

constexpr int kWarp = 32;

FASTSSL_DEVICE float to_float(float x) { return x; }
FASTSSL_DEVICE void convert(float x, float* to) { *to = x; }

// V elements that are read and written at once.
template <class X, int V>
struct alignas(V * sizeof(X)) Vector {
  X x[V];
};

template <int V, class X>
FASTSSL_DEVICE Vector<X, V> load(const X* from) {
  return *reinterpret_cast<const Vector<X, V>*>(from);
}

template <int V, class X>
FASTSSL_DEVICE void store(const Vector<X, V>& v, X* to) {
  *reinterpret_cast<Vector<X, V>*>(to) = v;
}

FASTSSL_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

template <class X>
FASTSSL_DEVICE X warp_sum(X x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The same sum in every thread; `scratch` holds a number for each warp.
FASTSSL_DEVICE double block_sum(double x, double* scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  block_sync();
  if (lane == 0) scratch[warp] = x;
  block_sync();
  double total = 0.0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) total += scratch[w];
  return total;
}

}  // namespace fastssl
