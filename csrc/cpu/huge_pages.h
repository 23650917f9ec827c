// Fresh memory of a large tensor costs a page fault every 4 KiB, as much as a pass over it. Linux takes 2 MiB pages where
// it is asked to; elsewhere this does nothing.

#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace audio_lottery {

inline void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(PAGE - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace audio_lottery
