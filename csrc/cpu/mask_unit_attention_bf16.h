// mask_unit_attention by products of bfloat16 pairs: a group of units and one head at a time.
#pragma once

#include "bf16_pairs.h"
#include "mask_unit_attention.h"

#ifdef FASTSSL_HAS_PAIRS

namespace fastssl::pairs {

constexpr int64_t kQueryBlock = 32;

// The sizes that a group's products have.
struct Sizes {
  int64_t keys, width;                             // as columns
  int64_t keys_depth, queries_depth, width_depth;  // as what is summed over
  int64_t keys_padded;  // columns of scores that exist, zeros past the keys

  Sizes(const Geometry& g, int64_t units) {
    const int64_t num_keys = units * g.unit_size;
    const int64_t depth = grain().depth;
    keys = round_up(num_keys, 16);
    width = round_up(g.head_dim, 16);
    keys_depth = round_up(num_keys, depth);
    queries_depth = round_up(units * g.unit_queries(), depth);
    width_depth = round_up(g.head_dim, depth);
    keys_padded = std::max(keys, keys_depth);
  }
};

// Small units share the rows of a tile, or of a vector.
inline int64_t group_of(int64_t unit_size) {
  const int64_t least = best_unit() == Unit::tiles ? 32 : 16;
  return std::max<int64_t>(1, (least + unit_size - 1) / unit_size);
}

// The operands of one group and head, one behind the other in scratch memory. Sizes are multiples
// of 32; what is filled and read is as `Sizes` says.
struct Buffers {
  int64_t queries, keys, width;                        // padded to multiples of 32
  uint16_t *q, *dout;                                  // rows [queries, width], unless in place
  uint32_t *k_columns, *v_columns;                     // pairs of columns [width / 2, keys]
  uint32_t *q_pairs, *k_pairs, *v_pairs, *dout_pairs;  // pairs of rows
  uint16_t *p_transposed, *ds_transposed;              // [keys, queries], for tiles
  uint8_t* argmax;                                     // [queries, width]
  float *scores, *dp;                                  // [32, keys]
  float* product;                                      // [32, width], of tiles or pooled queries
  uint16_t *p, *ds;                                    // [32, keys]
  uint32_t *p_pairs, *ds_pairs;  // [16, keys], or for dots [queries / 2, keys]
};

// Lays the buffers out from `base` on and returns their size in bytes.
inline int64_t lay_out(const Geometry& g, bool backward, uint8_t* base, Buffers* out) {
  Buffers& b = *out;
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
  };
  const int64_t q = b.queries = round_up(g.group * g.unit_queries(), 32);
  const int64_t k = b.keys = round_up(g.group * g.unit_size, 32);
  const int64_t w = b.width = round_up(g.head_dim, 32);
  take(b.q, q * w);
  take(b.k_columns, w / 2 * k);
  take(b.scores, kQueryBlock * k);
  take(b.product, kQueryBlock * w);
  if (!backward) {
    take(b.v_pairs, k / 2 * w);
    take(b.p, kQueryBlock * k);
    return used;
  }
  take(b.dout, q * w);
  take(b.v_columns, w / 2 * k);
  take(b.q_pairs, q / 2 * w);
  take(b.k_pairs, k / 2 * w);
  take(b.dout_pairs, q / 2 * w);
  const bool tiles = best_unit() == Unit::tiles;
  take(b.p_transposed, tiles ? k * q : 0);
  take(b.ds_transposed, tiles ? k * q : 0);
  take(b.argmax, q * w);
  take(b.dp, kQueryBlock * k);
  take(b.ds, kQueryBlock * k);
  take(b.p_pairs, (tiles ? kQueryBlock : q) / 2 * k);
  take(b.ds_pairs, (tiles ? kQueryBlock : q) / 2 * k);
  return used;
}

// Query rows of one unit: the maximum of the tokens that share one, and which of them it was.
FASTSSL_PAIRS inline void pool_queries(const Geometry& g, const uint16_t* unit, uint16_t* rows,
                                       int64_t ld, uint8_t* argmax) {
  const int64_t queries = g.unit_queries();
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t c = 0; c < ld; c += 16) {
      const __mmask16 mask = c < g.head_dim ? first_lanes(g.head_dim - c) : 0;
      const uint16_t* from = unit + i * g.token_stride() + c;
      __m512 best = from_bf16(_mm256_maskz_loadu_epi16(mask, from));
      __m512i which = _mm512_setzero_si512();
      for (int64_t s = 1; s < g.q_stride; ++s) {
        from += queries * g.token_stride();
        const __m512 x = from_bf16(_mm256_maskz_loadu_epi16(mask, from));
        // Greater, or a NaN.
        const __mmask16 better =
            _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        best = _mm512_mask_mov_ps(best, better, x);
        which = _mm512_mask_mov_epi32(which, better, _mm512_set1_epi32(int(s)));
      }
      _mm256_storeu_si256((__m256i*)(rows + i * ld + c),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(best), 16)));
      if (argmax) _mm_storeu_si128((__m128i*)(argmax + i * ld + c), _mm512_cvtepi32_epi8(which));
    }
  }
}

// Rows that a product reads with their distance: where they are, or a copy.
struct Rows {
  const uint16_t* data;
  int64_t ld;

  const uint16_t* row(int64_t i) const { return data + i * ld; }
};

// Whether rows may be read in place: tiles read whole ones, and pairs must not be cut.
inline bool reads_in_place(const Geometry& g) {
  return best_unit() == Unit::dots && g.head_dim % 2 == 0;
}

FASTSSL_PAIRS inline Rows load_queries(const Geometry& g, const Buffers& b, const uint16_t* tokens,
                                       int64_t units, bool backward) {
  const int64_t rows = units * g.unit_queries();
  if (g.q_stride == 1) {
    if (reads_in_place(g)) return {tokens, g.token_stride()};
    copy_padded(tokens, g.token_stride(), rows, g.head_dim, b.q, b.width, b.queries);
    return {b.q, b.width};
  }
  for (int64_t u = 0; u < units; ++u) {
    const int64_t first = u * g.unit_queries() * b.width;
    pool_queries(g, tokens + u * g.unit_size * g.token_stride(), b.q + first, b.width,
                 backward ? b.argmax + first : nullptr);
  }
  copy_padded(nullptr, 0, 0, 0, b.q + rows * b.width, b.width, b.queries - rows);
  return {b.q, b.width};
}

FASTSSL_PAIRS inline Rows load_dout(const Geometry& g, const Buffers& b, const uint16_t* dout,
                                    int64_t queries) {
  if (reads_in_place(g)) return {dout, g.dim()};
  copy_padded(dout, g.dim(), queries, g.head_dim, b.dout, b.width, b.queries);
  return {b.dout, b.width};
}

// Which of `count` keys the queries of a group's unit attend to: all of a single unit's; of units
// that share a group, of 64 keys at most, those whose bit is set.
struct Keys {
  int64_t count;
  uint64_t bits;

  template <bool kShared>
  FASTSSL_PAIRS __mmask16 lanes(int64_t j) const {
    return kShared ? __mmask16(bits >> j) : first_lanes(count - j);
  }
};

inline Keys keys_of(const Geometry& g, int64_t count, int64_t query) {
  if (g.group == 1) return {count, 0};
  const uint64_t unit = (uint64_t(1) << g.unit_size) - 1;
  return {count, unit << (query / g.unit_queries() * g.unit_size)};
}

// The largest score of a query.
template <bool kShared>
FASTSSL_PAIRS FASTSSL_INLINE float largest(const float* s, const Keys& keys) {
  __m512 top = _mm512_set1_ps(-INFINITY), other = top;
  int64_t j = 0;
  if (!kShared) {
    for (; j + 32 <= keys.count; j += 32) {
      top = _mm512_max_ps(top, _mm512_loadu_ps(s + j));
      other = _mm512_max_ps(other, _mm512_loadu_ps(s + j + 16));
    }
  }
  for (; j < keys.count; j += 16) {
    top = _mm512_mask_max_ps(top, keys.lanes<kShared>(j), top, _mm512_loadu_ps(s + j));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(top, other));
}

// Gives `take` 2^(factor * (score - top)) of a query's keys, 16 at a time, and zeros up to
// `padded`. The difference is taken first, for it is exact where scores are large.
template <bool kShared, class Take>
FASTSSL_PAIRS FASTSSL_INLINE void exponentials(const float* s, float top, float factor,
                                               const Keys& keys, int64_t padded, Take& take) {
  const __m512 tops = _mm512_set1_ps(top), factors = _mm512_set1_ps(factor);
  int64_t j = 0;
  if (!kShared) {
    for (; j + 16 <= keys.count; j += 16) {
      take(j, exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(s + j), tops), factors)));
    }
  }
  for (; j < keys.count; j += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(s + j), tops), factors);
    take(j, _mm512_maskz_mov_ps(keys.lanes<kShared>(j), exp2(x)));
  }
  for (; j < padded; j += 16) take(j, _mm512_setzero_ps());
}

// Of some queries of a group: their exponentials in bfloat16 in b.p, and one by their sums. The
// loops over the rows are apart so that no row waits for the sum across another's lanes.
template <bool kShared>
FASTSSL_PAIRS inline void forward_rows(const Geometry& g, const Buffers& b, Range queries,
                                       int64_t keys, int64_t padded, float* inverses) {
  struct Take {
    uint16_t* p;
    __m512 sum = _mm512_setzero_ps();

    FASTSSL_PAIRS FASTSSL_INLINE void operator()(int64_t j, __m512 e) {
      sum = _mm512_add_ps(sum, e);
      _mm256_storeu_si256((__m256i*)(p + j), to_bf16(e));
    }
  };
  const float factor = g.scale() * kLog2e;
  float tops[kQueryBlock];
  __m512 sums[kQueryBlock];
  for (int64_t r = 0; r < queries.size(); ++r) {
    tops[r] = largest<kShared>(b.scores + r * b.keys, keys_of(g, keys, queries.begin + r));
  }
  for (int64_t r = 0; r < queries.size(); ++r) {
    Take take{b.p + r * b.keys};
    exponentials<kShared>(b.scores + r * b.keys, tops[r], factor,
                          keys_of(g, keys, queries.begin + r), padded, take);
    sums[r] = take.sum;
  }
  for (int64_t r = 0; r < queries.size(); ++r) inverses[r] = 1.0f / _mm512_reduce_add_ps(sums[r]);
}

// What turns a row of exponentials and of dp into probabilities and the gradient of the scores:
// p = e * inverse, ds = p * (dp - delta) * scale. All zero for a row that is no query.
struct RowFactors {
  float inverse = 0.0f, delta = 0.0f;
};

// Replaces the scores of some queries of a group by their exponentials, as above.
template <bool kShared>
FASTSSL_PAIRS inline void backward_rows(const Geometry& g, const Buffers& b, Range queries,
                                        int64_t keys, int64_t padded, RowFactors* factors) {
  struct Take {
    float* e;
    const float* dp;
    __m512 sum = _mm512_setzero_ps(), weighted = _mm512_setzero_ps();

    FASTSSL_PAIRS FASTSSL_INLINE void operator()(int64_t j, __m512 value) {
      sum = _mm512_add_ps(sum, value);
      weighted = _mm512_fmadd_ps(value, _mm512_loadu_ps(dp + j), weighted);
      _mm512_storeu_ps(e + j, value);
    }
  };
  const float factor = g.scale() * kLog2e;
  float tops[kQueryBlock];
  __m512 sums[kQueryBlock], weighted[kQueryBlock];
  for (int64_t r = 0; r < queries.size(); ++r) {
    tops[r] = largest<kShared>(b.scores + r * b.keys, keys_of(g, keys, queries.begin + r));
  }
  for (int64_t r = 0; r < queries.size(); ++r) {
    float* s = b.scores + r * b.keys;
    Take take{s, b.dp + r * b.keys};
    exponentials<kShared>(s, tops[r], factor, keys_of(g, keys, queries.begin + r), padded, take);
    sums[r] = take.sum;
    weighted[r] = take.weighted;
  }
  for (int64_t r = 0; r < queries.size(); ++r) {
    const float inverse = 1.0f / _mm512_reduce_add_ps(sums[r]);
    factors[r] = {inverse, _mm512_reduce_add_ps(weighted[r]) * inverse};
  }
}

// From the exponentials and dp of up to 32 queries, `rows` of them, to p and ds: both in pairs of
// rows [rows / 2, keys], and the rows of ds in bfloat16.
FASTSSL_PAIRS inline void gradient_rows(const Buffers& b, const RowFactors* factors, float scale,
                                        int64_t rows, int64_t keys, uint32_t* p_pairs,
                                        uint32_t* ds_pairs) {
  alignas(64) uint16_t order[32];
  for (int w = 0; w < 32; ++w) order[w] = uint16_t(w / 2 + w % 2 * 16);
  const __m512i interleave = _mm512_load_si512(order);
  const __m512 scales = _mm512_set1_ps(scale);
  for (int64_t r = 0; r < rows; r += 2, p_pairs += b.keys, ds_pairs += b.keys) {
    const float *s = b.scores + r * b.keys, *dp = b.dp + r * b.keys;
    uint16_t* ds = b.ds + r * b.keys;
    const __m512 inverse_0 = _mm512_set1_ps(factors[r].inverse);
    const __m512 inverse_1 = _mm512_set1_ps(factors[r + 1].inverse);
    const __m512 delta_0 = _mm512_set1_ps(factors[r].delta);
    const __m512 delta_1 = _mm512_set1_ps(factors[r + 1].delta);
    for (int64_t j = 0; j < keys; j += 16) {
      const __m512 p_0 = _mm512_mul_ps(_mm512_loadu_ps(s + j), inverse_0);
      const __m512 p_1 = _mm512_mul_ps(_mm512_loadu_ps(s + b.keys + j), inverse_1);
      const __m512 dp_0 = _mm512_loadu_ps(dp + j), dp_1 = _mm512_loadu_ps(dp + b.keys + j);
      const __m512 ds_0 = _mm512_mul_ps(_mm512_mul_ps(p_0, scales), _mm512_sub_ps(dp_0, delta_0));
      const __m512 ds_1 = _mm512_mul_ps(_mm512_mul_ps(p_1, scales), _mm512_sub_ps(dp_1, delta_1));
      const __m512i p = (__m512i)_mm512_cvtne2ps_pbh(p_1, p_0);
      const __m512i d = (__m512i)_mm512_cvtne2ps_pbh(ds_1, ds_0);
      _mm512_storeu_si512(p_pairs + j, _mm512_permutexvar_epi16(interleave, p));
      _mm512_storeu_si512(ds_pairs + j, _mm512_permutexvar_epi16(interleave, d));
      _mm256_storeu_si256((__m256i*)(ds + j), _mm512_castsi512_si256(d));
      _mm256_storeu_si256((__m256i*)(ds + b.keys + j), _mm512_extracti64x4_epi64(d, 1));
    }
  }
}

// Pairs of rows [16, keys] -> columns i .. i + 31 of the transpose [keys, queries].
FASTSSL_PAIRS inline void transpose_pairs(const Buffers& b, const uint32_t* pairs,
                                          uint16_t* transposed, int64_t i, int64_t keys) {
  for (int64_t j = 0; j < keys; j += 16) {
    uint32_t* to = reinterpret_cast<uint32_t*>(transposed + j * b.queries + i);
    transpose_block(pairs + j, b.keys, to, b.queries / 2);
  }
}

// The lines that a task to come reads and writes, fetched a few at a time all along the present
// one: where dozens are asked for at once, the core waits for them before it goes on.
class Upcoming {
 public:
  // For a present task of `units` units.
  Upcoming(const Geometry& g, int64_t units, bool backward)
      : dim_(g.dim()), width_(g.head_dim), turns_(turns(g, units, backward)) {}

  // `parts` that lie g.dim() apart in each of `rows` rows.
  void add(const uint16_t* data, int64_t rows, int64_t stride, int64_t parts) {
    for (int64_t p = 0; p < parts; ++p) regions_[count_++] = {data + p * dim_, rows, stride};
    rows_ += parts * rows;
    each_ = (rows_ + turns_ - 1) / turns_;
  }
  // Inlined, it would take registers from the products.
  FASTSSL_PAIRS __attribute__((noinline)) void fetch() {
    for (int64_t n = each_; n > 0 && at_ < count_; --n) {
      Region& r = regions_[at_];
      for (int64_t c = 0; c < width_; c += 32) _mm_prefetch(r.data + c, _MM_HINT_T1);
      if (--r.rows == 0) {
        ++at_;
      } else {
        r.data += r.stride;
      }
    }
  }

 private:
  struct Region {
    const uint16_t* data;
    int64_t rows, stride;
  };

  static int64_t turns(const Geometry& g, int64_t units, bool backward) {
    const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    const int64_t keys = units * g.unit_size, width = blocks(g.head_dim, 32);
    const int64_t most_rows = std::min(keys, g.head_dim) > 16 ? 14 : 16;
    const int64_t rows = best_unit() == Unit::tiles ? 32 : most_rows;
    const int64_t queries = blocks(units * g.unit_queries(), rows);
    if (!backward) return 3 + queries * (blocks(keys, 32) + width);
    return 4 + queries * (2 * blocks(keys, 32) + width) + 2 * blocks(keys, rows) * width;
  }

  Region regions_[7];
  int64_t dim_, width_, turns_, count_ = 0, at_ = 0, rows_ = 0, each_ = 0;
};

// How many tasks ahead is early enough: small ones are over before their lines come.
inline int64_t tasks_ahead(const Geometry& g) {
  return std::max<int64_t>(1, 48 / (g.group * g.unit_size));
}

// Rows of a head's channels in bfloat16, their sums times a factor per row where there are some.
struct WordRows {
  uint16_t* data;
  int64_t stride, columns;
  const float* factors;

  FASTSSL_PAIRS FASTSSL_INLINE void operator()(int64_t m, int64_t n, __m512 sums) const {
    const __m512 x = _mm512_mul_ps(sums, factor(m));
    _mm256_mask_storeu_epi16(data + m * stride + n, first_lanes(columns - n), to_bf16(x));
  }
  FASTSSL_PAIRS FASTSSL_INLINE void operator()(int64_t m, int64_t n, __m512 low,
                                               __m512 high) const {
    const __m512 f = factor(m);
    const __m512i x = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, f), _mm512_mul_ps(low, f));
    if (n + 32 <= columns) {
      _mm512_storeu_si512(data + m * stride + n, x);
    } else {
      _mm512_mask_storeu_epi16(data + m * stride + n, first_words(columns - n), x);
    }
  }

 private:
  FASTSSL_PAIRS FASTSSL_INLINE __m512 factor(int64_t m) const {
    return _mm512_set1_ps(factors ? factors[m] : 1.0f);
  }
};

// Products that leave as bfloat16: from the registers, or from tiles by way of b.product.
FASTSSL_PAIRS inline void multiply_into(const Buffers& b, const uint16_t* left, int64_t ld,
                                        const uint32_t* right, int64_t rows, int64_t width,
                                        int64_t depth, const WordRows& store, Upcoming& ahead) {
  if (best_unit() == Unit::dots) {
    const auto* words = reinterpret_cast<const uint32_t*>(left);
    return multiply_dots<false>(words, ld / 2, right, b.width, rows, width, depth, store, ahead);
  }
  multiply(left, ld, right, b.width, b.product, b.width, round_up(rows, 16), width, depth, ahead);
  for (int64_t r = 0; r < rows; ++r) {
    const float* sums = b.product + r * b.width;
    for (int64_t c = 0; c < width; c += 16) store(r, c, _mm512_loadu_ps(sums + c));
  }
}

// How many queries are worked on at once.
inline int64_t query_block(int64_t queries) {
  if (best_unit() == Unit::tiles || queries <= kQueryBlock) return kQueryBlock;
  return even_block(queries, 14);
}

// Some units and one head, to whose channels tokens and out point.
FASTSSL_PAIRS inline void forward(const Geometry& g, const Buffers& b, const uint16_t* tokens,
                                  int64_t units, uint16_t* out, Upcoming& ahead) {
  const int64_t queries = units * g.unit_queries(), keys = units * g.unit_size;
  const int64_t stride = g.token_stride();
  const Sizes n(g, units);
  ahead.fetch();
  const Rows q = load_queries(g, b, tokens, units, false);
  ahead.fetch();
  const uint16_t *k = tokens + g.dim(), *v = k + g.dim();
  pair_columns(k, stride, keys, g.head_dim, b.k_columns, b.keys, n.keys_padded);
  ahead.fetch();
  pair_rows(v, stride, keys, g.head_dim, b.v_pairs, b.width, n.keys_depth);
  const int64_t block = query_block(queries);
  for (int64_t i = 0; i < queries; i += block) {
    const int64_t rows = std::min(block, queries - i);
    const int64_t all_rows = round_up(rows, grain().rows);
    multiply(q.row(i), q.ld, b.k_columns, b.keys, b.scores, b.keys, all_rows, n.keys_padded,
             n.width_depth, ahead);
    float inverses[kQueryBlock];
    const auto softmax = g.group == 1 ? forward_rows<false> : forward_rows<true>;
    softmax(g, b, {i, i + rows}, keys, n.keys_padded, inverses);
    multiply_into(b, b.p, b.keys, b.v_pairs, rows, n.width, n.keys_depth,
                  {out + i * g.dim(), g.dim(), g.head_dim, inverses}, ahead);
  }
}

// The gradient of one query to the token that was its maximum, zeros to the others.
FASTSSL_PAIRS inline void store_pooled_row(const Geometry& g, const float* src,
                                           const uint8_t* argmax, uint16_t* token) {
  for (int64_t c = 0; c < g.head_dim; c += 16) {
    const __mmask16 mask = first_lanes(g.head_dim - c);
    const __m256i x = to_bf16(_mm512_loadu_ps(src + c));
    const __m128i which = _mm_loadu_si128((const __m128i*)(argmax + c));
    for (int64_t s = 0; s < g.q_stride; ++s) {
      const __mmask16 here = _mm_cmpeq_epi8_mask(which, _mm_set1_epi8(char(s)));
      uint16_t* to = token + s * g.unit_queries() * g.token_stride() + c;
      _mm256_mask_storeu_epi16(to, mask, _mm256_maskz_mov_epi16(here, x));
    }
  }
}

FASTSSL_PAIRS inline void backward(const Geometry& g, const Buffers& b, const uint16_t* dout,
                                   const uint16_t* tokens, int64_t units, uint16_t* dtokens,
                                   Upcoming& ahead) {
  const int64_t queries = units * g.unit_queries(), keys = units * g.unit_size;
  const int64_t stride = g.token_stride();
  const Sizes n(g, units);
  ahead.fetch();
  const Rows q = load_queries(g, b, tokens, units, true), d = load_dout(g, b, dout, queries);
  const uint16_t *k = tokens + g.dim(), *v = k + g.dim();
  ahead.fetch();
  pair_columns(k, stride, keys, g.head_dim, b.k_columns, b.keys, n.keys_padded);
  ahead.fetch();
  pair_columns(v, stride, keys, g.head_dim, b.v_columns, b.keys, n.keys_padded);
  pair_rows(q.data, q.ld, queries, g.head_dim, b.q_pairs, b.width, n.queries_depth);
  ahead.fetch();
  pair_rows(k, stride, keys, g.head_dim, b.k_pairs, b.width, n.keys_depth);
  pair_rows(d.data, d.ld, queries, g.head_dim, b.dout_pairs, b.width, n.queries_depth);
  const bool tiles = best_unit() == Unit::tiles;
  const int64_t block = query_block(queries);
  for (int64_t i = 0; i < queries; i += block) {
    const int64_t rows = std::min(block, queries - i);
    // Tiles sum over whole tiles of queries below, of which all must be written; dots over pairs.
    const int64_t all_rows = tiles ? kQueryBlock : rows;
    multiply(q.row(i), q.ld, b.k_columns, b.keys, b.scores, b.keys, all_rows, n.keys_padded,
             n.width_depth, ahead);
    multiply(d.row(i), d.ld, b.v_columns, b.keys, b.dp, b.keys, all_rows, n.keys_padded,
             n.width_depth, ahead);
    if (all_rows % 2) {
      std::fill_n(b.scores + all_rows * b.keys, n.keys_padded, 0.0f);
      std::fill_n(b.dp + all_rows * b.keys, n.keys_padded, 0.0f);
    }
    RowFactors factors[kQueryBlock];
    const auto softmax = g.group == 1 ? backward_rows<false> : backward_rows<true>;
    softmax(g, b, {i, i + rows}, keys, n.keys_padded, factors);
    uint32_t* const p_pairs = tiles ? b.p_pairs : b.p_pairs + i / 2 * b.keys;
    uint32_t* const ds_pairs = tiles ? b.ds_pairs : b.ds_pairs + i / 2 * b.keys;
    gradient_rows(b, factors, g.scale(), round_up(all_rows, 2), n.keys_padded, p_pairs, ds_pairs);
    if (tiles) {
      transpose_pairs(b, p_pairs, b.p_transposed, i, n.keys);
      transpose_pairs(b, ds_pairs, b.ds_transposed, i, n.keys);
    }
    if (g.q_stride == 1) {
      multiply_into(b, b.ds, b.keys, b.k_pairs, rows, n.width, n.keys_depth,
                    {dtokens + i * stride, stride, g.head_dim, nullptr}, ahead);
      continue;
    }
    multiply(b.ds, b.keys, b.k_pairs, b.width, b.product, b.width, all_rows, n.width, n.keys_depth,
             ahead);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t unit = (i + r) / g.unit_queries(), query = (i + r) % g.unit_queries();
      store_pooled_row(g, b.product + r * b.width, b.argmax + (i + r) * b.width,
                       dtokens + (unit * g.unit_size + query) * stride);
    }
  }
  const struct {
    const uint16_t* transposed;
    const uint32_t *pairs, *right;
    WordRows store;
  } products[2] = {
      {b.ds_transposed, b.ds_pairs, b.q_pairs, {dtokens + g.dim(), stride, g.head_dim, nullptr}},
      {b.p_transposed,
       b.p_pairs,
       b.dout_pairs,
       {dtokens + 2 * g.dim(), stride, g.head_dim, nullptr}}};
  for (const auto& x : products) {
    if (!tiles) {
      multiply_dots<true>(x.pairs, b.keys, x.right, b.width, keys, n.width, n.queries_depth,
                          x.store, ahead);
      continue;
    }
    for (int64_t j = 0; j < keys; j += kQueryBlock) {
      WordRows store = x.store;
      store.data += j * stride;
      multiply_into(b, x.transposed + j * b.queries, b.queries, x.right,
                    std::min(kQueryBlock, keys - j), n.width, n.queries_depth, store, ahead);
    }
  }
}

}  // namespace fastssl::pairs

#endif
