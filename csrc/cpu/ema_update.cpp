// Moving average of many tensors; see kernels/ema_update/__init__.py for the formula.
#include <algorithm>
#include <optional>
#include <vector>

#include "simd.h"

namespace fastssl {
namespace {

// Elements of one piece of work. All tensors' pieces are shared out in one parallel region, so that
// neither many small tensors nor one large one leave a thread idle.
constexpr int64_t kChunk = 16384;

struct Chunk {
  char* target;
  const char* source;
  int64_t count;
  ScalarType target_type, source_type;
};

struct Weights {
  float source;  // 1 - momentum
  float target;  // momentum
};

// torch.lerp's two forms: each is exact at its own end.
template <class T, class S>
FASTSSL_INLINE void lerp(const Chunk& chunk, Weights weights) {
  T* target = reinterpret_cast<T*>(chunk.target);
  const S* source = reinterpret_cast<const S*>(chunk.source);
  const int64_t count = chunk.count;
  if (weights.source < 0.5f) {
    const float weight = weights.source;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float from = load(target + i);
      store(target + i, from + weight * (load(source + i) - from));
    }
  } else {
    const float weight = weights.target;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float to = load(source + i);
      store(target + i, to - weight * (to - load(target + i)));
    }
  }
}

template <class T>
FASTSSL_INLINE void lerp_into(const Chunk& chunk, Weights weights) {
  switch (chunk.source_type) {
    case ScalarType::Float:
      return lerp<T, float>(chunk, weights);
    case ScalarType::BFloat16:
      return lerp<T, BFloat16>(chunk, weights);
    default:
      return lerp<T, Half>(chunk, weights);
  }
}

FASTSSL_INLINE void update(const Chunk& chunk, Weights weights) {
  switch (chunk.target_type) {
    case ScalarType::Float:
      return lerp_into<float>(chunk, weights);
    case ScalarType::BFloat16:
      return lerp_into<BFloat16>(chunk, weights);
    default:
      return lerp_into<Half>(chunk, weights);
  }
}

int64_t element_size(const Tensor& tensor, const char* name) {
  int64_t size = 0;
  with_type(tensor.scalar_type(), name, [&](auto* type) { size = sizeof(*type); });
  return size;
}

void ema_update(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                std::optional<Tensor> momentum_tensor) {
  STD_TORCH_CHECK(targets.size() == sources.size(), "targets and sources must be as many");
  Weights weights{float(1.0 - momentum), float(momentum)};
  if (momentum_tensor.has_value()) {
    check_cpu(*momentum_tensor, "momentum");
    const float value = *input<float>(*momentum_tensor);
    weights = {1.0f - value, value};
  }
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < targets.size(); ++i) {
    check_cpu(targets[i], "targets");
    check_cpu(sources[i], "sources");
    const int64_t count = targets[i].numel();
    STD_TORCH_CHECK(sources[i].numel() == count, "sources must have the targets' shapes");
    const int64_t target_size = element_size(targets[i], "targets");
    const int64_t source_size = element_size(sources[i], "sources");
    char* target = output<char>(targets[i]);
    const char* source = input<char>(sources[i]);
    for (int64_t begin = 0; begin < count; begin += kChunk) {
      chunks.push_back({target + begin * target_size, source + begin * source_size,
                        std::min(kChunk, count - begin), targets[i].scalar_type(),
                        sources[i].scalar_type()});
    }
  }
  const Chunk* begin_ptr = chunks.data();
  parallel(int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) FASTSSL_LAMBDA {
    for (int64_t i = begin; i < end; ++i) update(begin_ptr[i], weights);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl_csrc, m) {
  m.def(
      "ema_update(Tensor(a!)[] targets, Tensor[] sources, float momentum, "
      "Tensor? momentum_tensor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_csrc, CPU, m) { m.impl("ema_update", TORCH_BOX(&ema_update)); }

}  // namespace fastssl
