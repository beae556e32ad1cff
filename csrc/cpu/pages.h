// Memory that a kernel is about to write for the first time.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastssl {

// Asks for huge pages under a large output. Buffers of tens of MB come from the system anew each
// time they are allocated, and then the page faults of 4 KB pages cost several times the writing
// itself. It is advice: nothing changes where the memory is in use already or the system does not
// follow.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  constexpr int64_t kWorthwhile = int64_t(1) << 23;
  if (bytes < kWorthwhile) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastssl
