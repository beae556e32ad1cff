// Casts, transposes and column sums around torch's matrix products in linear and gelu_mlp; see
// kernels/linear. linear_pairs.cpp multiplies itself.
#include <algorithm>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "column_parts.h"
#include "pages.h"
#include "simd.h"

namespace fastssl {
namespace {

// Side of the squares that are transposed at once.
constexpr int64_t kSide = 8;
// Rows and columns of the blocks that a thread transposes, by way of a copy: rows whose distance is
// a multiple of 2 KB would drive each other out of the first-level cache before they are used up.
constexpr int64_t kBlock = 64;
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
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("linear_cast", TORCH_BOX(&linear_cast));
  m.impl("linear_transpose", TORCH_BOX(&linear_transpose));
  m.impl("linear_column_sums", TORCH_BOX(&linear_column_sums));
  m.impl("linear_prefer_huge_pages", TORCH_BOX(&linear_prefer_huge_pages));
}

}  // namespace fastssl
