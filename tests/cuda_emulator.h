// Runs the kernels of csrc/cuda on the host: one std::thread per CUDA thread, plain memory for
// shared memory. It stands in for the first half of csrc/cuda/device.cuh and is included before it,
// by a C++20 compiler. Slow: blocks of 64 threads and tiny shapes.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __restrict__
#define FASTSSL_DEVICE inline
#define FASTSSL_HOST_DEVICE inline

struct Index {
  unsigned x = 0;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

namespace fastssl {

struct EmulatedWarp {
  std::barrier<> barrier{32};
  double values[32];
};

struct EmulatedBlock {
  EmulatedBlock(unsigned threads, size_t shared)
      : barrier(threads), warps(threads / 32), memory(shared / 16 + 1) {
    // Kernels must not count on what shared memory holds before.
    std::memset(memory.data(), 0xff, memory.size() * sizeof(memory[0]));
  }
  std::barrier<> barrier;
  std::vector<EmulatedWarp> warps;
  struct alignas(16) Sixteen {
    char bytes[16];
  };
  std::vector<Sixteen> memory;
};

struct EmulatedCluster {
  EmulatedCluster(unsigned blocks, unsigned threads, size_t shared) : barrier(blocks * threads) {
    for (unsigned i = 0; i < blocks; ++i) {
      members.push_back(std::make_unique<EmulatedBlock>(threads, shared));
    }
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<EmulatedBlock>> members;
};

inline thread_local EmulatedBlock* this_block;
inline thread_local EmulatedCluster* this_cluster;

inline char* shared_memory() { return this_block->memory[0].bytes; }
inline void block_sync() { this_block->barrier.arrive_and_wait(); }
inline void cluster_sync() { this_cluster->barrier.arrive_and_wait(); }

inline float* in_block(float* p, int rank) {
  char* other = this_cluster->members[size_t(rank)]->memory[0].bytes;
  return reinterpret_cast<float*>(other + (reinterpret_cast<char*>(p) - shared_memory()));
}

template <class X>
X shuffle_xor(X x, int mask) {
  EmulatedWarp& warp = this_block->warps[threadIdx.x / 32];
  std::memcpy(&warp.values[threadIdx.x % 32], &x, sizeof(x));
  warp.barrier.arrive_and_wait();
  X other;
  std::memcpy(&other, &warp.values[(threadIdx.x % 32) ^ unsigned(mask)], sizeof(other));
  warp.barrier.arrive_and_wait();
  return other;
}

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float multiply(float a, float b) { return a * b; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  _Float16 value;
};

inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void convert(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // To nearest, ties to even.
  to->bits = uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float to_float(Half x) { return float(x.value); }
inline void convert(float x, Half* to) { to->value = _Float16(x); }

// Calls kernel() as every thread of every block, cluster after cluster.
template <class Kernel>
void emulate(unsigned blocks, unsigned threads, size_t shared, unsigned cluster_size,
             const Kernel& kernel) {
  blockDim.x = threads, gridDim.x = blocks;
  const unsigned size = std::max(1u, cluster_size);
  for (unsigned first = 0; first < blocks; first += size) {
    EmulatedCluster cluster(size, threads, shared);
    std::vector<std::thread> running;
    for (unsigned i = 0; i < size * threads; ++i) {
      running.emplace_back([&, i] {
        blockIdx.x = first + i / threads, threadIdx.x = i % threads;
        this_cluster = &cluster, this_block = cluster.members[i / threads].get();
        kernel();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace fastssl
