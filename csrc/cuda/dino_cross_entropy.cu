// Cross-entropy between teacher and student views: launches of the kernels in
// view_cross_entropy.cuh. kernels/dino_cross_entropy/cuda_kernel.py chooses W, cells and slices.
#include "launch.cuh"
#include "view_cross_entropy.cuh"

namespace fastssl {
namespace {

using Optional = std::optional<Tensor>;

constexpr int kWarps = kThreads / kWarp;

Problem describe(const Tensor& student, const Tensor& teacher, double student_temp,
                 double teacher_temp, const Optional& temps, const Optional& center,
                 const Optional& log_u, const Optional& num_rows,
                 const Optional& student_scale = {}, const Optional& teacher_scale = {}) {
  check_cuda(student, "student"), check_cuda(teacher, "teacher");
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(), "logits must have one dtype");
  STD_TORCH_CHECK(student_scale.has_value() == teacher_scale.has_value(), "one scale is missing");
  Problem p{};
  p.student = student.const_data_ptr(), p.teacher = teacher.const_data_ptr();
  p.S = int(student.size(0)), p.T = int(teacher.size(0));
  p.B = student.size(1), p.K = student.size(2);
  p.student_temp = student_temp, p.teacher_temp = teacher_temp;
  p.temps = input<float>(temps), p.center = input<float>(center), p.log_u = input<float>(log_u);
  p.log_u_stride = log_u && log_u->size(0) > 1 ? log_u->stride(0) : 0;
  p.num_rows = input<int64_t>(num_rows);
  p.student_scale = input<float>(student_scale), p.teacher_scale = input<float>(teacher_scale);
  return p;
}

// Whether rows can be read 16 bytes at a time.
bool in_vectors(const Problem& p, const Tensor& student, const Tensor& teacher, const Tensor* out) {
  const int64_t size = student.scalar_type() == ScalarType::Float ? 4 : 2;
  return p.K * size % 16 == 0 && is_aligned(student) && is_aligned(teacher) &&
         (!out || is_aligned(*out));
}

template <bool kFused, bool kScaled>
void view_pass(const Problem& p, const Pass& a, const Tensor& student, const Tensor& teacher,
               const Tensor* out) {
  with_type(student.scalar_type(), in_vectors(p, student, teacher, out), [&](auto* type, auto v) {
    using X = std::remove_pointer_t<decltype(type)>;
    const Memory<X> memory(nullptr, p.S, p.T, a, kWarps, kFused);
    launch(view_pass_kernel<X, decltype(v)::value, kFused, kScaled>, int64_t(a.slices) * a.cells,
           kThreads, memory.bytes, kFused ? a.cells : 0, current_stream(student), p, a);
  });
}

void check_pass(const Problem& p, const Pass& a) {
  STD_TORCH_CHECK(a.W > 0 && a.W % 8 == 0 && int64_t(a.cells) * a.W >= p.K,
                  "cells must cover the prototypes in multiples of 8");
  STD_TORCH_CHECK(a.slices > 0 || p.B == 0, "slices must be positive");
}

void totals(const Problem& p, Tensor& per_image, Tensor& loss, Tensor& entropy, Tensor& norm) {
  launch(total_kernel, 1, kThreads, kWarps * 8, 0, current_stream(per_image), p,
         input<float>(per_image), output<float>(loss), output<float>(entropy), output<float>(norm));
}

// Fills the columns of parts [B, width, C] from `first` on, and teacher_sums [slices, K] where
// wanted. Scales [K] multiply the logits.
void parts(Tensor student, Tensor teacher, double student_temp, double teacher_temp, Optional temps,
           Optional center, Optional log_u, Optional student_scale, Optional teacher_scale,
           Optional num_rows, int64_t W, int64_t first, int64_t slices, Tensor parts,
           Optional teacher_sums) {
  const DeviceGuard guard(student.get_device_index());
  const Problem p = describe(student, teacher, student_temp, teacher_temp, temps, center, log_u,
                             num_rows, student_scale, teacher_scale);
  STD_TORCH_CHECK(W > 0, "W must be positive");
  Pass a{};
  a.cells = int((p.K + W - 1) / W), a.W = int(W), a.slices = int(slices);
  a.columns = int(parts.size(2));
  a.parts = output<float>(parts) + first;
  a.sums = teacher_sums ? output<float>(*teacher_sums) : nullptr;
  check_pass(p, a);
  STD_TORCH_CHECK(first + a.cells <= a.columns, "parts have too few columns");
  if (student_scale) {
    view_pass<false, true>(p, a, student, teacher, nullptr);
  } else {
    view_pass<false, false>(p, a, student, teacher, nullptr);
  }
}

// Merges the first C columns of parts into the first one.
void collapse(int64_t S, int64_t T, Optional num_rows, int64_t C, Tensor parts) {
  const DeviceGuard guard(parts.get_device_index());
  check_cuda(parts, "parts");
  Problem p{};
  p.S = int(S), p.T = int(T), p.B = parts.size(0), p.num_rows = input<int64_t>(num_rows);
  launch(collapse_kernel, p.B, kThreads, 0, 0, current_stream(parts), p, output<float>(parts),
         parts.size(2), int(C));
}

// From the parts to statistics and the loss; `norm` is what the weighted sum is multiplied by.
void combine(Tensor parts, Optional log_v, Optional row_weights, Optional num_rows,
             bool skip_same_view, bool mean, Tensor per_image, Tensor student_stats,
             Tensor teacher_stats, Tensor loss, Tensor entropy, Tensor norm) {
  const DeviceGuard guard(parts.get_device_index());
  check_cuda(parts, "parts");
  Problem p{};
  p.S = int(student_stats.size(0)), p.T = int(teacher_stats.size(0)), p.B = parts.size(0);
  p.log_v = input<float>(log_v), p.weights = input<float>(row_weights);
  p.num_rows = input<int64_t>(num_rows), p.skip_same_view = skip_same_view, p.mean = mean;
  launch(combine_kernel, p.B, kThreads, (p.S + 2 * p.T) * 8, 0, current_stream(parts), p,
         input<float>(parts), int(parts.size(2)), output<float>(student_stats),
         output<float>(teacher_stats), output<float>(per_image));
  totals(p, per_image, loss, entropy, norm);
}

// dstudent may be the student's logits.
void gradient(Tensor dloss, Tensor student, Tensor teacher, double student_temp,
              double teacher_temp, Optional temps, Optional center, Optional log_u,
              Optional student_scale, Optional teacher_scale, Optional num_rows,
              Optional row_weights, bool skip_same_view, int64_t W, Tensor student_stats,
              Tensor teacher_stats, Tensor norm, Tensor dstudent) {
  const DeviceGuard guard(student.get_device_index());
  Problem p = describe(student, teacher, student_temp, teacher_temp, temps, center, log_u, num_rows,
                       student_scale, teacher_scale);
  p.weights = input<float>(row_weights), p.skip_same_view = skip_same_view;
  const int cells = int((p.K + W - 1) / W);
  const bool vectors = in_vectors(p, student, teacher, &dstudent);
  with_type(student.scalar_type(), vectors, [&](auto* type, auto v) {
    using X = std::remove_pointer_t<decltype(type)>;
    constexpr int V = decltype(v)::value;
    launch(student_scale ? gradient_kernel<X, V, true> : gradient_kernel<X, V, false>, p.B * cells,
           kThreads, p.T * W * 4, 0, current_stream(student), p, cells, int(W), input<float>(dloss),
           input<float>(student_stats), input<float>(teacher_stats), input<float>(norm),
           output<X>(dstudent));
  });
}

// All of the above at once, with a cluster of `cluster` blocks for an image and dloss = 1.
void fused(Tensor student, Tensor teacher, double student_temp, double teacher_temp, Optional temps,
           Optional center, Optional log_u, Optional log_v, Optional num_rows, Optional row_weights,
           bool skip_same_view, bool mean, int64_t W, int64_t cluster, int64_t slices,
           Tensor per_image, Tensor student_stats, Tensor teacher_stats, Tensor loss,
           Tensor entropy, Tensor norm, Tensor dstudent, Optional teacher_sums) {
  const DeviceGuard guard(student.get_device_index());
  Problem p =
      describe(student, teacher, student_temp, teacher_temp, temps, center, log_u, num_rows);
  p.log_v = input<float>(log_v), p.weights = input<float>(row_weights);
  p.skip_same_view = skip_same_view, p.mean = mean;
  Pass a{};
  a.cells = int(cluster), a.W = int(W), a.slices = int(slices);
  a.sums = teacher_sums ? output<float>(*teacher_sums) : nullptr;
  a.student_stats = output<float>(student_stats), a.teacher_stats = output<float>(teacher_stats);
  a.per_image = output<float>(per_image), a.dstudent = dstudent.mutable_data_ptr();
  check_pass(p, a);
  view_pass<true, false>(p, a, student, teacher, &dstudent);
  totals(p, per_image, loss, entropy, norm);
}

// x *= factor, without a read of x where factor is 1.
void scale(Tensor x, Tensor factor) {
  const DeviceGuard guard(x.get_device_index());
  check_cuda(x, "x");
  const int64_t count = x.numel();
  const int64_t size = x.scalar_type() == ScalarType::Float ? 4 : 2;
  with_type(x.scalar_type(), count * size % 16 == 0 && is_aligned(x), [&](auto* type, auto v) {
    using X = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kPerBlock = kThreads * decltype(v)::value;
    const int64_t blocks = (count + kPerBlock - 1) / kPerBlock;
    launch(scale_kernel<X, decltype(v)::value>, blocks < 4096 ? blocks : 4096, kThreads, 0, 0,
           current_stream(x), output<X>(x), count, input<float>(factor));
  });
}

// Whether this library holds code for a device.
bool runs_on(int64_t device) {
  const DeviceGuard guard{int32_t(device)};
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, total_kernel) == cudaSuccess;
  if (!runs) cudaGetLastError();  // later launches are not to find it
  return runs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_cuda, m) {
  m.def("runs_on(int device) -> bool");
  m.def(
      "dino_cross_entropy_parts(Tensor student, Tensor teacher, float student_temp, "
      "float teacher_temp, Tensor? temps, Tensor? center, Tensor? log_u, Tensor? student_scale, "
      "Tensor? teacher_scale, Tensor? num_rows, int W, int first, int slices, Tensor(a!) parts, "
      "Tensor(b!)? teacher_sums) -> ()");
  m.def(
      "dino_cross_entropy_collapse(int S, int T, Tensor? num_rows, int C, Tensor(a!) parts) -> ()");
  m.def(
      "dino_cross_entropy_combine(Tensor(a!) parts, Tensor? log_v, Tensor? row_weights, "
      "Tensor? num_rows, bool skip_same_view, bool mean, Tensor(b!) per_image, "
      "Tensor(c!) student_stats, Tensor(d!) teacher_stats, Tensor(e!) loss, "
      "Tensor(f!) entropy, Tensor(g!) norm) -> ()");
  m.def(
      "dino_cross_entropy_gradient(Tensor dloss, Tensor student, Tensor teacher, "
      "float student_temp, float teacher_temp, Tensor? temps, Tensor? center, Tensor? log_u, "
      "Tensor? student_scale, Tensor? teacher_scale, Tensor? num_rows, Tensor? row_weights, "
      "bool skip_same_view, int W, Tensor student_stats, Tensor teacher_stats, Tensor norm, "
      "Tensor(a!) dstudent) -> ()");
  m.def(
      "dino_cross_entropy_fused(Tensor student, Tensor teacher, float student_temp, "
      "float teacher_temp, Tensor? temps, Tensor? center, Tensor? log_u, Tensor? log_v, "
      "Tensor? num_rows, Tensor? row_weights, bool skip_same_view, bool mean, int W, int cluster, "
      "int slices, Tensor(a!) per_image, Tensor(b!) student_stats, Tensor(c!) teacher_stats, "
      "Tensor(d!) loss, Tensor(e!) entropy, Tensor(f!) norm, Tensor(g!) dstudent, "
      "Tensor(h!)? teacher_sums) -> ()");
  m.def("scale(Tensor(a!) x, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_cuda, CUDA, m) {
  m.impl("dino_cross_entropy_parts", TORCH_BOX(&parts));
  m.impl("dino_cross_entropy_collapse", TORCH_BOX(&collapse));
  m.impl("dino_cross_entropy_combine", TORCH_BOX(&combine));
  m.impl("dino_cross_entropy_gradient", TORCH_BOX(&gradient));
  m.impl("dino_cross_entropy_fused", TORCH_BOX(&fused));
  m.impl("scale", TORCH_BOX(&scale));
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_cuda, CompositeExplicitAutograd, m) {
  m.impl("runs_on", TORCH_BOX(&runs_on));
}

}  // namespace fastssl
