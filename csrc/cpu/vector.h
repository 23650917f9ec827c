// Function multi-versioning: the compiler builds such a function for AVX-512, AVX2 and the baseline and the loader takes
// the one this processor has.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(AUDIO_LOTTERY_BASELINE)
#define AUDIO_LOTTERY_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define AUDIO_LOTTERY_CLONES
#endif

#define AUDIO_LOTTERY_INLINE inline __attribute__((always_inline))
