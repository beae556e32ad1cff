// Sinkhorn-Knopp: launches of the kernels in sinkhorn_knopp.cuh. kernels/sinkhorn_knopp/
// cuda_kernel.py chooses clusters and slices.
#include "sinkhorn_knopp.cuh"

#include "launch.cuh"

namespace fastssl::sinkhorn {
namespace {

using Optional = std::optional<Tensor>;

constexpr int kWarps = kThreads / kWarp;

Problem describe(const Tensor& logits, const Optional& num_rows, double factor, Tensor& anchor) {
  check_cuda(logits, "logits");
  Problem p{};
  p.logits = logits.const_data_ptr(), p.num_rows = input<int64_t>(num_rows);
  constexpr int64_t kLimit = int64_t(1) << 30;
  STD_TORCH_CHECK(logits.size(0) < kLimit && logits.size(1) < kLimit, "too many logits");
  p.B = int(logits.size(0)), p.K = int(logits.size(1)), p.factor = float(factor);
  p.anchor = output<float>(anchor);
  return p;
}

// Whether rows can be read 16 bytes at a time.
bool in_vectors(const Tensor& logits) {
  const int64_t size = logits.scalar_type() == ScalarType::Float ? 4 : 2;
  return logits.size(1) * size % 16 == 0 && is_aligned(logits);
}

// Calls f(X* type, std::integral_constant<int, V>, blocks of a column pass).
template <class F>
void with_columns(const Tensor& logits, int64_t slices, const F& f) {
  STD_TORCH_CHECK(slices > 0, "slices must be positive");
  with_type(logits.scalar_type(), in_vectors(logits), [&](auto* type, auto v) {
    const int64_t width = kThreads * decltype(v)::value;
    f(type, v, (logits.size(1) + width - 1) / width * slices);
  });
}

void merge(const Problem& p, int64_t slices, const float* top, const float* parts, float* sums,
           cudaStream_t stream) {
  launch(merge_kernel, (p.K + kMergeColumns - 1) / kMergeColumns, kThreads, kThreads * 4, 0, stream,
         int(slices), p.K, p.factor, top, parts, p.anchor, sums);
}

void divide(const Problem& p, const Tensor& sums, cudaStream_t stream) {
  launch(divide_kernel, (p.K + kThreads - 1) / kThreads, kThreads, 0, 0, stream, p,
         input<float>(sums));
}

// Fills anchor [K] and sums [K] through parts [2, slices, K].
void columns(Tensor logits, Optional num_rows, double factor, Tensor parts, Tensor anchor,
             Tensor sums) {
  const DeviceGuard guard(logits.get_device_index());
  const Problem p = describe(logits, num_rows, factor, anchor);
  const cudaStream_t stream = current_stream(logits);
  const int64_t slices = parts.size(1);
  float* top = output<float>(parts);
  with_columns(logits, slices, [&](auto* type, auto v, int64_t blocks) {
    using X = std::remove_pointer_t<decltype(type)>;
    launch(columns_kernel<X, decltype(v)::value>, blocks, kThreads, 0, 0, stream, p, int(slices),
           top);
  });
  merge(p, slices, top, top + slices * p.K, output<float>(sums), stream);
}

template <class X, int C>
void row_pass(const Problem& p, const RowPass& a, int threads, cudaStream_t stream) {
  constexpr int V = 16 / int(sizeof(X));
  const RowMemory memory(nullptr, C, threads, a.cluster);
  launch(a.is_last ? row_pass_kernel<X, V, C, true> : row_pass_kernel<X, V, C, false>,
         int64_t(a.slices) * a.cluster, threads, memory.bytes, a.cluster > 1 ? a.cluster : 0,
         stream, p, a);
}

// One reading of the logits, by clusters of `cluster` blocks of W prototypes, `columns` of them for
// each of `threads` threads.
void clustered(const Problem& p, const RowPass& a, const Tensor& logits, int64_t threads,
               int64_t columns, cudaStream_t stream) {
  STD_TORCH_CHECK(in_vectors(logits), "rows must be aligned to 16 bytes");
  STD_TORCH_CHECK(threads % kWarp == 0 && threads <= kMaxThreads, "too many threads");
  STD_TORCH_CHECK(a.W % 8 == 0 && a.W <= columns * threads && a.slices > 0 && a.cluster > 0 &&
                      int64_t(a.cluster) * a.W >= p.K,
                  "blocks must cover the prototypes in multiples of 8");
  with_type(logits.scalar_type(), true, [&](auto* type, auto v) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (decltype(v)::value > 1) {
      switch (columns) {
        case 8:
          return row_pass<X, 8>(p, a, int(threads), stream);
        case 16:
          return row_pass<X, 16>(p, a, int(threads), stream);
        case 32:
          return row_pass<X, 32>(p, a, int(threads), stream);
        default:
          STD_TORCH_CHECK(false, "columns must be 8, 16 or 32");
      }
    }
  });
}

void row_sums(const Problem& p, const RowPass& a, const Tensor& logits, cudaStream_t stream) {
  with_type(logits.scalar_type(), in_vectors(logits), [&](auto* type, auto v) {
    using X = std::remove_pointer_t<decltype(type)>;
    launch(row_sums_kernel<X, decltype(v)::value>, p.B, kThreads, kWarps * 4, 0, stream, p, a);
  });
}

// Divides prototypes by sums [K], then samples by theirs; sums become the new column sums, through
// parts [slices, K]. With stats [2, B] the logits are read twice, and the four numbers of the
// cluster are not used.
void iterate(Tensor logits, Optional num_rows, double factor, Tensor anchor, Tensor offset,
             Tensor log2_mass, Optional stats, Tensor parts, int64_t cluster, int64_t W,
             int64_t threads, int64_t columns, Tensor sums) {
  const DeviceGuard guard(logits.get_device_index());
  Problem p = describe(logits, num_rows, factor, anchor);
  p.offset = output<float>(offset);
  const cudaStream_t stream = current_stream(logits);
  const int64_t slices = parts.size(0);
  RowPass a{};
  a.cluster = int(cluster), a.W = int(W), a.slices = int(slices);
  a.log2_mass = output<float>(log2_mass), a.parts = output<float>(parts);
  divide(p, sums, stream);
  if (stats) {
    a.shifts = output<float>(*stats), a.scales = a.shifts + p.B;
    row_sums(p, a, logits, stream);
    with_columns(logits, slices, [&](auto* type, auto v, int64_t blocks) {
      using X = std::remove_pointer_t<decltype(type)>;
      launch(column_sums_kernel<X, decltype(v)::value>, blocks, kThreads, 0, 0, stream, p,
             int(slices), a.shifts, a.scales, a.parts);
    });
  } else {
    clustered(p, a, logits, threads, columns, stream);
  }
  merge(p, slices, nullptr, a.parts, output<float>(sums), stream);
}

// Divides both a last time: log_v in place of log2_mass, and the assignment where wanted; with
// cluster > 0 by clusters, else a block for each row.
void assign(Tensor logits, Optional num_rows, double factor, Tensor anchor, Tensor offset,
            Tensor sums, int64_t cluster, int64_t W, int64_t threads, int64_t columns,
            int64_t slices, Tensor log_v, Optional assignment) {
  const DeviceGuard guard(logits.get_device_index());
  Problem p = describe(logits, num_rows, factor, anchor);
  p.offset = output<float>(offset);
  const cudaStream_t stream = current_stream(logits);
  RowPass a{};
  a.cluster = int(cluster), a.W = int(W), a.slices = int(slices), a.is_last = true;
  a.log2_mass = output<float>(log_v);
  a.assignment = assignment ? output<float>(*assignment) : nullptr;
  divide(p, sums, stream);
  if (cluster > 0) {
    STD_TORCH_CHECK(assignment, "clusters serve the assignment only");
    clustered(p, a, logits, threads, columns, stream);
  } else {
    row_sums(p, a, logits, stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_cuda, m) {
  m.def(
      "sinkhorn_knopp_columns(Tensor logits, Tensor? num_rows, float factor, Tensor(a!) parts, "
      "Tensor(b!) anchor, Tensor(c!) sums) -> ()");
  m.def(
      "sinkhorn_knopp_iterate(Tensor logits, Tensor? num_rows, float factor, Tensor(a!) anchor, "
      "Tensor(b!) offset, Tensor(c!) log2_mass, Tensor(d!)? stats, Tensor(e!) parts, int cluster, "
      "int W, int threads, int columns, Tensor(f!) sums) -> ()");
  m.def(
      "sinkhorn_knopp_assign(Tensor logits, Tensor? num_rows, float factor, Tensor(a!) anchor, "
      "Tensor(b!) offset, Tensor sums, int cluster, int W, int threads, int columns, int slices, "
      "Tensor(c!) log_v, Tensor(d!)? assignment) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_cuda, CUDA, m) {
  m.impl("sinkhorn_knopp_columns", TORCH_BOX(&columns));
  m.impl("sinkhorn_knopp_iterate", TORCH_BOX(&iterate));
  m.impl("sinkhorn_knopp_assign", TORCH_BOX(&assign));
}

}  // namespace fastssl::sinkhorn
