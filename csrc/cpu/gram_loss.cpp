// gram_loss: squared differences of two matrices of similarities, tile by tile; see
// kernels/gram_loss.
#include "contrastive.h"

#include <optional>

namespace fastssl {
namespace {

// student -= teacher, both without what is negative where told so. Returns the sum of squares, of
// runs short enough for float32; then student is 0 where its similarity did not count.
FASTSSL_INLINE double subtract(const Matrix& student, const Matrix& teacher, bool clamp_student,
                               bool clamp_teacher) {
  const float least_student = clamp_student ? 0.0f : -INFINITY;
  const float least_teacher = clamp_teacher ? 0.0f : -INFINITY;
  double total = 0.0;
  for (int64_t r = 0; r < student.rows; ++r) {
    float *s = student.data + r * student.columns, *t = teacher.data + r * teacher.columns;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < student.columns; ++j) {
      // Written so that a NaN stays one.
      const bool out = s[j] < least_student;
      const float difference = (out ? 0.0f : s[j]) - (t[j] < least_teacher ? 0.0f : t[j]);
      sum += difference * difference;
      s[j] = out ? 0.0f : difference;
    }
    total += double(sum);
  }
  return total;
}

struct Tile {
  int64_t row, column;  // of blocks; row < 0: no tile
};

// The tiles in rounds, in each of which no two write the same block of the gradient: threads share
// a round out, and the order in which a block is added to depends on the rounds alone.
struct Rounds {
  int64_t row_blocks, column_blocks;
  bool symmetric;  // a tile off the diagonal serves for its mirror image, too

  int64_t size() const { return symmetric ? even() : column_blocks; }
  int64_t tiles(int64_t round) const { return symmetric && round > 0 ? even() / 2 : row_blocks; }
  Tile tile(int64_t round, int64_t i) const {
    if (!symmetric) return {i, round};
    if (round == 0) return {i, i};
    // A tournament of all blocks: one stays, the others sit around a circle that turns.
    const int64_t n = even() - 1;
    const int64_t a = i == 0 ? n : (round + i) % n, b = (round + n - i) % n;
    if (std::max(a, b) >= row_blocks) return {-1, -1};
    return {std::min(a, b), std::max(a, b)};
  }

 private:
  int64_t even() const { return row_blocks + row_blocks % 2; }
};

// parts [I, row blocks] = sums over pairs of patches of an image of (student other_student^T -
// teacher other_teacher^T)^2, of student [I, N, D] and teacher [I, N, E] and others [I, M, D] and
// [I, M, E]; without others they are student and teacher themselves, and tiles below the diagonal
// are those above. gradient [I, N, D], if wanted, is scale times the product of the differences
// and the others. Scratch is two tiles for each of `tasks`, [tasks, 2 * block * block].
void gram_loss(Tensor student, Tensor teacher, std::optional<Tensor> other_student,
               std::optional<Tensor> other_teacher, int64_t block, bool clamp_student,
               bool clamp_teacher, double scale, Tensor scratch, Tensor parts,
               std::optional<Tensor> gradient) {
  check_cpu(student, "student");
  check_cpu(teacher, "teacher");
  const bool symmetric = !other_student;
  STD_TORCH_CHECK(symmetric == !other_teacher, "others must be given for both or for neither");
  const Tensor columns_s = symmetric ? student : *other_student;
  const Tensor columns_t = symmetric ? teacher : *other_teacher;
  const int64_t I = student.size(0), N = student.size(1), D = student.size(2), E = teacher.size(2);
  const int64_t M = columns_s.size(1), tasks = scratch.size(0);
  const Rounds rounds{(N + block - 1) / block, (M + block - 1) / block, symmetric};
  STD_TORCH_CHECK(scratch.size(1) >= 2 * block * block, "scratch must hold two tiles per task");
  STD_TORCH_CHECK(parts.size(0) == I && parts.size(1) == rounds.row_blocks,
                  "parts must have a number per block of rows");
  const float *s_ptr = input<float>(student), *t_ptr = input<float>(teacher);
  const float *cs_ptr = input<float>(columns_s), *ct_ptr = input<float>(columns_t);
  float* scratch_ptr = output<float>(scratch);
  float* gradient_ptr = gradient ? output<float>(*gradient) : nullptr;
  double* parts_ptr = output<double>(parts);
  const auto work = [&](int64_t image, int64_t round, Tile at, float* tiles) FASTSSL_LAMBDA {
    const Range r = block_of(N, at.row, block), c = block_of(M, at.column, block);
    const float *s = s_ptr + image * N * D, *t = t_ptr + image * N * E;
    const float *cs = cs_ptr + image * M * D, *ct = ct_ptr + image * M * E;
    const Matrix rows = matrix(s + r.begin * D, r.size(), D);
    const Matrix columns = matrix(cs + c.begin * D, c.size(), D);
    const Matrix tile = matrix(tiles, r.size(), c.size());
    const Matrix other = matrix(tiles + block * block, r.size(), c.size());
    multiply(tile, rows, columns.transposed(), 0.0, 1.0);
    multiply(other, matrix(t + r.begin * E, r.size(), E),
             matrix(ct + c.begin * E, c.size(), E).transposed(), 0.0, 1.0);
    const bool mirrored = symmetric && at.row != at.column;
    const double sum = subtract(tile, other, clamp_student, clamp_teacher);
    double* part = parts_ptr + image * rounds.row_blocks + at.row;
    *part = (round == 0 ? 0.0 : *part) + (mirrored ? 2.0 * sum : sum);
    if (!gradient_ptr) return;
    float* to = gradient_ptr + image * N * D;
    multiply(matrix(to + r.begin * D, r.size(), D), tile, columns, round == 0 ? 0.0 : 1.0, scale);
    if (!mirrored) return;
    multiply(matrix(to + c.begin * D, c.size(), D), tile.transposed(), rows, 1.0, scale);
  };
  for (int64_t round = 0; round < rounds.size(); ++round) {
    const int64_t per_image = rounds.tiles(round);
    // With fewer tiles than tasks some are idle: a product shared out by torch would sum in
    // another order.
    parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
      for (int64_t task = begin; task < end; ++task) {
        const Range own = part_of(I * per_image, task, tasks);
        for (int64_t i = own.begin; i < own.end; ++i) {
          const Tile at = rounds.tile(round, i % per_image);
          if (at.row >= 0) work(i / per_image, round, at, scratch_ptr + task * 2 * block * block);
        }
      }
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "gram_loss(Tensor student, Tensor teacher, Tensor? other_student, Tensor? other_teacher, "
      "int block, bool clamp_student, bool clamp_teacher, float scale, Tensor(a!) scratch, "
      "Tensor(b!) parts, Tensor(c!)? gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) { m.impl("gram_loss", TORCH_BOX(&gram_loss)); }

}  // namespace fastssl
