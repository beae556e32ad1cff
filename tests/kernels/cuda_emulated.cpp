// The kernels of csrc/cuda on tests/cuda_emulator.h, called through ctypes by test_cuda_emulated.py
// with the launches of csrc/cuda/dino_cross_entropy.cu in small.
#include "cuda_emulator.h"
#include "view_cross_entropy.cuh"

using namespace fastssl;

namespace {

template <class X, int V>
void run(Problem p, Pass a, bool fused, unsigned threads, float* per_image, const float* dloss,
         float* loss, float* entropy, float* norm) {
  const int warps = int(threads) / kWarp;
  const Memory<X> memory(nullptr, p.S, p.T, a, warps, fused);
  const unsigned blocks = unsigned(a.cells * a.slices), images = unsigned(p.B);
  const size_t bytes = size_t(memory.bytes);
  if (fused) {
    emulate(blocks, threads, bytes, unsigned(a.cells), [&] { view_pass_kernel<X, V, true>(p, a); });
  } else {
    emulate(blocks, threads, bytes, 0, [&] { view_pass_kernel<X, V, false>(p, a); });
    emulate(images, threads, size_t(p.S + 2 * p.T) * 8, 0, [&] {
      combine_kernel(p, a.parts, a.cells, a.student_stats, a.teacher_stats, per_image);
    });
  }
  emulate(1, threads, size_t(warps) * 8, 0,
          [&] { total_kernel(p, per_image, loss, entropy, norm); });
  X* dstudent = static_cast<X*>(a.dstudent);
  if (fused) {
    emulate(3, threads, 0, 0, [&] { scale_kernel<X, V>(dstudent, p.S * p.B * p.K, dloss); });
  } else {
    emulate(images * unsigned(a.cells), threads, size_t(p.T * a.W) * 4, 0, [&] {
      gradient_kernel<X, V>(p, a.cells, a.W, dloss, a.student_stats, a.teacher_stats, norm,
                            dstudent);
    });
  }
}

}  // namespace

// Element types: 0 float32, 1 bfloat16, 2 float16. temps are two floats in host memory; those that
// may be absent are null.
extern "C" void dino_cross_entropy(int type, int vectors, int fused, int threads,
                                   const void* student, const void* teacher, const float* temps,
                                   const float* center, const float* log_u, int64_t log_u_stride,
                                   const float* log_v, const float* weights,
                                   const int64_t* num_rows, int S, int T, int64_t B, int64_t K,
                                   int skip, int mean, int cells, int W, int slices, float* parts,
                                   float* sums, float* student_stats, float* teacher_stats,
                                   float* per_image, const float* dloss, float* loss,
                                   float* entropy, float* norm, void* dstudent) {
  const Problem p{student, teacher,      temps, center, log_u, log_v, weights,   num_rows, B,
                  K,       log_u_stride, S,     T,      0.0,   0.0,   skip != 0, mean != 0};
  const Pass a{cells, W, slices, parts, sums, student_stats, teacher_stats, per_image, dstudent};
  const auto call = [&](auto function) {
    function(p, a, fused != 0, unsigned(threads), per_image, dloss, loss, entropy, norm);
  };
  if (type == 0) return call(vectors ? run<float, 4> : run<float, 1>);
  if (type == 1) return call(vectors ? run<BFloat16, 8> : run<BFloat16, 1>);
  call(vectors ? run<Half, 8> : run<Half, 1>);
}

extern "C" int64_t shared_bytes(int S, int T, int itemsize, int W, int sums, int cluster) {
  float wanted;
  const Pass a{cluster, W,       1,       nullptr, sums ? &wanted : nullptr,
               nullptr, nullptr, nullptr, nullptr};
  const int warps = kThreads / kWarp;
  return itemsize == 4 ? Memory<float>(nullptr, S, T, a, warps, cluster > 0).bytes
                       : Memory<Half>(nullptr, S, T, a, warps, cluster > 0).bytes;
}
