// All pairs of rows, each pair once; see kernels/nt_xent/__init__.py.
//
// Rows are cut into blocks. A tile of the scores of two blocks adds to both, so threads must not
// hold tiles with a block in common: blocks meet as the teams of a tournament do, in rounds in
// which each meets one other, and the order of a block's sums is that of its rounds.
#include "contrastive.h"

#include <cfloat>

namespace fastssl {
namespace {

struct Blocks {
  int64_t half, size;

  // None of them across the two halves.
  int64_t count() const { return 2 * per_half(); }
  int64_t per_half() const { return (half + size - 1) / size; }
  Range operator[](int64_t i) const {
    const int64_t start = i < per_half() ? 0 : half;
    const Range range = block_of(half, i % per_half(), size);
    return {start + range.begin, start + range.end};
  }
};

// Calls play(task, i, j) for every pair of `count` (even) teams, those of a round in parallel on
// `tasks` threads. Some may have nothing to do: outside of a parallel loop torch's products would
// use all threads, and sum in another order.
template <class F>
void tournament(int64_t count, int64_t tasks, const F& play) {
  const int64_t others = count - 1, games = count / 2;
  for (int64_t round = 0; round < others; ++round) {
    parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t task = begin; task < end; ++task) {
        const Range own = part_of(games, task, tasks);
        for (int64_t game = own.begin; game < own.end; ++game) {
          // The last team stays, the others move round it.
          const int64_t i = (round + game) % others;
          const int64_t j = game ? (round + others - game) % others : others;
          play(task, std::min(i, j), std::max(i, j));
        }
      }
    });
  }
}

struct Problem {
  const float *rows, *columns;  // [N, D], [C, D]
  int64_t N, C, D, first;
  double factor;
  Blocks blocks;
  float* scratch;  // [tasks, height * size]
  int64_t height, tasks;

  Matrix row_block(Range r) const { return matrix(rows + r.begin * D, r.size(), D); }
  Matrix column_block(Range c) const { return matrix(columns + c.begin * D, c.size(), D); }

  Matrix tile(int64_t task, const Matrix& left, const Matrix& right) const {
    float* to = scratch + task * height * blocks.size;
    const Matrix scores = matrix(to, left.rows, right.rows);
    multiply(scores, left, right.transposed(), 0.0, factor);
    return scores;
  }

  // Calls f(rows, matrix of them) for pieces of a block, each with a whole block a tile.
  template <class F>
  FASTSSL_INLINE void for_each_piece(Range block, const F& f) const {
    for (int64_t i = block.begin; i < block.end; i += height) {
      const Range piece{i, std::min(block.end, i + height)};
      f(piece, row_block(piece));
    }
  }

  // A tile of rows of a block and the block, without the rows themselves.
  Matrix own_tile(int64_t task, Range rows, Range block) const {
    const Matrix scores = tile(task, row_block(rows), row_block(block));
    float* diagonal = scores.data + rows.begin - block.begin;
    for (int64_t r = 0; r < scores.rows; ++r) diagonal[r * (scores.columns + 1)] = -INFINITY;
    return scores;
  }

  // Calls f(task, block) for every block, in parallel.
  template <class F>
  void for_each_block(const F& f) const {
    parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t task = begin; task < end; ++task) {
        const Range own = part_of(blocks.count(), task, tasks);
        for (int64_t i = own.begin; i < own.end; ++i) f(task, blocks[i]);
      }
    });
  }

  // Calls f(c) for blocks of columns that are not among the rows: those of other processes.
  template <class F>
  FASTSSL_INLINE void for_each_other(const F& f) const {
    const int64_t size = blocks.size;
    for (int64_t c = 0; c < first; c += size) f(Range{c, std::min(first, c + size)});
    for (int64_t c = first + N; c < C; c += size) f(Range{c, std::min(C, c + size)});
  }
};

Problem problem(const Tensor& rows, const Tensor& columns, int64_t first, double factor,
                int64_t size, Tensor& scratch) {
  check_cpu(rows, "rows");
  check_cpu(columns, "columns");
  Problem p;
  p.rows = input<float>(rows), p.columns = input<float>(columns);
  p.N = rows.size(0), p.C = columns.size(0), p.D = rows.size(1);
  p.first = first, p.factor = factor, p.blocks = {p.N / 2, size};
  p.scratch = output<float>(scratch), p.tasks = scratch.size(0);
  p.height = scratch.size(1) / size;
  return p;
}

// Adds a tile to the softmax of its columns.
FASTSSL_INLINE void add_columns(const Matrix& tile, float* top, double* sum) {
  alignas(64) float highest[kStrip], added[kStrip];
  for (int64_t c = 0; c < tile.columns; c += kStrip) {
    const int64_t n = std::min(kStrip, tile.columns - c);
    for (int64_t j = 0; j < n; ++j) highest[j] = top[c + j], added[j] = 0.0f;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* s = tile.data + r * tile.columns + c;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) highest[j] = highest[j] > s[j] ? highest[j] : s[j];
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* s = tile.data + r * tile.columns + c;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) added[j] += exp2_fast(s[j] - highest[j]);
    }
    for (int64_t j = 0; j < n; ++j) {
      sum[c + j] = sum[c + j] * exp2_fast(top[c + j] - highest[j]) + added[j];
      top[c + j] = highest[j];
    }
  }
}

// Adds columns [c, c + n) of a tile of scores that need no shift to the sums of both sides: one
// exponential for two.
FASTSSL_INLINE void add_strip(const Matrix& tile, int64_t c, int64_t n, double* row_sum,
                              double* column_sum) {
  alignas(64) float added[kStrip];
  for (int64_t j = 0; j < n; ++j) added[j] = 0.0f;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* s = tile.data + r * tile.columns + c;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < n; ++j) {
      const float term = exp2_fast(s[j]);
      added[j] += term;
      total += term;
    }
    row_sum[r] += total;
  }
  for (int64_t j = 0; j < n; ++j) column_sum[c + j] += added[j];
}

FASTSSL_INLINE void add_both(const Matrix& tile, double* row_sum, double* column_sum) {
  int64_t c = 0;
  for (; c + kStrip <= tile.columns; c += kStrip) add_strip(tile, c, kStrip, row_sum, column_sum);
  if (c < tile.columns) add_strip(tile, c, tile.columns - c, row_sum, column_sum);
}

// The softmax of every row, top and sum [N], over all columns but the row itself; rows are columns
// [first, first + N). With `bounded` scores top comes in as 0.
void contrastive_stream_pairs(Tensor rows, Tensor columns, int64_t first, double factor,
                              bool bounded, int64_t size, Tensor scratch, Tensor top, Tensor sum) {
  const Problem p = problem(rows, columns, first, factor, size, scratch);
  float* top_ptr = output<float>(top);
  double* sum_ptr = output<double>(sum);
  tournament(p.blocks.count(), p.tasks, [&](int64_t task, int64_t i, int64_t j) FASTSSL_LAMBDA {
    const Range c = p.blocks[j];
    p.for_each_piece(p.blocks[i], [&](Range r, const Matrix& piece) FASTSSL_LAMBDA {
      const Matrix tile = p.tile(task, piece, p.row_block(c));
      if (bounded) {
        add_both(tile, sum_ptr + r.begin, sum_ptr + c.begin);
      } else {
        add_rows(tile, top_ptr + r.begin, sum_ptr + r.begin, nullptr, 0);
        add_columns(tile, top_ptr + c.begin, sum_ptr + c.begin);
      }
    });
  });
  // Only now: these move the tops, which bounded pairs take to be 0.
  p.for_each_block([&](int64_t task, Range block) FASTSSL_LAMBDA {
    p.for_each_piece(block, [&](Range r, const Matrix& piece) FASTSSL_LAMBDA {
      float* to = top_ptr + r.begin;
      add_rows(p.own_tile(task, r, block), to, sum_ptr + r.begin, nullptr, 0);
      p.for_each_other([&](Range c) FASTSSL_LAMBDA {
        add_rows(p.tile(task, piece, p.column_block(c)), to, sum_ptr + r.begin, nullptr, 0);
      });
    });
  });
}

struct Weights {
  bool bounded;
  const float *total, *weight;  // [C]; bounded: the weights have 2^-total in them
};

// Scores become w[r] 2^(score - total[r]) + w[c] 2^(score - total[c]).
FASTSSL_INLINE void weigh(const Matrix& tile, const Weights& w, int64_t row, int64_t column) {
  const float *ct = w.total + column, *cw = w.weight + column;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* s = tile.data + r * tile.columns;
    const float rt = w.total[row + r], rw = w.weight[row + r];
    if (w.bounded) {
#pragma omp simd
      for (int64_t j = 0; j < tile.columns; ++j) s[j] = exp2_fast(s[j]) * (rw + cw[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < tile.columns; ++j) {
        s[j] = rw * exp2_fast(s[j] - rt) + cw[j] * exp2_fast(s[j] - ct[j]);
      }
    }
  }
}

// gradient[i] = sum_j (weight of the pair i, j) column[j], in halves of N / 2 rows each.
void contrastive_pair_gradient(Tensor rows, Tensor columns, int64_t first, double factor,
                               bool bounded, int64_t size, Tensor scratch, Tensor totals,
                               Tensor weights, Tensor first_half, Tensor second_half) {
  const Problem p = problem(rows, columns, first, factor, size, scratch);
  const Weights w{bounded, input<float>(totals), input<float>(weights)};
  float* halves[2] = {output<float>(first_half), output<float>(second_half)};
  const auto target = [&](Range r) {
    float* half = r.begin < p.N / 2 ? halves[0] : halves[1] - p.N / 2 * p.D;
    return matrix(half + r.begin * p.D, r.size(), p.D);
  };
  p.for_each_block([&](int64_t task, Range block) FASTSSL_LAMBDA {
    p.for_each_piece(block, [&](Range r, const Matrix& piece) FASTSSL_LAMBDA {
      const Matrix own = p.own_tile(task, r, block);
      weigh(own, w, first + r.begin, first + block.begin);
      multiply(target(r), own, p.row_block(block), 0.0, 1.0);
      p.for_each_other([&](Range c) FASTSSL_LAMBDA {
        const Matrix other = p.column_block(c), tile = p.tile(task, piece, other);
        weigh(tile, w, first + r.begin, c.begin);
        multiply(target(r), tile, other, 1.0, 1.0);
      });
    });
  });
  tournament(p.blocks.count(), p.tasks, [&](int64_t task, int64_t i, int64_t j) FASTSSL_LAMBDA {
    const Range c = p.blocks[j];
    const Matrix right = p.row_block(c);
    p.for_each_piece(p.blocks[i], [&](Range r, const Matrix& piece) FASTSSL_LAMBDA {
      const Matrix tile = p.tile(task, piece, right);
      weigh(tile, w, first + r.begin, first + c.begin);
      multiply(target(r), tile, right, 1.0, 1.0);
      multiply(target(c), tile.transposed(), piece, 1.0, 1.0);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "contrastive_stream_pairs(Tensor rows, Tensor columns, int first, float factor, "
      "bool bounded, int size, Tensor(a!) scratch, Tensor(b!) top, Tensor(c!) sum) -> ()");
  m.def(
      "contrastive_pair_gradient(Tensor rows, Tensor columns, int first, float factor, "
      "bool bounded, int size, Tensor(a!) scratch, Tensor totals, Tensor weights, "
      "Tensor(b!) first_half, Tensor(c!) second_half) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("contrastive_stream_pairs", TORCH_BOX(&contrastive_stream_pairs));
  m.impl("contrastive_pair_gradient", TORCH_BOX(&contrastive_pair_gradient));
}

}  // namespace fastssl
