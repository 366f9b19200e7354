/* Functions of LANES floats, 16 with AVX-512 and 8 with AVX2; included once for each, with LANES defined. Both do the
   same operations in the same order, so that the instruction set changes no bit of a result. */

#undef TARGET
#undef NAME
#undef VEC
#undef FMA
#if LANES == 16
#define TARGET AVX512
#define NAME(name) name##_512
#define FMA _mm512_fmadd_ps
#else
#define TARGET AVX2
#define NAME(name) name##_256
#define FMA _mm256_fmadd_ps
#endif
#define VEC NAME(vec)

typedef float NAME(vec) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(bits) __attribute__((vector_size(4 * LANES)));

INLINE TARGET VEC NAME(all)(float value) {
#if LANES == 16
    return _mm512_set1_ps(value);
#else
    return _mm256_set1_ps(value);
#endif
}

/* a < b ? yes : no; no where one is NaN. */
INLINE TARGET VEC NAME(if_less)(VEC a, VEC b, VEC yes, VEC no) {
#if LANES == 16
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
#else
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
#endif
}

/* Numbers of a tensor in float or bfloat16. */
INLINE TARGET VEC NAME(get)(const void *x, int bf16, int64_t index) {
#if LANES == 16
    if (!bf16) return _mm512_loadu_ps((const float *)x + index);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + index));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
    if (!bf16) return _mm256_loadu_ps((const float *)x + index);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + index));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#endif
}

/* e to the power of x, for x <= 0; 0 below -87, where it would be denormal. x is split into n ln 2 + r (Cody and Waite);
   the polynomial in r is our own minimax fit, off by 3e-9. */
INLINE TARGET VEC NAME(exponential)(VEC x) {
    const VEC round = NAME(all)(12582912.0f); /* 1.5 * 2^23: adding it leaves a whole number in the lowest bits */
    VEC shifted = FMA(x, NAME(all)(1.44269504f), round), n = shifted - round;
    VEC r = FMA(n, NAME(all)(-0.693359375f), x);
    r = FMA(n, NAME(all)(2.12194440e-4f), r);
    VEC p = NAME(all)(0.001381459878757596f);
    p = FMA(p, r, NAME(all)(0.008368716575205326f));
    p = FMA(p, r, NAME(all)(0.04166838899254799f));
    p = FMA(p, r, NAME(all)(0.1666652113199234f));
    p = FMA(p, r, NAME(all)(0.4999999403953552f));
    p = FMA(p * r, r, r) + 1.0f;
    NAME(bits) power = ((NAME(bits))shifted + 127) << 23; /* of 2^n; the constant's own bits fall out */
    return NAME(if_less)(x, NAME(all)(-87.0f), NAME(all)(0.0f), p * (VEC)power);
}

/* x * (1 + erf(x / sqrt 2)) / 2, the exact GELU, from the tail of the normal distribution:
   tail(|x|) = exp(-x^2 / 2) * u * P(u), u = 1 / (1 + 0.3 |x|), a form of Shepherd and Laframboise 1981 (Mathematics of
   Computation 36); P is our own minimax fit, off by 3.4e-9. 1 + erf would leave no digits for x far below 0. */
INLINE TARGET VEC NAME(gelu)(VEC x) {
    const VEC zero = NAME(all)(0.0f);
    VEC size = NAME(if_less)(x, zero, -x, x);
    size = NAME(if_less)(NAME(all)(14.0f), size, NAME(all)(14.0f), size); /* from there on the tail is 0 */
    VEC u = 1.0f / FMA(size, NAME(all)(0.3f), NAME(all)(1.0f)), t = u - 0.5f;
    VEC p = NAME(all)(-0.020589852043413404f);
    p = FMA(p, t, NAME(all)(0.019592076618085832f));
    p = FMA(p, t, NAME(all)(0.03592572999541068f));
    p = FMA(p, t, NAME(all)(-0.03645604641392414f));
    p = FMA(p, t, NAME(all)(-0.07755331157067437f));
    p = FMA(p, t, NAME(all)(0.029056413472284146f));
    p = FMA(p, t, NAME(all)(0.22208275340133019f));
    p = FMA(p, t, NAME(all)(0.34619883998075257f));
    p = FMA(p, t, NAME(all)(0.32915897028903474f));
    p = FMA(p, t, NAME(all)(0.22197061308390217f));
    VEC half = size * -0.5f, power = half * size, lost = FMA(half, size, -power); /* -x^2 / 2 = power + lost */
    VEC e = NAME(exponential)(power);
    VEC tail = FMA(e, lost, e) * (u * p);
    return x * NAME(if_less)(x, zero, tail, 1.0f - tail);
}
