// Function multi-versioning: the compiler builds such a function for AVX-512, AVX2 and the baseline and the loader takes
// the one this processor has.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(AUDIO_LOTTERY_BASELINE)
#define AUDIO_LOTTERY_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define AUDIO_LOTTERY_CLONES
#endif

// Code written for AVX-512 by hand, to be called where has_avx512() is true.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(AUDIO_LOTTERY_BASELINE)
#include <immintrin.h>
#define AUDIO_LOTTERY_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,popcnt")))
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#define AUDIO_LOTTERY_INLINE inline __attribute__((always_inline))
