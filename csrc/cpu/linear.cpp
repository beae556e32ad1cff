// Matrix products of linear and gelu_mlp where the processor multiplies pairs, and casts,
// transposes and column sums around torch's elsewhere; see kernels/linear.
#include <algorithm>
#include <optional>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "linear_bf16.h"
#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

// Side of the squares that are transposed at once.
constexpr int64_t kSide = 8;
// Rows and columns of the blocks that a thread transposes, by way of a copy: rows whose distance is
// a multiple of 2 KB would drive each other out of the first-level cache before they are used up.
constexpr int64_t kBlock = 64;
// Rows per partial sum, whatever the number of threads.
constexpr int64_t kSumRows = 32;

template <class T>
int64_t bytes_of(const Tensor& tensor) {
  return tensor.numel() * int64_t(sizeof(T));
}

template <class T, class O>
void cast(const Tensor& from, Tensor& out) {
  const T* from_ptr = input<T>(from);
  O* out_ptr = output<O>(out);
  prefer_huge_pages(out_ptr, bytes_of<O>(out));
  parallel(out.numel(), kGrain, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) store(out_ptr + i, load(from_ptr + i));
  });
}

#if defined(__SSE2__)
// Rows of an 8 x 8 square of 16-bit elements become its columns.
FASTSSL_INLINE void transpose_square(__m128i (&v)[kSide]) {
  __m128i w[kSide];
  for (int i = 0; i < 4; ++i) {
    w[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]);
    w[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm_unpacklo_epi16(w[i], w[i + 4]);
    v[2 * i + 1] = _mm_unpackhi_epi16(w[i], w[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    w[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]);
    w[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
  }
  for (int i = 0; i < kSide; ++i) v[i] = w[i];
}

FASTSSL_INLINE void store_row(void* to, __m128i row, const uint16_t*) {
  _mm_storeu_si128(static_cast<__m128i*>(to), row);
}

// bfloat16 to float32: the bits of the former are the upper half of the latter's.
FASTSSL_INLINE void store_row(void* to, __m128i row, const float*) {
  const __m128i zero = _mm_setzero_si128();
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm_unpacklo_epi16(zero, row));
  _mm_storeu_si128(static_cast<__m128i*>(to) + 1, _mm_unpackhi_epi16(zero, row));
}

template <class T, class O>
constexpr bool kFastSquare =
    sizeof(T) == 2 &&
    (std::is_same_v<T, O> || (std::is_same_v<T, BFloat16> && std::is_same_v<O, float>));

template <class T, class O>
FASTSSL_INLINE void transpose_square(const T* from, int64_t from_stride, O* to, int64_t to_stride) {
  using Row = std::conditional_t<std::is_same_v<T, O>, uint16_t, float>;
  __m128i v[kSide];
  for (int i = 0; i < kSide; ++i) {
    v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  }
  transpose_square(v);
  for (int i = 0; i < kSide; ++i) {
    store_row(to + i * to_stride, v[i], static_cast<const Row*>(nullptr));
  }
}
#else
template <class T, class O>
constexpr bool kFastSquare = false;
template <class T, class O>
void transpose_square(const T*, int64_t, O*, int64_t) {}
#endif

template <class T, class O>
FASTSSL_INLINE void transpose_block(const T* from, int64_t from_stride, O* to, int64_t to_stride,
                                    int64_t rows, int64_t columns) {
  alignas(64) T block[kBlock * kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(block + r * kBlock, from + r * from_stride, size_t(columns) * sizeof(T));
  }
  int64_t square_rows = 0, square_columns = 0;
  if constexpr (kFastSquare<T, O>) {
    square_rows = rows / kSide * kSide;
    square_columns = columns / kSide * kSide;
    for (int64_t c = 0; c < square_columns; c += kSide) {
      for (int64_t r = 0; r < square_rows; r += kSide) {
        transpose_square(block + r * kBlock + c, kBlock, to + c * to_stride + r, to_stride);
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < square_columns ? square_rows : 0; r < rows; ++r) {
      store(to + c * to_stride + r, load(block + r * kBlock + c));
    }
  }
}

template <class T, class O>
void transpose(const Tensor& from, Tensor& out) {
  const int64_t R = from.size(0), C = from.size(1);
  const T* from_ptr = input<T>(from);
  O* out_ptr = output<O>(out);
  prefer_huge_pages(out_ptr, bytes_of<O>(out));
  // A thread writes whole rows of the output.
  const int64_t row_blocks = (R + kBlock - 1) / kBlock, column_blocks = (C + kBlock - 1) / kBlock;
  parallel(column_blocks, grain_rows(R * kBlock), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i * kBlock, columns = std::min(kBlock, C - c);
      for (int64_t k = 0; k < row_blocks; ++k) {
        const int64_t r = k * kBlock, rows = std::min(kBlock, R - r);
        transpose_block(from_ptr + r * C + c, C, out_ptr + c * R + r, R, rows, columns);
      }
    }
  });
}

template <class F>
void with_types(const Tensor& from, const Tensor& out, const F& f) {
  with_type(from.scalar_type(), "from",
            [&](auto* in) { with_type(out.scalar_type(), "out", [&](auto* to) { f(in, to); }); });
}

void linear_cast(Tensor from, Tensor out) {
  check_cpu(from, "from");
  check_cpu(out, "out");
  STD_TORCH_CHECK(from.numel() == out.numel(), "out must have from's shape");
  with_types(from, out, [&](auto* in, auto* to) {
    cast<std::remove_pointer_t<decltype(in)>, std::remove_pointer_t<decltype(to)>>(from, out);
  });
}

void linear_transpose(Tensor from, Tensor out) {
  check_cpu(from, "from");
  check_cpu(out, "out");
  STD_TORCH_CHECK(from.size(0) == out.size(1) && from.size(1) == out.size(0),
                  "out must have from's shape, transposed");
  with_types(from, out, [&](auto* in, auto* to) {
    transpose<std::remove_pointer_t<decltype(in)>, std::remove_pointer_t<decltype(to)>>(from, out);
  });
}

// sums [C] = parts [chunks, C] added up in order.
void add_parts(const float* parts, int64_t chunks, int64_t C, float* sums) {
  parallel(C, kGrain, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    std::fill(sums + begin, sums + end, 0.0f);
    for (int64_t k = 0; k < chunks; ++k) {
      const float* from = parts + k * C;
      for (int64_t c = begin; c < end; ++c) sums[c] += from[c];
    }
  });
}

template <class T>
void column_sums(const Tensor& x, Tensor& parts, Tensor& sums) {
  const int64_t R = x.size(0), C = x.size(1), chunks = parts.size(0);
  const T* x_ptr = input<T>(x);
  float* parts_ptr = output<float>(parts);
  parallel(chunks, grain_rows(kSumRows * C), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t k = begin; k < end; ++k) {
      float* sum = parts_ptr + k * C;
      std::fill(sum, sum + C, 0.0f);
      for (int64_t r = k * kSumRows; r < std::min(R, (k + 1) * kSumRows); ++r) {
        const T* row = x_ptr + r * C;
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) sum[c] += load(row + c);
      }
    }
  });
  add_parts(parts_ptr, chunks, C, output<float>(sums));
}

void linear_column_sums(Tensor x, Tensor parts, Tensor sums) {
  check_cpu(x, "x");
  check_cpu(parts, "parts");
  check_cpu(sums, "sums");
  STD_TORCH_CHECK(parts.size(0) * kSumRows >= x.size(0), "parts must have a row per 32 of x");
  with_type(x.scalar_type(), "x", [&](auto* type) {
    column_sums<std::remove_pointer_t<decltype(type)>>(x, parts, sums);
  });
}

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

// Scratch memory, and where its first whole line begins.
struct Scratch {
  Tensor memory;
  uint32_t* words;

  Scratch(const Tensor& like, int64_t count)
      : memory(torch::stable::new_empty(like, {count + 16}, ScalarType::Int)),
        words(output<uint32_t>(memory)) {
    words += (64 - reinterpret_cast<uintptr_t>(words) % 64) % 64 / sizeof(uint32_t);
  }
};

template <bool kTransposed, class T, class O>
void product(const Tensor& x, const Tensor& weight, const float* bias, int64_t num_threads,
             Tensor& out) {
  const int64_t N = weight.size(0), K = weight.size(1), M = x.size(0), columns = out.size(1);
  const pairs::Product plan(M, columns, x.size(1), num_threads);
  const PackWeight<T, kTransposed> pack{static_cast<const T*>(weight.const_data_ptr()), N, K};
  const pairs::Out<O> store{output<O>(out), columns, bias};
  prefer_huge_pages(store.data, bytes_of<O>(out));
  const int64_t tasks = plan.tasks(), workers = std::min(tasks, num_threads);
  const int64_t words = pairs::round_up(plan.scratch(), 16);
  const Scratch scratch(x, workers * words);
  const auto* rows = input<uint16_t>(x);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      plan.run(rows, scratch.words + w * words, part_of(tasks, w, workers), pack, store);
    }
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
void weight_gradient(const Tensor& dy, const Tensor& x, float* parts, int64_t num_threads,
                     const Store& store) {
  const int64_t M = dy.size(0), N = dy.size(1), K = x.size(1);
  const pairs::WeightGradient plan{M, N, K};
  const int64_t dy_words = pairs::panels_of(N) * pairs::panel_words(M);
  const int64_t x_words = pairs::panels_of(K) * pairs::panel_words(M);
  const Scratch scratch(x, dy_words + x_words);
  uint32_t* packed = scratch.words;
  const auto *dy_ptr = input<uint16_t>(dy), *x_ptr = input<uint16_t>(x);
  const int64_t pieces = (M + pairs::kPiece - 1) / pairs::kPiece;
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pairs::pack_piece(dy_ptr, M, N, i, packed, parts ? parts + i * N : nullptr);
      pairs::pack_piece(x_ptr, M, K, i, packed + dy_words, nullptr);
    }
  });
  const int64_t tasks = plan.tasks(), workers = std::min(tasks, num_threads);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      plan.run(packed, packed + dy_words, part_of(tasks, w, workers), store);
    }
  });
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
  static_assert(kSumRows == pairs::kPiece);
  float* parts_ptr = parts ? output<float>(*parts) : nullptr;
  const int64_t K = x.size(1);
  with_words(dweight, "dweight", [&](auto* type) {
    using O = std::remove_pointer_t<decltype(type)>;
    O* out = output<O>(dweight);
    prefer_huge_pages(out, bytes_of<O>(dweight));
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

// Advice for an output that a matrix product is about to write.
void linear_prefer_huge_pages(Tensor out) {
  check_cpu(out, "out");
  with_type(out.scalar_type(), "out", [&](auto* type) {
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * int64_t(sizeof(*type)));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def("linear_cast(Tensor from, Tensor(a!) out) -> ()");
  m.def("linear_transpose(Tensor from, Tensor(a!) out) -> ()");
  m.def("linear_column_sums(Tensor x, Tensor(a!) parts, Tensor(b!) sums) -> ()");
  m.def("linear_prefer_huge_pages(Tensor(a!) out) -> ()");
  m.def(
      "linear_product(Tensor x, Tensor weight, bool transposed, Tensor? bias, int num_threads, "
      "Tensor(a!) out) -> ()");
  m.def(
      "linear_weight_gradient(Tensor dy, Tensor x, Tensor(a!)? parts, Tensor(b!)? sums, "
      "int num_threads, Tensor(c!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("linear_cast", TORCH_BOX(&linear_cast));
  m.impl("linear_transpose", TORCH_BOX(&linear_transpose));
  m.impl("linear_column_sums", TORCH_BOX(&linear_column_sums));
  m.impl("linear_prefer_huge_pages", TORCH_BOX(&linear_prefer_huge_pages));
  m.impl("linear_product", TORCH_BOX(&linear_product));
  m.impl("linear_weight_gradient", TORCH_BOX(&linear_weight_gradient));
}

}  // namespace fastssl
