// What differs between compilers: marks for functions shared with CUDA, and instruction sets chosen at run time.
#pragma once

// Any header of the C library: it defines __GLIBC__, which is asked for below.
#include <cstddef>

#if defined(__CUDACC__)
#define FASTMOCO_HOST_DEVICE __host__ __device__
#else
#define FASTMOCO_HOST_DEVICE
#endif

#if defined(__has_attribute)
#if __has_attribute(target_clones) && defined(__x86_64__) && defined(__GLIBC__)
#define FASTMOCO_HAS_CLONES 1
#endif
#endif

// A function so marked is compiled once per instruction set, and the loader picks one by what the processor has. What
// it calls must be inlined into it to profit. Needs the loader's ifunc, hence glibc; elsewhere one baseline copy runs.
#if defined(FASTMOCO_HAS_CLONES)
#define FASTMOCO_CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define FASTMOCO_CLONES
#endif

// As FASTMOCO_CLONES, with all of AVX-512 where the compiler knows how to ask for it: its first part has no vectors of
// 16-bit numbers, so that loops over bfloat16 would be cut to half the width (1.7 times as long, measured).
#if defined(FASTMOCO_HAS_CLONES) && !defined(__clang__) && __GNUC__ >= 12
#define FASTMOCO_CLONES_16 __attribute__((target_clones("arch=x86-64-v4", "fma", "default")))
#else
#define FASTMOCO_CLONES_16 FASTMOCO_CLONES
#endif

// Products of bfloat16 pairs in vectors (AVX512-BF16): known to g++ 10 and clang 9. The macros FASTMOCO_NO_... leave an
// instruction set out, as for a compiler that does not know it.
#if defined(FASTMOCO_HAS_CLONES) && (__GNUC__ >= 10 || __clang_major__ >= 9) && !defined(FASTMOCO_NO_AVX512BF16)
#define FASTMOCO_HAS_AVX512BF16 1
#endif

// Tile registers (AMX): known to g++ 11 and clang 12. What tiles leave over is multiplied by AVX512-BF16.
#if defined(FASTMOCO_HAS_AVX512BF16) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12) && \
    !defined(FASTMOCO_NO_AMX)
#define FASTMOCO_HAS_AMX 1
#endif

#if defined(FASTMOCO_HAS_CLONES) && !defined(__CUDACC__)
namespace fastmoco {

// Whether the processor has what code takes for granted that is compiled for AVX2, AVX-512 or AVX512-BF16.
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#if defined(FASTMOCO_HAS_AVX512BF16)
inline bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace fastmoco
#endif

#if defined(__GNUC__)
#define FASTMOCO_INLINE inline __attribute__((always_inline))
#else
#define FASTMOCO_INLINE inline
#endif
