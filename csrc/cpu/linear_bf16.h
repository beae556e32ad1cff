// Matrix products of linear layers by dot products of bfloat16 pairs (AVX-512 BF16). Weights may be
// float32 and are rounded while they are packed; their gradients may be float32 and are not
// rounded.
//
// A product's right operand is packed into panels of 32 columns: [depth / 2, 32] pairs, two
// consecutive rows of one column making a 32-bit word, zeros in the columns past its end and in the
// row that an odd depth lacks. Each element of the result is summed in an order that depends on the
// sizes alone, not on the number of threads.
#pragma once

#include "bf16_pairs.h"
#include "column_parts.h"
#include "ranges.h"

#ifdef FASTSSL_HAS_PAIRS

namespace fastssl::pairs {

// Columns of a panel.
constexpr int64_t kPanel = 32;
// Rows whose sums stay in registers, beside a panel's two vectors.
constexpr int kRows = 14;
// Depth that is summed before the next panel's turn, and rows that share a packed panel then.
constexpr int64_t kDepth = 768, kChunk = 504;
// Bytes of the panels that rows are multiplied with in turn: a part of the second-level cache.
constexpr int64_t kPanelBytes = 96 << 10;

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
// Words of a panel; transposing fills whole squares.
inline int64_t panel_words(int64_t depth) { return panels_of(depth) * kPanel / 2 * kPanel; }

// The panels of src [R, C] at columns [begin, end), R what is summed over.
template <class T>
FASTSSL_PAIRS inline void pack_rows(const T* src, int64_t R, int64_t C, Range columns,
                                    uint32_t* dst) {
  const PairOrder order;
  for (int64_t r = 0; r < R; r += 2, dst += kPanel) {
    const T* from = src + r * C;
    uint32_t* to = dst;
    for (int64_t c = columns.begin; c < columns.end; c += kPanel, to += panel_words(R)) {
      const __mmask32 mask = first_words(C - c);
      order.store(load_words(from + c, mask), load_words(from + C + c, r + 1 < R ? mask : 0), to);
    }
  }
}

// The panels of the transpose of src [R, C] at its rows [begin, end), C what is summed over.
template <class T>
FASTSSL_PAIRS inline void pack_columns(const T* src, int64_t R, int64_t C, Range rows,
                                       uint32_t* dst) {
  for (int64_t r = rows.begin; r < rows.end; r += kPanel, dst += panel_words(C)) {
    pair_columns(src + r * C, C, R - r, C, dst, kPanel, kPanel);
  }
}

// Where sums go at last: rows of N elements, a bias added. What nobody reads for a while goes past
// the caches, in whole lines.
template <class T, bool kPastCaches = false>
struct Out {
  T* data;
  int64_t N;
  const float* bias;

  // Brings the line closer while its sums are on their way: rows that lie 4,096 bytes apart share
  // one set of the first-level cache, and the stores would wait for each other there.
  FASTSSL_PAIRS FASTSSL_INLINE void fetch(int64_t m, int64_t n) const {
    const auto* to = reinterpret_cast<const char*>(data + m * N + n);
    for (int64_t i = 0; i < kPanel * int64_t(sizeof(T)); i += 64) {
      _mm_prefetch(to + i, _MM_HINT_T1);
    }
  }
  FASTSSL_PAIRS void operator()(int64_t m, int64_t n, __m512 low, __m512 high) const {
    const __mmask32 mask = first_words(N - n);
    const __mmask16 mask_low = __mmask16(mask), mask_high = __mmask16(mask >> 16);
    if (bias) {
      low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(mask_low, bias + n));
      high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(mask_high, bias + n + 16));
    }
    T* to = data + m * N + n;
    if constexpr (sizeof(T) == 2) {
      _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else if (kPastCaches) {
      _mm512_stream_ps(to, low);
      _mm512_stream_ps(to + 16, high);
    } else {
      _mm512_mask_storeu_ps(to, mask_low, low);
      _mm512_mask_storeu_ps(to + 16, mask_high, high);
    }
  }
};

// Memory that is fetched into the caches while products are summed: rows of `width` bytes.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* first, int64_t stride, int64_t rows, int64_t width)
      : row_(static_cast<const char*>(first)),
        stride_(stride),
        width_(width),
        lines_(rows * ((width + 63) / 64)) {}

  int64_t lines() const { return lines_; }
  // How many lines more `fetch` may take.
  void allow(int64_t lines) {
    const int64_t more = std::min(lines, lines_);
    allowed_ += more;
    lines_ -= more;
  }
  FASTSSL_PAIRS FASTSSL_INLINE void fetch() {
    if (allowed_ <= 0) return;
    --allowed_;
    _mm_prefetch(row_ + offset_, _MM_HINT_T1);
    offset_ += 64;
    if (offset_ >= width_) {
      offset_ = 0;
      row_ += stride_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, width_ = 0, lines_ = 0, allowed_ = 0, offset_ = 0;
};

// As many rows as `count` says, at most kCount, of a product that is summed in several turns.
template <int kCount, class Store>
FASTSSL_PAIRS inline void multiply_rows(int64_t count, const uint32_t* a, int64_t lda,
                                        const uint32_t* b, int64_t pairs, float* sums, bool first,
                                        bool last, int64_t m, int64_t n, const Store& store,
                                        Ahead& ahead) {
  if constexpr (kCount > 1) {
    if (count < kCount) {
      return multiply_rows<kCount - 1>(count, a, lda, b, pairs, sums, first, last, m, n, store,
                                       ahead);
    }
  }
  if (last) {
    for (int r = 0; r < kCount; ++r) store.fetch(m + r, n);
  }
  DotSums<kCount, 2, false> block;
  first ? block.clear() : block.load(sums, kPanel);
  block.multiply(a, lda, b, kPanel, pairs, ahead);
  if (!last) return block.store(sums, kPanel);
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) store(m + r, n, block.rows[r][0], block.rows[r][1]);
}

// C [M, N] = A [M, K] B [K, N], K even, cut into tasks: groups of panels times parts of the rows.
struct Product {
  int64_t M, N, K, groups, parts = 1;

  Product(int64_t rows, int64_t columns, int64_t depth, int64_t workers)
      : M(rows), N(columns), K(depth) {
    const int64_t bytes = panel_words(std::min(K, kDepth)) * int64_t(sizeof(uint32_t));
    const int64_t group = std::max<int64_t>(kPanelBytes / bytes, 2);
    groups = (panels_of(N) + group - 1) / group;
    // At least two tasks per thread, and as many for each, where there are rows enough.
    if (groups < 8 * workers) {
      parts = (2 * workers + groups - 1) / groups;
      while (groups * parts % workers) ++parts;
    }
    parts = std::max<int64_t>(1, std::min(parts, M / (4 * kRows)));
  }
  int64_t tasks() const { return groups * parts; }
  // Scratch memory of a thread, in words: a group's panels and, of a deep product, sums.
  int64_t scratch() const {
    return largest() * (panel_words(K) + (K > kDepth ? kChunk * kPanel : 0));
  }

  // `pack` fills the panels of a range of columns, and says what it will read for one; `store`
  // takes sums away.
  template <class Pack, class Store>
  FASTSSL_PAIRS void run(const uint16_t* a, uint32_t* scratch, Range range, const Pack& pack,
                         const Store& store) const {
    float* sums = reinterpret_cast<float*>(scratch + largest() * panel_words(K));
    for (int64_t task = range.begin; task < range.end; ++task) {
      const Range panels = panels_at(task);
      if (task == range.begin || task % parts == 0) {
        pack({panels.begin * kPanel, panels.end * kPanel}, scratch);
      }
      const Range rows = part_of(M, task % parts, parts);
      Ahead next;
      if (task + 1 < range.end && (task + 1) % parts == 0) next = pack.ahead(panels_at(task + 1));
      const int64_t calls = (rows.size() / kRows + 1) * std::max<int64_t>(panels.size() - 1, 1);
      const int64_t each = next.lines() / calls + 1;
      for (int64_t m = rows.begin; m < rows.end; m += kChunk) {
        multiply(a, scratch, sums, {m, std::min(rows.end, m + kChunk)}, panels, store, next, each);
      }
    }
  }

 private:
  int64_t largest() const { return (panels_of(N) + groups - 1) / groups; }
  Range panels_at(int64_t task) const { return part_of(panels_of(N), task / parts, groups); }

  template <class Store>
  FASTSSL_PAIRS void multiply(const uint16_t* a, const uint32_t* packed, float* sums, Range rows,
                              Range panels, const Store& store, Ahead& next, int64_t each) const {
    for (int64_t k = 0; k < K; k += kDepth) {
      const int64_t depth = std::min(kDepth, K - k);
      for (int64_t m = rows.begin; m < rows.end; m += kRows) {
        const auto* words = reinterpret_cast<const uint32_t*>(a + m * K + k);
        const int64_t count = std::min<int64_t>(kRows, rows.end - m);
        const int64_t following = std::min<int64_t>(kRows, rows.end - m - count);
        // While the first panel's turn lasts, the rows that follow; then what is packed next.
        Ahead left(a + (m + count) * K + k, K * 2, following, depth * 2);
        left.allow(left.lines());
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          const int64_t i = p - panels.begin;
          if (i) next.allow(each);
          multiply_rows<kRows>(count, words, K / 2, packed + i * panel_words(K) + k / 2 * kPanel,
                               depth / 2, sums + (i * kChunk + m - rows.begin) * kPanel, k == 0,
                               k + kDepth >= K, m, p * kPanel, store, i ? next : left);
        }
      }
    }
  }
};

// Of the gradient of a weight: rows whose sums stay in registers, depth that is summed in a turn.
constexpr int kTurnRows = 8;
constexpr int64_t kTurn = 384;

// Rows of src [M, W], kSumRows at most, into some panels, which lie `stride` words apart, and the
// sums of their columns where wanted.
FASTSSL_PAIRS inline void pack_piece(const uint16_t* src, int64_t M, int64_t W, Range rows,
                                     Range panels, uint32_t* dst, int64_t stride, float* sums) {
  const PairOrder order;
  for (int64_t p = panels.begin; p < panels.end; ++p, dst += stride) {
    const int64_t c = p * kPanel;
    const __mmask32 mask = first_words(W - c);
    __m512 low = _mm512_setzero_ps(), high = low;
    uint32_t* to = dst;
    for (int64_t r = rows.begin; r < rows.end; r += 2, to += kPanel) {
      const uint16_t* from = src + r * W + c;
      const __m512i even = load_words(from, mask);
      const __m512i odd = load_words(from + W, r + 1 < M ? mask : 0);
      order.store(even, odd, to);
      if (!sums) continue;
      low = _mm512_add_ps(low, from_bf16(_mm512_castsi512_si256(even)));
      high = _mm512_add_ps(high, from_bf16(_mm512_extracti64x4_epi64(even, 1)));
      low = _mm512_add_ps(low, from_bf16(_mm512_castsi512_si256(odd)));
      high = _mm512_add_ps(high, from_bf16(_mm512_extracti64x4_epi64(odd, 1)));
    }
    if (!sums) continue;
    _mm512_mask_storeu_ps(sums + c, __mmask16(mask), low);
    _mm512_mask_storeu_ps(sums + c + 16, __mmask16(mask >> 16), high);
  }
}

// C [N, K] = dy [M, N]^T x [M, K], both packed in panels; a task is a panel of dy times a group of
// panels of x.
struct WeightGradient {
  int64_t M, N, K;
  static constexpr int64_t kGroup = 4;

  int64_t groups() const { return (panels_of(K) + kGroup - 1) / kGroup; }
  int64_t tasks() const { return groups() * panels_of(N); }

  template <class Store>
  FASTSSL_PAIRS void run(const uint32_t* dy, const uint32_t* x, Range range,
                         const Store& store) const {
    alignas(64) float sums[kGroup * kPanel * kPanel];
    for (int64_t task = range.begin; task < range.end; ++task) {
      const int64_t n = task % panels_of(N);
      const Range panels = part_of(panels_of(K), task / panels_of(N), groups());
      // The panel of the task that follows.
      Ahead next(dy + (n + 1) * panel_words(M), 0, n + 1 < panels_of(N), M * 64);
      next.allow(next.lines());
      // Without rows there is one turn too, for zeros are the result then.
      for (int64_t k = 0; k == 0 || k < M; k += kTurn) {
        multiply(dy + n * panel_words(M), x, sums, {k, std::min(M, k + kTurn)}, n * kPanel, panels,
                 store, next);
      }
    }
    _mm_sfence();
  }

 private:
  template <class Store>
  FASTSSL_PAIRS void multiply(const uint32_t* dy, const uint32_t* x, float* sums, Range rows,
                              int64_t n, Range panels, const Store& store, Ahead& next) const {
    const int64_t pairs = (rows.size() + 1) / 2, first_pair = rows.begin / 2;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const uint32_t* right = x + p * panel_words(M) + first_pair * kPanel;
      for (int64_t r = 0; r < kPanel; r += kTurnRows, sums += kTurnRows * kPanel) {
        DotSums<kTurnRows, 2, true> block;
        rows.begin == 0 ? block.clear() : block.load(sums, kPanel);
        block.multiply(dy + first_pair * kPanel + r, kPanel, right, kPanel, pairs, next);
        if (rows.end < M) {
          block.store(sums, kPanel);
          continue;
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTurnRows; ++i) {
          if (n + r + i < N) store(n + r + i, p * kPanel, block.rows[i][0], block.rows[i][1]);
        }
      }
    }
  }
};

// The same where C fits the second-level cache and the rows are many: parts of the rows are packed
// piece by piece and summed apart, and the sums of the parts, whose number depends on the sizes
// alone, are added up in order. A task is a part and, where threads outnumber the parts, one of
// `groups` of dy's panels.
struct NarrowWeightGradient {
  int64_t M, N, K, parts = 1, groups = 1;

  NarrowWeightGradient(int64_t rows, int64_t outputs, int64_t inputs, int64_t num_threads)
      : M(rows), N(outputs), K(inputs) {
    while (parts < kMostParts && 2 * parts * kLeastRows <= M) parts *= 2;
    groups = std::max<int64_t>(std::min(panels_of(N), (num_threads + parts - 1) / parts), 1);
  }
  int64_t tasks() const { return parts * groups; }
  int64_t part_sums() const { return panels_of(N) * panels_of(K) * kPanel * kPanel; }
  bool fits() const { return parts > 1 && part_sums() * int64_t(sizeof(float)) <= kMostBytes; }
  // Scratch memory of a thread, in words.
  int64_t scratch() const {
    return ((panels_of(N) + groups - 1) / groups + panels_of(K)) * kStride;
  }

  // The sums of some tasks, and those of dy's columns, per kSumRows rows, where wanted.
  FASTSSL_PAIRS void run(const uint16_t* dy, const uint16_t* x, Range range, uint32_t* scratch,
                         float* sums, float* column_sums) const {
    for (int64_t task = range.begin; task < range.end; ++task) {
      const int64_t part = task / groups;
      const Range panels = part_of(panels_of(N), task % groups, groups);
      const Range pieces = part_of((M + kPiece - 1) / kPiece, part, parts);
      float* own = sums + part * part_sums() + panels.begin * panels_of(K) * kPanel * kPanel;
      for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const Range rows = block_of(M, i, kPiece);
        for (int64_t r = rows.begin; r < rows.end; r += kSumRows) {
          const Range few{r, std::min(rows.end, r + kSumRows)};
          uint32_t* to = scratch + (r - rows.begin) / 2 * kPanel;
          pack_piece(dy, M, N, few, panels, to, kStride,
                     column_sums ? column_sums + r / kSumRows * N : nullptr);
          pack_piece(x, M, K, few, {0, panels_of(K)}, to + panels.size() * kStride, kStride,
                     nullptr);
        }
        add_piece(dy, x, rows, panels, scratch, own, i == pieces.begin);
      }
    }
  }

  // Rows [32 n, 32 n + 32) of C.
  template <class Store>
  FASTSSL_PAIRS void add_up(const float* sums, int64_t n, const Store& store) const {
    for (int64_t r = n * kPanel; r < std::min(N, (n + 1) * kPanel); ++r) {
      for (int64_t p = 0; p < panels_of(K); ++p) {
        const float* from = sums + ((n * panels_of(K) + p) * kPanel + r % kPanel) * kPanel;
        __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
        for (int64_t part = 1; part < parts; ++part) {
          from += part_sums();
          low = _mm512_add_ps(low, _mm512_loadu_ps(from));
          high = _mm512_add_ps(high, _mm512_loadu_ps(from + 16));
        }
        store(r, p * kPanel, low, high);
      }
    }
  }

 private:
  // Rows that are packed at once; rows of a part at least; parts, and bytes of their sums, at most.
  static constexpr int64_t kPiece = 128, kLeastRows = 512;
  static constexpr int64_t kMostParts = 16, kMostBytes = 640 << 10;
  static constexpr int64_t kStride = kPiece / 2 * kPanel;

  FASTSSL_PAIRS void add_piece(const uint16_t* dy, const uint16_t* x, Range rows, Range panels,
                               const uint32_t* scratch, float* sums, bool first) const {
    const int64_t pairs = (rows.size() + 1) / 2, begin = panels.begin * kPanel;
    const uint32_t* right = scratch + panels.size() * kStride;
    // The rows that follow.
    const int64_t following = std::min(kPiece, M - rows.end);
    const int64_t width = std::min(N, panels.end * kPanel) - begin;
    Ahead next_dy(dy + rows.end * N + begin, N * 2, following, width * 2);
    Ahead next_x(x + rows.end * K, 0, 1, following * K * 2);
    next_dy.allow(next_dy.lines());
    next_x.allow(next_x.lines());
    for (int64_t n = 0; n < panels.size(); ++n, scratch += kStride) {
      for (int64_t p = 0; p < panels_of(K); ++p) {
        for (int64_t r = 0; r < kPanel; r += kTurnRows, sums += kTurnRows * kPanel) {
          DotSums<kTurnRows, 2, true> block;
          first ? block.clear() : block.load(sums, kPanel);
          block.multiply(scratch + r, kPanel, right + p * kStride, kPanel, pairs,
                         r % 16 ? next_x : next_dy);
          block.store(sums, kPanel);
        }
      }
    }
  }
};

}  // namespace fastssl::pairs

#endif
