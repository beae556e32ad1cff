// Cross-entropy between teacher and student views; see kernels/dino_cross_entropy/__init__.py for
// the formula and view_cross_entropy.h for the arithmetic.
#include <algorithm>
#include <optional>

#include "pages.h"
#include "view_cross_entropy.h"

namespace fastssl {
namespace {

Logits describe(const Tensor& logits, const std::optional<Tensor>& scale) {
  check_cpu(logits, "logits");
  return {logits.const_data_ptr(), logits.scalar_type(), scale ? input<float>(*scale) : nullptr};
}

int64_t rows_in_use(const std::optional<Tensor>& num_rows, int64_t B) {
  return num_rows ? std::clamp<int64_t>(*input<int64_t>(*num_rows), 0, B) : B;
}

// `temps` [2], where given, takes the place of the two numbers.
Problem describe(const Tensor& student, const Tensor& teacher, double student_temp,
                 double teacher_temp, const std::optional<Tensor>& temps,
                 const std::optional<Tensor>& center, const std::optional<Tensor>& log_u,
                 const std::optional<Tensor>& student_scale,
                 const std::optional<Tensor>& teacher_scale, const std::optional<Tensor>& num_rows,
                 bool skip_same_view) {
  Problem p;
  p.S = student.size(0), p.B = student.size(1), p.K = student.size(2), p.T = teacher.size(0);
  STD_TORCH_CHECK(p.T <= kMaxTeacherViews, "too many teacher views");
  p.rows = rows_in_use(num_rows, p.B);
  p.student = describe(student, student_scale), p.teacher = describe(teacher, teacher_scale);
  p.student_temp = temps ? double(input<float>(*temps)[0]) : student_temp;
  p.student_factor = float(1.0 / (kLn2 * p.student_temp));
  p.teacher_factor = float(1.0 / (kLn2 * (temps ? double(input<float>(*temps)[1]) : teacher_temp)));
  p.center = center ? input<float>(*center) : nullptr;
  p.log_u = log_u ? input<float>(*log_u) : nullptr;
  p.log_u_stride = log_u && log_u->size(0) > 1 ? log_u->stride(0) : 0;
  p.skip_same_view = skip_same_view;
  return p;
}

int64_t grain_cells(const Problem& p) { return grain_rows((p.S + p.T) * std::min(kChunk, p.K)); }

// Fills the columns of `parts` [B, width, C] from first_chunk on. Images are taken in slices, each
// of which sums the teacher's logits over its images into its row of teacher_sums [slices, K].
void dino_cross_entropy_parts(Tensor student, Tensor teacher, double student_temp,
                              double teacher_temp, std::optional<Tensor> temps,
                              std::optional<Tensor> center, std::optional<Tensor> log_u,
                              std::optional<Tensor> student_scale,
                              std::optional<Tensor> teacher_scale, std::optional<Tensor> num_rows,
                              int64_t first_chunk, int64_t slices, Tensor parts,
                              std::optional<Tensor> teacher_sums) {
  const Problem p = describe(student, teacher, student_temp, teacher_temp, temps, center, log_u,
                             student_scale, teacher_scale, num_rows, false);
  const int64_t chunks = p.chunks(), C = parts.size(2), width = parts.size(1);
  STD_TORCH_CHECK(first_chunk + chunks <= C, "parts must hold a column for every chunk");
  float* parts_ptr = output<float>(parts) + first_chunk;
  float* sums = teacher_sums ? static_cast<float*>(teacher_sums->mutable_data_ptr()) : nullptr;
  parallel(slices * chunks, grain_cells(p), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slice = i / chunks, chunk = i % chunks;
      float* sum = sums ? sums + slice * p.K + chunk * kChunk : nullptr;
      if (sum) std::fill(sum, sum + std::min(kChunk, p.K - chunk * kChunk), 0.0f);
      const int64_t last = std::min(p.rows, (slice + 1) * p.B / slices);
      for (int64_t b = slice * p.B / slices; b < last; ++b) {
        cell_parts(p, b, chunk, parts_ptr + b * width * C + chunk, C, sum);
      }
    }
  });
}

// Merges the first `columns` columns of `parts` [B, width, C] into the first one.
void dino_cross_entropy_collapse(int64_t num_student, int64_t num_teacher,
                                 std::optional<Tensor> num_rows, int64_t columns, Tensor parts) {
  const int64_t rows = rows_in_use(num_rows, parts.size(0));
  const int64_t width = parts.size(1), C = parts.size(2);
  float* parts_ptr = output<float>(parts);
  parallel(rows, grain_rows(width * C), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t b = begin; b < end; ++b) {
      collapse(num_student, num_teacher, parts_ptr + b * width * C, C, columns);
    }
  });
}

// `norm` is what the weighted sum of all pairs and images is multiplied by.
void dino_cross_entropy_combine(Tensor parts, std::optional<Tensor> log_v,
                                std::optional<Tensor> row_weights, std::optional<Tensor> num_rows,
                                bool skip_same_view, bool mean, Tensor per_image,
                                Tensor student_stats, Tensor teacher_stats, Tensor loss,
                                Tensor entropy, Tensor norm) {
  Problem p{};
  p.S = student_stats.size(0), p.T = teacher_stats.size(0), p.B = student_stats.size(1);
  p.rows = rows_in_use(num_rows, p.B);
  p.skip_same_view = skip_same_view;
  const int64_t width = parts.size(1), C = parts.size(2);
  float *parts_ptr = output<float>(parts), *images = output<float>(per_image);
  float *student = output<float>(student_stats), *teacher = output<float>(teacher_stats);
  const float* log_v_ptr = log_v ? input<float>(*log_v) : nullptr;
  parallel(p.rows, grain_rows(width * C), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t b = begin; b < end; ++b) {
      const Image image = combine(p, parts_ptr + b * width * C, C, log_v_ptr, b, student, teacher);
      images[2 * b] = float(image.loss), images[2 * b + 1] = float(image.entropy);
    }
  });
  const float* weights = row_weights ? input<float>(*row_weights) : nullptr;
  double loss_sum = 0.0, entropy_sum = 0.0, total = 0.0;
  for (int64_t b = 0; b < p.rows; ++b) {
    const double weight = weights ? double(weights[b]) : 1.0;
    loss_sum += weight * double(images[2 * b]);
    entropy_sum += double(images[2 * b + 1]);
    total += weight;
  }
  const int64_t pairs = p.S * p.T - (skip_same_view ? std::min(p.S, p.T) : 0);
  const double factor = !mean ? 1.0 : total != 0.0 ? 1.0 / (total * double(pairs)) : 0.0;
  *output<float>(loss) = float(loss_sum * factor);
  *output<float>(entropy) = float(entropy_sum / double(std::max<int64_t>(1, p.rows * p.T)));
  *output<float>(norm) = float(factor);
}

void dino_cross_entropy_gradient(Tensor dloss, Tensor student, Tensor teacher, double student_temp,
                                 double teacher_temp, std::optional<Tensor> temps,
                                 std::optional<Tensor> center, std::optional<Tensor> log_u,
                                 std::optional<Tensor> student_scale,
                                 std::optional<Tensor> teacher_scale,
                                 std::optional<Tensor> num_rows, std::optional<Tensor> row_weights,
                                 bool skip_same_view, Tensor student_stats, Tensor teacher_stats,
                                 Tensor norm, Tensor dstudent) {
  const Problem p = describe(student, teacher, student_temp, teacher_temp, temps, center, log_u,
                             student_scale, teacher_scale, num_rows, skip_same_view);
  const float gain =
      float(double(*input<float>(dloss)) * double(*input<float>(norm)) / p.student_temp);
  const float* weights = row_weights ? input<float>(*row_weights) : nullptr;
  const float *student_ptr = input<float>(student_stats),
              *teacher_ptr = input<float>(teacher_stats);
  char* to = static_cast<char*>(dstudent.mutable_data_ptr());
  const int64_t chunks = p.chunks();
  const int64_t size = p.student.type == ScalarType::Float ? 4 : 2;
  prefer_huge_pages(to, p.S * p.B * p.K * size);
  parallel(p.B * chunks, grain_cells(p), [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks, chunk = i % chunks, k = chunk * kChunk;
      const float row_gain = gain * (weights ? weights[b] : 1.0f);
      if (b < p.rows && row_gain != 0.0f) {
        cell_gradient(p, student_ptr, teacher_ptr, b, chunk, row_gain, to);
        continue;
      }
      const int64_t n = std::min(kChunk, p.K - k);
      for (int64_t s = 0; s < p.S; ++s) {
        char* row = to + ((s * p.B + b) * p.K + k) * size;
        std::fill(row, row + n * size, char(0));
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "dino_cross_entropy_parts(Tensor student, Tensor teacher, float student_temp, "
      "float teacher_temp, Tensor? temps, Tensor? center, Tensor? log_u, Tensor? student_scale, "
      "Tensor? teacher_scale, Tensor? num_rows, int first_chunk, int slices, Tensor(a!) parts, "
      "Tensor(b!)? teacher_sums) -> ()");
  m.def(
      "dino_cross_entropy_collapse(int num_student, int num_teacher, Tensor? num_rows, "
      "int columns, Tensor(a!) parts) -> ()");
  m.def(
      "dino_cross_entropy_combine(Tensor(a!) parts, Tensor? log_v, Tensor? row_weights, "
      "Tensor? num_rows, bool skip_same_view, bool mean, Tensor(b!) per_image, "
      "Tensor(c!) student_stats, Tensor(d!) teacher_stats, Tensor(e!) loss, "
      "Tensor(f!) entropy, Tensor(g!) norm) -> ()");
  m.def(
      "dino_cross_entropy_gradient(Tensor dloss, Tensor student, Tensor teacher, "
      "float student_temp, float teacher_temp, Tensor? temps, Tensor? center, Tensor? log_u, "
      "Tensor? student_scale, Tensor? teacher_scale, Tensor? num_rows, Tensor? row_weights, "
      "bool skip_same_view, Tensor student_stats, Tensor teacher_stats, Tensor norm, "
      "Tensor(a!) dstudent) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) {
  m.impl("dino_cross_entropy_parts", TORCH_BOX(&dino_cross_entropy_parts));
  m.impl("dino_cross_entropy_collapse", TORCH_BOX(&dino_cross_entropy_collapse));
  m.impl("dino_cross_entropy_combine", TORCH_BOX(&dino_cross_entropy_combine));
  m.impl("dino_cross_entropy_gradient", TORCH_BOX(&dino_cross_entropy_gradient));
}

}  // namespace fastssl
