// Instruction-set multiversioning: one kernel body, compiled for several x86-64 levels, chosen once at run time.
//
// A kernel is a struct with an always-inline `template <class Isa> static void run(...)`. `multiversion<Kernel>(...)`
// calls the variant for this machine. GCC's target attribute is per function, so nothing compiled for a newer level
// leaks into shared inline code. The environment variable FASTDIS_ISA picks an older level by name, which is how
// every variant that a machine can run gets tested on it.

#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define FASTDIS_INLINE inline __attribute__((always_inline))
// Lambdas do not inherit the target of the function they stand in, so inside kernels they must be inlined.
#define FASTDIS_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTDIS_MULTIVERSIONED 1
#else
#define FASTDIS_MULTIVERSIONED 0
#endif

namespace fastdis {

// Bytes of a vector register, and rows of the matrix-product tile whose accumulators fit the register file.
struct Baseline {
  static constexpr int vector_bytes = 16;
  static constexpr int tile_rows = 4;
};
struct X86V3 {  // AVX2, FMA, F16C
  static constexpr int vector_bytes = 32;
  static constexpr int tile_rows = 4;
};
struct X86V4 {  // AVX-512 F, BW, CD, DQ, VL
  static constexpr int vector_bytes = 64;
  static constexpr int tile_rows = 8;
};

enum class IsaLevel { baseline, x86_64_v3, x86_64_v4 };

constexpr const char* isa_names[] = {"baseline", "x86-64-v3", "x86-64-v4"};
constexpr int isa_compiled = FASTDIS_MULTIVERSIONED ? 3 : 1;

inline IsaLevel highest_isa() {
#if FASTDIS_MULTIVERSIONED
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return IsaLevel::x86_64_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return IsaLevel::x86_64_v3;
#endif
  return IsaLevel::baseline;
}

// Who made this machine's processor, as far as it matters.
inline const char* processor() {
#if FASTDIS_MULTIVERSIONED
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "Intel";
  if (__builtin_cpu_is("amd")) return "AMD";
#endif
  return "other";
}

// The level in use: the highest that this machine has, or the one that FASTDIS_ISA names.
inline IsaLevel choose_isa() {
  const IsaLevel highest = highest_isa();
  const char* wanted = std::getenv("FASTDIS_ISA");
  if (wanted == nullptr || *wanted == '\0') return highest;
  for (int level = 0; level <= static_cast<int>(highest); ++level) {
    if (std::strcmp(wanted, isa_names[level]) == 0) return static_cast<IsaLevel>(level);
  }
  std::string allowed = isa_names[0];
  for (int level = 1; level <= static_cast<int>(highest); ++level) allowed += std::string(", ") + isa_names[level];
  throw std::runtime_error("FASTDIS_ISA is '" + std::string(wanted) + "'; this build on this machine can run " +
                           allowed);
}

inline IsaLevel isa() {
  static const IsaLevel level = choose_isa();
  return level;
}

template <class Kernel, class... Args>
void run_baseline(Args... args) {
  Kernel::template run<Baseline>(args...);
}

#if FASTDIS_MULTIVERSIONED
template <class Kernel, class... Args>
__attribute__((target("arch=x86-64-v3"))) void run_x86_64_v3(Args... args) {
  Kernel::template run<X86V3>(args...);
}

template <class Kernel, class... Args>
__attribute__((target("arch=x86-64-v4"))) void run_x86_64_v4(Args... args) {
  Kernel::template run<X86V4>(args...);
}
#endif

template <class Kernel, class... Args>
FASTDIS_INLINE void multiversion(Args... args) {
#if FASTDIS_MULTIVERSIONED
  switch (isa()) {
    case IsaLevel::x86_64_v4:
      return run_x86_64_v4<Kernel>(args...);
    case IsaLevel::x86_64_v3:
      return run_x86_64_v3<Kernel>(args...);
    default:
      break;
  }
#endif
  run_baseline<Kernel>(args...);
}

}  // namespace fastdis
