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

// parts [B] = sums over the pairs of patches of an image of (student student^T - teacher
// teacher^T)^2, of student [B, N, D] and teacher [B, N, E]; gradient [B, N, D], if wanted, is scale
// times the product of the differences and the student. Tiles below the diagonal are those above.
// An image is one thread's, with two tiles of scratch [tasks, 2 * block * block].
void gram_loss(Tensor student, Tensor teacher, int64_t block, bool clamp_student,
               bool clamp_teacher, double scale, Tensor scratch, Tensor parts,
               std::optional<Tensor> gradient) {
  check_cpu(student, "student");
  check_cpu(teacher, "teacher");
  const int64_t B = student.size(0), N = student.size(1), D = student.size(2), E = teacher.size(2);
  const int64_t tasks = scratch.size(0), blocks = (N + block - 1) / block;
  STD_TORCH_CHECK(scratch.size(1) >= 2 * block * block, "scratch must hold two tiles per task");
  const float *student_ptr = input<float>(student), *teacher_ptr = input<float>(teacher);
  float* scratch_ptr = output<float>(scratch);
  float* gradient_ptr = gradient ? output<float>(*gradient) : nullptr;
  double* parts_ptr = output<double>(parts);
  parallel(tasks, 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t task = begin; task < end; ++task) {
      float* tiles = scratch_ptr + task * 2 * block * block;
      const Range images = part_of(B, task, tasks);
      for (int64_t b = images.begin; b < images.end; ++b) {
        const float *s = student_ptr + b * N * D, *t = teacher_ptr + b * N * E;
        double total = 0.0;
        for (int64_t i = 0; i < blocks; ++i) {
          const Range r = block_of(N, i, block);
          const Matrix rows = matrix(s + r.begin * D, r.size(), D);
          for (int64_t k = i; k < blocks; ++k) {
            const Range c = block_of(N, k, block);
            const Matrix columns = matrix(s + c.begin * D, c.size(), D);
            const Matrix tile = matrix(tiles, r.size(), c.size());
            const Matrix other = matrix(tiles + block * block, r.size(), c.size());
            multiply(tile, rows, columns.transposed(), 0.0, 1.0);
            multiply(other, matrix(t + r.begin * E, r.size(), E),
                     matrix(t + c.begin * E, c.size(), E).transposed(), 0.0, 1.0);
            const double sum = subtract(tile, other, clamp_student, clamp_teacher);
            total += k == i ? sum : 2.0 * sum;
            if (!gradient_ptr) continue;
            float* to = gradient_ptr + b * N * D;
            const Matrix rows_to = matrix(to + r.begin * D, r.size(), D);
            multiply(rows_to, tile, columns, i == 0 && k == 0 ? 0.0 : 1.0, scale);
            if (k == i) continue;
            // The first row of tiles is the first to reach every block of columns.
            const Matrix columns_to = matrix(to + c.begin * D, c.size(), D);
            multiply(columns_to, tile.transposed(), rows, i == 0 ? 0.0 : 1.0, scale);
          }
        }
        parts_ptr[b] = total;
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "gram_loss(Tensor student, Tensor teacher, int block, bool clamp_student, "
      "bool clamp_teacher, float scale, Tensor(a!) scratch, Tensor(b!) parts, "
      "Tensor(c!)? gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) { m.impl("gram_loss", TORCH_BOX(&gram_loss)); }

}  // namespace fastssl
