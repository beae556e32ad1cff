// The kernels of csrc/cuda on tests/cuda_emulator.h, called through ctypes by
// test_cuda_emulated*.py with the launches of csrc/cuda/*.cu in small.
#include "cuda_emulator.h"
#include "linear_dino_cross_entropy.cuh"
#include "sinkhorn_knopp.cuh"
#include "view_cross_entropy.cuh"

using namespace fastssl;

namespace {

// Calls f(X* type, std::integral_constant<int, V>) with null. Element types: 0 float32, 1 bfloat16,
// 2 float16.
template <class F>
void with_type(int type, int vectors, const F& f) {
  using One = std::integral_constant<int, 1>;
  using Four = std::integral_constant<int, 4>;
  using Eight = std::integral_constant<int, 8>;
  if (type == 0) return vectors ? f((float*)nullptr, Four{}) : f((float*)nullptr, One{});
  if (type == 1) return vectors ? f((BFloat16*)nullptr, Eight{}) : f((BFloat16*)nullptr, One{});
  vectors ? f((Half*)nullptr, Eight{}) : f((Half*)nullptr, One{});
}

// Calls f(X* type) with null.
template <class F>
void with_element(int type, const F& f) {
  with_type(type, false, [&](auto* x, auto) { f(x); });
}

template <class X, int V, bool kFused, bool kScaled>
void view_pass(const Problem& p, const Pass& a, unsigned threads) {
  const Memory<X> memory(nullptr, p.S, p.T, a, int(threads) / kWarp, kFused);
  emulate(unsigned(a.cells * a.slices), threads, size_t(memory.bytes),
          kFused ? unsigned(a.cells) : 0, [&] { view_pass_kernel<X, V, kFused, kScaled>(p, a); });
}

void combine(const Problem& p, const float* parts, int C, unsigned threads, float* student_stats,
             float* teacher_stats, float* per_image) {
  emulate(unsigned(p.B), threads, size_t(p.S + 2 * p.T) * 8, 0,
          [&] { combine_kernel(p, parts, C, student_stats, teacher_stats, per_image); });
}

void totals(const Problem& p, const float* per_image, unsigned threads, float* loss, float* entropy,
            float* norm) {
  emulate(1, threads, size_t(threads) / kWarp * 8, 0,
          [&] { total_kernel(p, per_image, loss, entropy, norm); });
}

template <class X, int V, bool kScaled>
void gradient(const Problem& p, int W, unsigned threads, const float* dloss,
              const float* student_stats, const float* teacher_stats, const float* norm,
              void* dstudent) {
  const int cells = int((p.K + W - 1) / W);
  emulate(unsigned(p.B * cells), threads, size_t(p.T * W) * 4, 0, [&] {
    gradient_kernel<X, V, kScaled>(p, cells, W, dloss, student_stats, teacher_stats, norm,
                                   static_cast<X*>(dstudent));
  });
}

template <class X, int V>
void run(const Problem& p, const Pass& a, bool fused, unsigned threads, float* per_image,
         const float* dloss, float* loss, float* entropy, float* norm) {
  if (fused) {
    view_pass<X, V, true, false>(p, a, threads);
  } else {
    view_pass<X, V, false, false>(p, a, threads);
    combine(p, a.parts, a.cells, threads, a.student_stats, a.teacher_stats, per_image);
  }
  totals(p, per_image, threads, loss, entropy, norm);
  X* dstudent = static_cast<X*>(a.dstudent);
  if (fused) {
    emulate(3, threads, 0, 0, [&] { scale_kernel<X, V>(dstudent, p.S * p.B * p.K, dloss); });
  } else {
    gradient<X, V, false>(p, a.W, threads, dloss, a.student_stats, a.teacher_stats, norm, dstudent);
  }
}

}  // namespace

// temps are two floats in host memory; those that may be absent are null.
extern "C" void dino_cross_entropy(int type, int vectors, int fused, int threads,
                                   const void* student, const void* teacher, const float* temps,
                                   const float* center, const float* log_u, int64_t log_u_stride,
                                   const float* log_v, const float* weights,
                                   const int64_t* num_rows, int S, int T, int64_t B, int64_t K,
                                   int skip, int mean, int cells, int W, int slices, float* parts,
                                   float* sums, float* student_stats, float* teacher_stats,
                                   float* per_image, const float* dloss, float* loss,
                                   float* entropy, float* norm, void* dstudent) {
  Problem p{};
  p.student = student, p.teacher = teacher, p.temps = temps, p.center = center, p.log_u = log_u;
  p.log_v = log_v, p.weights = weights, p.num_rows = num_rows, p.B = B, p.K = K;
  p.log_u_stride = log_u_stride, p.S = S, p.T = T, p.skip_same_view = skip, p.mean = mean;
  const Pass a{cells,         W,         slices,  cells, parts, sums, student_stats,
               teacher_stats, per_image, dstudent};
  with_type(type, vectors, [&](auto* x, auto v) {
    run<std::remove_pointer_t<decltype(x)>, decltype(v)::value>(
        p, a, fused, unsigned(threads), per_image, dloss, loss, entropy, norm);
  });
}

// The steps one by one, for linear_dino_cross_entropy.
extern "C" void view_parts(int type, int vectors, int threads, const Problem* p, const Pass* a) {
  with_type(type, vectors, [&](auto* x, auto v) {
    using X = std::remove_pointer_t<decltype(x)>;
    constexpr int V = decltype(v)::value;
    const auto pass =
        p->student_scale ? view_pass<X, V, false, true> : view_pass<X, V, false, false>;
    pass(*p, *a, unsigned(threads));
  });
}

extern "C" void view_collapse(int threads, const Problem* p, float* parts, int64_t stride, int C) {
  emulate(unsigned(p->B), unsigned(threads), 0, 0, [&] { collapse_kernel(*p, parts, stride, C); });
}

extern "C" void view_combine(int threads, const Problem* p, const float* parts, int C,
                             float* per_image, float* student_stats, float* teacher_stats,
                             float* loss, float* entropy, float* norm) {
  combine(*p, parts, C, unsigned(threads), student_stats, teacher_stats, per_image);
  totals(*p, per_image, unsigned(threads), loss, entropy, norm);
}

extern "C" void view_gradient(int type, int vectors, int threads, const Problem* p, int W,
                              const float* dloss, const float* student_stats,
                              const float* teacher_stats, const float* norm, void* dstudent) {
  with_type(type, vectors, [&](auto* x, auto v) {
    using X = std::remove_pointer_t<decltype(x)>;
    constexpr int V = decltype(v)::value;
    const auto run = p->student_scale ? gradient<X, V, true> : gradient<X, V, false>;
    run(*p, W, unsigned(threads), dloss, student_stats, teacher_stats, norm, dstudent);
  });
}

extern "C" void linear_dino_prototype_scale(int type, int vectors, int threads,
                                            const void* prototypes, int64_t K, int D,
                                            float* scale) {
  const unsigned warps = unsigned(threads) / kWarp;
  with_element(type, [&](auto* x) {
    using P = std::remove_pointer_t<decltype(x)>;
    const P* from = static_cast<const P*>(prototypes);
    emulate((unsigned(K) + warps - 1) / warps, unsigned(threads), 0, 0, [&] {
      vectors ? linear_dino::prototype_scale_kernel<P, 4>(from, K, D, scale)
              : linear_dino::prototype_scale_kernel<P, 1>(from, K, D, scale);
    });
  });
}

extern "C" void linear_dino_prototype_gradient(int type, int product_type, int vectors, int threads,
                                               const void* product, const void* prototypes,
                                               const float* scale, int64_t K, int D, void* to) {
  const unsigned warps = unsigned(threads) / kWarp;
  with_element(type, [&](auto* x) {
    with_element(product_type, [&](auto* y) {
      using P = std::remove_pointer_t<decltype(x)>;
      using G = std::remove_pointer_t<decltype(y)>;
      const P* from = static_cast<const P*>(prototypes);
      const G* g = static_cast<const G*>(product);
      emulate((unsigned(K) + warps - 1) / warps, unsigned(threads), 0, 0, [&] {
        P* out = static_cast<P*>(to);
        vectors ? linear_dino::prototype_gradient_kernel<P, G, 4>(g, from, scale, K, D, out)
                : linear_dino::prototype_gradient_kernel<P, G, 1>(g, from, scale, K, D, out);
      });
    });
  });
}

extern "C" int64_t shared_bytes(int S, int T, int itemsize, int W, int sums, int cluster) {
  float wanted;
  Pass a{};
  a.cells = cluster, a.W = W, a.slices = 1, a.sums = sums ? &wanted : nullptr;
  const int warps = kThreads / kWarp;
  return itemsize == 4 ? Memory<float>(nullptr, S, T, a, warps, cluster > 0).bytes
                       : Memory<Half>(nullptr, S, T, a, warps, cluster > 0).bytes;
}

namespace {

namespace sk = fastssl::sinkhorn;

struct SinkhornCall {
  const void* logits;
  const int64_t* num_rows;
  int B, K, threads, slices;
  float factor;
  float *anchor, *offset, *sums;

  sk::Problem problem() const { return {logits, num_rows, B, K, factor, anchor, offset}; }
};

template <class X, int V>
unsigned column_blocks(const SinkhornCall& c) {
  return unsigned((c.K + c.threads * V - 1) / (c.threads * V) * c.slices);
}

void merge(const SinkhornCall& c, const float* top, const float* parts) {
  emulate(unsigned(c.K + sk::kMergeColumns - 1) / sk::kMergeColumns, unsigned(c.threads),
          size_t(c.threads) * 4, 0,
          [&] { sk::merge_kernel(c.slices, c.K, c.factor, top, parts, c.anchor, c.sums); });
}

void divide(const SinkhornCall& c) {
  emulate(unsigned((c.K + c.threads - 1) / c.threads), unsigned(c.threads), 0, 0,
          [&] { sk::divide_kernel(c.problem(), c.sums); });
}

template <class X, int V>
void columns(const SinkhornCall& c, float* parts) {
  emulate(column_blocks<X, V>(c), unsigned(c.threads), 0, 0,
          [&] { sk::columns_kernel<X, V>(c.problem(), c.slices, parts); });
  merge(c, parts, parts + int64_t(c.slices) * c.K);
}

template <class X, int V, int C, bool kLast>
void row_pass(const SinkhornCall& c, const sk::RowPass& a) {
  const sk::RowMemory memory(nullptr, C, c.threads, a.cluster);
  emulate(unsigned(a.slices * a.cluster), unsigned(c.threads), size_t(memory.bytes),
          unsigned(a.cluster), [&] { sk::row_pass_kernel<X, V, C, kLast>(c.problem(), a); });
}

template <class X, int C>
void row_pass(const SinkhornCall& c, const sk::RowPass& a) {
  constexpr int V = 16 / int(sizeof(X));
  return a.is_last ? row_pass<X, V, C, true>(c, a) : row_pass<X, V, C, false>(c, a);
}

template <class X>
void clustered(const SinkhornCall& c, const sk::RowPass& a, int held_columns) {
  if (held_columns == 8) return row_pass<X, 8>(c, a);
  if (held_columns == 16) return row_pass<X, 16>(c, a);
  row_pass<X, 32>(c, a);
}

template <class X, int V>
void two_readings(const SinkhornCall& c, const sk::RowPass& a) {
  const unsigned threads = unsigned(c.threads);
  emulate(unsigned(c.B), threads, size_t(threads) / kWarp * 4, 0,
          [&] { sk::row_sums_kernel<X, V>(c.problem(), a); });
  if (a.is_last) return;
  emulate(column_blocks<X, V>(c), threads, 0, 0, [&] {
    sk::column_sums_kernel<X, V>(c.problem(), c.slices, a.shifts, a.scales, a.parts);
  });
}

}  // namespace

extern "C" void sinkhorn_knopp_columns(int type, int vectors, const SinkhornCall* c, float* parts) {
  with_type(type, vectors, [&](auto* x, auto v) {
    columns<std::remove_pointer_t<decltype(x)>, decltype(v)::value>(*c, parts);
  });
}

// With a cluster of 0 blocks the logits are read twice.
extern "C" void sinkhorn_knopp_rows(int type, int vectors, const SinkhornCall* c, int cluster,
                                    int W, int held_columns, int is_last, float* log2_mass,
                                    float* stats, float* parts, float* assignment) {
  const sk::RowPass a{cluster, W,          c->slices, is_last != 0, log2_mass,
                      parts,   assignment, stats,     stats + c->B};
  divide(*c);
  with_type(type, vectors, [&](auto* x, auto v) {
    using X = std::remove_pointer_t<decltype(x)>;
    if (cluster > 0) {
      clustered<X>(*c, a, held_columns);
    } else {
      two_readings<X, decltype(v)::value>(*c, a);
    }
  });
  if (!is_last) merge(*c, nullptr, parts);
}

extern "C" int64_t sinkhorn_shared_bytes(int threads, int held_columns, int cluster) {
  return sk::RowMemory(nullptr, held_columns, threads, cluster).bytes;
}
