// Scratch memory of an op.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#include "pages.h"
#include "simd.h"

namespace fastssl {

// Blocks that a thread's ops have done with, for those that follow: fresh memory costs page faults
// and lies in no cache. An op has two at once at most, and a thread keeps as many, kMost bytes in
// all; larger requests neither get nor leave one.
class ScratchBlocks {
 public:
  struct Block {
    struct Free {
      void operator()(uint8_t* memory) const { std::free(memory); }
    };
    std::unique_ptr<uint8_t, Free> memory;
    int64_t size = 0;
  };

  static ScratchBlocks& of_this_thread() {
    thread_local ScratchBlocks blocks;
    return blocks;
  }

  // The smaller block that has `bytes`, or a new one in place of the larger.
  Block take(int64_t bytes) {
    Block block;
    if (bytes <= kMost) {
      const bool first_is_smaller = kept_[0].size < kept_[1].size;
      Block &smaller = kept_[!first_is_smaller], &larger = kept_[first_is_smaller];
      block = std::exchange(smaller.size >= bytes ? smaller : larger, {});
    }
    if (block.size < bytes) {
      block = {};
      const int64_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      block.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, size_t(size))));
      STD_TORCH_CHECK(block.memory, "no memory for ", size, " bytes of scratch");
      block.size = size;
      prefer_huge_pages(block.memory.get(), size);
    }
    return block;
  }
  void give_back(Block block) noexcept {
    if (kept_[0].size + kept_[1].size + block.size > kMost) return;
    for (Block& place : kept_) {
      if (place.size == 0) return void(place = std::move(block));
    }
  }

 private:
  static constexpr int64_t kAlignment = int64_t(1) << 16, kMost = int64_t(64) << 20;

  Block kept_[2];
};

// `count` elements of T for as long as this lives, aligned to 64 KB.
template <class T>
class Scratch {
  ScratchBlocks::Block block_;

 public:
  T* const data;

  explicit Scratch(int64_t count)
      : block_(ScratchBlocks::of_this_thread().take(count * int64_t(sizeof(T)))),
        data(reinterpret_cast<T*>(block_.memory.get())) {}
  ~Scratch() { ScratchBlocks::of_this_thread().give_back(std::move(block_)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace fastssl
