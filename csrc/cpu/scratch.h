// Scratch memory of an op.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "pages.h"

namespace fastssl {

// Blocks that a thread's ops have done with, for those that follow: fresh memory costs page faults
// and lies in no cache. A thread keeps as much as its ops need at once, or kMost bytes.
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

  // The smallest block of `bytes` at least, or a new one in place of the largest.
  Block take(int64_t bytes) {
    auto found = std::lower_bound(kept_.begin(), kept_.end(), bytes,
                                  [](const Block& a, int64_t least) { return a.size < least; });
    if (found == kept_.end() && !kept_.empty()) --found;
    Block block;
    if (found != kept_.end()) {
      block = std::move(*found);
      kept_.erase(found);
      held_ -= block.size;
    }
    if (block.size < bytes) {
      block = {};
      const int64_t size = (bytes + kPage - 1) / kPage * kPage;
      block.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(size_t(kPage), size_t(size))));
      if (!block.memory) throw std::bad_alloc();
      block.size = size;
      prefer_huge_pages(block.memory.get(), size);
    }
    return block;
  }
  void give_back(Block block) {
    if (held_ + block.size > kMost) return;
    held_ += block.size;
    const auto larger = [](int64_t size, const Block& b) { return size < b.size; };
    kept_.insert(std::upper_bound(kept_.begin(), kept_.end(), block.size, larger),
                 std::move(block));
  }

 private:
  static constexpr int64_t kPage = int64_t(1) << 16, kMost = int64_t(64) << 20;

  std::vector<Block> kept_;  // by size
  int64_t held_ = 0;
};

// `count` elements of T for as long as this lives, from where a page begins.
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
