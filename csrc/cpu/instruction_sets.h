// A file's inner loops once an instruction set: it defines KERNELS_FILE, whose functions stand in namespace ISA with the
// attribute KERNEL and have LANES floats to a vector, and struct Kernels, of which that has one, KERNELS. (Not
// include-guarded. Clones of one function would not do: the compiler cuts vectors to the baseline's width before it clones.)

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the baseline's are not passed beyond the file

#define ISA baseline
#define NAME "DEFAULT"
#define KERNEL
#define LANES 4
#include KERNELS_FILE
#undef ISA
#undef NAME
#undef KERNEL
#undef LANES

#ifdef AUDIO_LOTTERY_AVX512
#define ISA avx2
#define NAME "AVX2"
#define KERNEL __attribute__((target("avx2,fma")))
#define LANES 8
#include KERNELS_FILE
#undef ISA
#undef NAME
#undef KERNEL
#undef LANES

#define ISA avx512
#define NAME "AVX512"
#define KERNEL __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LANES 16
#include KERNELS_FILE
#undef ISA
#undef NAME
#undef KERNEL
#undef LANES
#endif

// By torch's names. at::get_cpu_capability() is what torch itself takes; ATEN_CPU_CAPABILITY=avx2 or default asks for less.
const Kernels* kernels_named(const std::string& name) {
#ifdef AUDIO_LOTTERY_AVX512
  if (name == "AVX512") return &avx512::KERNELS;
  if (name == "AVX2") return &avx2::KERNELS;
#endif
  return &baseline::KERNELS;
}
