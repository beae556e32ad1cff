// What every launcher shares: tensors to pointers, element types, the current stream, errors.
#pragma once

#include <optional>
#include <type_traits>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "device.cuh"

namespace fastssl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Python has checked shapes and values; this guards the memory against our own mistakes.
inline void check_cuda(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a GPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <class T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* input(const std::optional<Tensor>& tensor) {
  return tensor ? input<T>(*tensor) : nullptr;
}

template <class T>
T* output(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Calls f(X* type, std::integral_constant<int, V>) with null: 16 bytes at a time, or one element.
template <class F>
void with_type(ScalarType type, bool vectors, const F& f) {
  using One = std::integral_constant<int, 1>;
  using Four = std::integral_constant<int, 4>;
  using Eight = std::integral_constant<int, 8>;
  switch (type) {
    case ScalarType::Float:
      return vectors ? f((float*)nullptr, Four{}) : f((float*)nullptr, One{});
    case ScalarType::BFloat16:
      return vectors ? f((BFloat16*)nullptr, Eight{}) : f((BFloat16*)nullptr, One{});
    case ScalarType::Half:
      return vectors ? f((Half*)nullptr, Eight{}) : f((Half*)nullptr, One{});
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
}

// `kernel` on blocks in clusters; 0 stands for no cluster. More than 48 KB of dynamic shared
// memory, and more than 8 blocks to a cluster, must be asked for.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, int cluster,
            cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "too many blocks: ", blocks);
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "shared memory");
  }
  if (cluster > 8) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = cluster > 0 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "launch");
}

}  // namespace fastssl
