// The matrix products of linear and gelu_mlp where the processor multiplies pairs of bfloat16; see
// kernels/linear.
#include <algorithm>
#include <optional>
#include <type_traits>

#include "linear_bf16.h"
#include "pages.h"
#include "scratch.h"

namespace fastssl {
namespace {

#ifdef FASTSSL_HAS_PAIRS
// Packs panels of weight [N, K]: of its transpose for x weight^T, of itself for dy weight.
template <class T, bool kTransposed>
struct PackWeight {
  const T* weight;
  int64_t N, K;

  FASTSSL_PAIRS void operator()(Range columns, uint32_t* to) const {
    if constexpr (kTransposed) {
      pairs::pack_columns(weight, N, K, columns, to);
    } else {
      pairs::pack_rows(weight, N, K, columns, to);
    }
  }
  pairs::Ahead ahead(Range panels) const {
    const int64_t begin = panels.begin * pairs::kPanel;
    const int64_t end = std::min(panels.end * pairs::kPanel, kTransposed ? N : K);
    const int64_t bytes = sizeof(T);
    if (kTransposed) return pairs::Ahead(weight + begin * K, 0, 1, (end - begin) * K * bytes);
    return pairs::Ahead(weight + begin, K * bytes, N, (end - begin) * bytes);
  }
};

// Calls f with a null pointer to what stands for an element: float, or the word of a bfloat16.
template <class F>
void with_words(const Tensor& tensor, const char* name, const F& f) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  " must be float32 or bfloat16");
  if (type == ScalarType::Float) return f(static_cast<float*>(nullptr));
  f(static_cast<uint16_t*>(nullptr));
}

// Calls f(worker, tasks) for as many workers as there are threads, and tasks for.
template <class F>
void for_each_worker(int64_t tasks, int64_t num_threads, const F& f) {
  const int64_t workers = std::min(tasks, num_threads);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) f(w, part_of(tasks, w, workers));
  });
}

template <bool kTransposed, class T, class O>
void product(const Tensor& x, const Tensor& weight, const float* bias, int64_t num_threads,
             Tensor& out) {
  const int64_t N = weight.size(0), K = weight.size(1), M = x.size(0), columns = out.size(1);
  const pairs::Product plan(M, columns, x.size(1), num_threads);
  const PackWeight<T, kTransposed> pack{static_cast<const T*>(weight.const_data_ptr()), N, K};
  const pairs::Out<O> store{output<O>(out), columns, bias};
  prefer_huge_pages(store.data, out.numel() * int64_t(sizeof(O)));
  const int64_t words = pairs::round_up(plan.scratch(), 16);
  const Scratch<uint32_t> scratch(std::min(plan.tasks(), num_threads) * words);
  const auto* rows = input<uint16_t>(x);
  for_each_worker(plan.tasks(), num_threads, [&](int64_t worker, Range tasks) {
    plan.run(rows, scratch.data + worker * words, tasks, pack, store);
  });
}
#endif

void check_pairs(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16");
#ifdef FASTSSL_HAS_PAIRS
  STD_TORCH_CHECK(pairs::best_unit() != pairs::Unit::none, "this processor has no AVX-512 BF16");
#else
  STD_TORCH_CHECK(false, "this build has no products of bfloat16 pairs");
#endif
}

// out [M, N] = x [M, K] weight^T + bias, or with `transposed` out [M, K] = x [M, N] weight, for
// weight [N, K]. x is bfloat16, weight and out are that or float32, the bias float32. x has an even
// number of columns.
void linear_product(Tensor x, Tensor weight, bool transposed, std::optional<Tensor> bias,
                    int64_t num_threads, Tensor out) {
  check_pairs(x, "x");
  check_cpu(weight, "weight");
  check_cpu(out, "out");
  STD_TORCH_CHECK(x.size(1) % 2 == 0 && x.size(1) > 0, "x must have an even number of columns");
  STD_TORCH_CHECK(num_threads > 0 && out.size(1) > 0, "needs a thread and a column");
  STD_TORCH_CHECK(x.size(1) == weight.size(transposed ? 0 : 1) && out.size(0) == x.size(0) &&
                      out.size(1) == weight.size(transposed ? 1 : 0),
                  "x, weight and out do not fit");
  if (bias) {
    check_cpu(*bias, "bias");
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->numel() == out.size(1),
                    "bias must have a float32 value per column");
  }
#ifdef FASTSSL_HAS_PAIRS
  const float* bias_ptr = bias ? input<float>(*bias) : nullptr;
  with_words(weight, "weight", [&](auto* in) {
    with_words(out, "out", [&](auto* to) {
      using T = std::remove_pointer_t<decltype(in)>;
      using O = std::remove_pointer_t<decltype(to)>;
      if (transposed) {
        product<false, T, O>(x, weight, bias_ptr, num_threads, out);
      } else {
        product<true, T, O>(x, weight, bias_ptr, num_threads, out);
      }
    });
  });
#endif
}

#ifdef FASTSSL_HAS_PAIRS
template <class Store>
void narrow_weight_gradient(const pairs::NarrowWeightGradient& plan, const Tensor& dy,
                            const Tensor& x, float* column_sums, int64_t num_threads,
                            const Store& store) {
  const Scratch<float> sums(plan.parts * plan.part_sums());
  const Scratch<uint32_t> scratch(std::min(plan.tasks(), num_threads) * plan.scratch());
  const auto *dy_ptr = input<uint16_t>(dy), *x_ptr = input<uint16_t>(x);
  for_each_worker(plan.tasks(), num_threads, [&](int64_t worker, Range tasks) {
    plan.run(dy_ptr, x_ptr, tasks, scratch.data + worker * plan.scratch(), sums.data, column_sums);
  });
  torch::stable::parallel_for(0, pairs::panels_of(plan.N), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) plan.add_up(sums.data, n, store);
    _mm_sfence();
  });
}

template <class Store>
void weight_gradient(const Tensor& dy, const Tensor& x, float* column_sums, int64_t num_threads,
                     const Store& store) {
  const int64_t M = dy.size(0), N = dy.size(1), K = x.size(1);
  const pairs::NarrowWeightGradient narrow(M, N, K, num_threads);
  if (narrow.fits()) return narrow_weight_gradient(narrow, dy, x, column_sums, num_threads, store);
  const pairs::WeightGradient plan{M, N, K};
  const int64_t words = pairs::panel_words(M), dy_words = pairs::panels_of(N) * words;
  const Scratch<uint32_t> scratch(dy_words + pairs::panels_of(K) * words);
  uint32_t* packed = scratch.data;
  const auto *dy_ptr = input<uint16_t>(dy), *x_ptr = input<uint16_t>(x);
  const int64_t pieces = (M + kSumRows - 1) / kSumRows;
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Range rows = block_of(M, i, kSumRows);
      uint32_t* to = packed + rows.begin / 2 * pairs::kPanel;
      pairs::pack_piece(dy_ptr, M, N, rows, {0, pairs::panels_of(N)}, to, words,
                        column_sums ? column_sums + i * N : nullptr);
      pairs::pack_piece(x_ptr, M, K, rows, {0, pairs::panels_of(K)}, to + dy_words, words, nullptr);
    }
  });
  for_each_worker(plan.tasks(), num_threads,
                  [&](int64_t, Range tasks) { plan.run(packed, packed + dy_words, tasks, store); });
}
#endif

// dweight [N, K] = dy^T x, from dy [M, N] and x [M, K] in bfloat16, in that or float32; sums [N]
// are those of dy's columns, by way of parts [chunks, N]. Neither is wanted without the other.
void linear_weight_gradient(Tensor dy, Tensor x, std::optional<Tensor> parts,
                            std::optional<Tensor> sums, int64_t num_threads, Tensor dweight) {
  check_pairs(dy, "dy");
  check_pairs(x, "x");
  check_cpu(dweight, "dweight");
  STD_TORCH_CHECK(
      dy.size(0) == x.size(0) && dweight.size(0) == dy.size(1) && dweight.size(1) == x.size(1),
      "dy, x and dweight do not fit");
  STD_TORCH_CHECK(num_threads > 0, "needs a thread");
  STD_TORCH_CHECK(parts.has_value() == sums.has_value(), "parts and sums go together");
  if (parts) {
    check_cpu(*parts, "parts");
    check_cpu(*sums, "sums");
    STD_TORCH_CHECK(parts->size(0) * kSumRows >= dy.size(0) && parts->size(1) == dy.size(1) &&
                        sums->numel() == dy.size(1),
                    "parts must have a row per 32 of dy, sums a value per column");
  }
#ifdef FASTSSL_HAS_PAIRS
  float* parts_ptr = parts ? output<float>(*parts) : nullptr;
  const int64_t K = x.size(1);
  with_words(dweight, "dweight", [&](auto* type) {
    using O = std::remove_pointer_t<decltype(type)>;
    O* out = output<O>(dweight);
    prefer_huge_pages(out, dweight.numel() * int64_t(sizeof(O)));
    if constexpr (std::is_same_v<O, float>) {
      if (K % pairs::kPanel == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
        const pairs::Out<O, true> store{out, K, nullptr};
        return weight_gradient(dy, x, parts_ptr, num_threads, store);
      }
    }
    weight_gradient(dy, x, parts_ptr, num_threads, pairs::Out<O>{out, K, nullptr});
  });
  if (parts) add_parts(parts_ptr, parts->size(0), dy.size(1), output<float>(*sums));
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "linear_product(Tensor x, Tensor weight, bool transposed, Tensor? bias, int num_threads, "
      "Tensor(a!) out) -> ()");
  m.def(
      "linear_weight_gradient(Tensor dy, Tensor x, Tensor(a!)? parts, Tensor(b!)? sums, "
      "int num_threads, Tensor(c!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&linear_product));
  m.impl("linear_weight_gradient", TORCH_BOX(&linear_weight_gradient));
}

}  // namespace fastssl
