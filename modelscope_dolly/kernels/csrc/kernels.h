/* What linear.c and attention.c share, beside the functions of vectors in vector.h. */

#ifndef DOLLY_KERNELS_H
#define DOLLY_KERNELS_H

#include <stdint.h>

enum { LEVEL_NONE, LEVEL_AVX2, LEVEL_AVX512 }; /* instruction sets */

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 16")

INLINE float widen(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float value_at(const void *x, int bf16, int64_t index) {
    return bf16 ? widen(((const uint16_t *)x)[index]) : ((const float *)x)[index];
}

/* To the nearest bfloat16, ties to even. */
INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0; /* rounding would carry over into the sign */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void put_at(void *out, int bf16, int64_t index, float value) {
    if (bf16)
        ((uint16_t *)out)[index] = narrow(value);
    else
        ((float *)out)[index] = value;
}

#endif
#endif
