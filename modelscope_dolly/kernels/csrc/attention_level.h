/* The part of attention.c that is compiled for each instruction set, after vector.h. */

/* Sum of `parts` vectors of 16 / parts floats, in one order for either number. */
INLINE TARGET __m256 NAME(fold)(const VEC *sum) {
#if LANES == 16
    return _mm256_add_ps(_mm512_castps512_ps256(sum[0]), _mm512_extractf32x8_ps(sum[0], 1));
#else
    return sum[0] + sum[1];
#endif
}

#define PARTS (16 / LANES)

/* Sums of 8 floats each: a, b, c, d. */
INLINE TARGET __m128 NAME(totals)(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* scores[place] = query . keys[place] for the places 0 .. last; up to 3 more are written. */
INLINE TARGET void NAME(score)(const Attend *a, const float *query, int64_t from, int64_t last, float *scores,
                               const int bf16) {
    const int64_t width = a->width, bytes = bf16 ? 2 : 4;
    const int64_t quarter = last / 4 + 1;
    for (int64_t place = 0; place < quarter; place++) {
        int64_t row[4];
        VEC sum[4][PARTS];
        UNROLL for (int i = 0; i < 4; i++) {
            row[i] = from + (place + i * quarter < last ? place + i * quarter : last) * width;
            UNROLL for (int part = 0; part < PARTS; part++) sum[i][part] = NAME(all)(0.0f);
            for (int64_t line = 0; line < width * bytes; line += 64)
                _mm_prefetch((const char *)a->keys + row[i] * bytes + line + FETCH, _MM_HINT_T0);
        }
        for (int64_t j = 0; j < width; j += 16)
            UNROLL for (int part = 0; part < PARTS; part++) {
                VEC q = NAME(get)(query, 0, j + part * LANES);
                UNROLL for (int i = 0; i < 4; i++)
                    sum[i][part] = FMA(NAME(get)(a->keys, bf16, row[i] + j + part * LANES), q, sum[i][part]);
            }
        __m128 four = NAME(totals)(NAME(fold)(sum[0]), NAME(fold)(sum[1]), NAME(fold)(sum[2]), NAME(fold)(sum[3]));
        UNROLL for (int i = 0; i < 4; i++) scores[place + i * quarter] = four[i];
    }
}

/* Scores of the places 0 .. last to weights, not yet divided by their sum, which is returned. */
static TARGET float NAME(weigh)(float *scores, int64_t last) {
    for (int64_t place = last + 1; place % 16; place++) scores[place] = -INFINITY;
    VEC top = NAME(all)(-INFINITY), sum[PARTS];
    for (int64_t place = 0; place <= last; place += LANES) {
        VEC score = NAME(get)(scores, 0, place);
        top = NAME(if_less)(top, score, score, top);
    }
    float largest = top[0];
    for (int i = 1; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
    for (int part = 0; part < PARTS; part++) sum[part] = NAME(all)(0.0f);
    for (int64_t place = 0; place <= last; place += 16)
        for (int part = 0; part < PARTS; part++) {
            VEC weight = NAME(exponential)(NAME(get)(scores, 0, place + part * LANES) - largest);
            memcpy(scores + place + part * LANES, &weight, sizeof weight);
            sum[part] += weight;
        }
    __m256 all = NAME(fold)(sum);
    return _mm_cvtss_f32(NAME(totals)(all, all, all, all));
}

/* out[0 .. count * LANES] = sum of weights[place] * values[place] / total. */
INLINE TARGET void NAME(mix)(const Attend *a, const float *weights, float total, int64_t from, int64_t last, int64_t to,
                             const int bf16, const int count) {
    VEC sum[8];
    UNROLL for (int j = 0; j < count; j++) sum[j] = NAME(all)(0.0f);
    const int64_t quarter = last / 4 + 1;
    for (int64_t place = 0; place < quarter; place++)
        UNROLL for (int i = 0; i < 4; i++) {
            int64_t row = from + (place + i * quarter < last ? place + i * quarter : last) * a->width;
            VEC weight = NAME(all)(weights[place + i * quarter]);
            UNROLL for (int j = 0; j < count; j++) {
                sum[j] = FMA(NAME(get)(a->values, bf16, row + j * LANES), weight, sum[j]);
                if (j % ((bf16 ? 32 : 16) / LANES) == 0)
                    _mm_prefetch((const char *)a->values + (row + j * LANES) * (bf16 ? 2 : 4) + FETCH, _MM_HINT_T0);
            }
        }
    float parts[8 * LANES];
    UNROLL for (int j = 0; j < count; j++) {
        sum[j] = sum[j] / total;
        memcpy(parts + j * LANES, &sum[j], sizeof sum[j]);
    }
    for (int i = 0; i < count * LANES; i++) put_at(a->out, a->bf16, to + i, parts[i]);
}

INLINE TARGET void NAME(head)(const Attend *a, int64_t token, int64_t head, float *query, const int bf16) {
    const int64_t width = a->width, last = a->position[token];
    const int64_t from = (a->slot[token] * a->heads + head) * a->length * width, to = (token * a->heads + head) * width;
    float *scores = query + width;
    rotate(a, token, a->qkv, to * 3, query);
    for (int64_t i = 0; i < width; i++) query[i] *= a->scale;
    NAME(score)(a, query, from, last, scores, bf16);
    float total = NAME(weigh)(scores, last);
    int64_t vectors = width / LANES, pieces = (vectors + 7) / 8;
    for (int64_t piece = 0, j = 0; piece < pieces; piece++) {
        int64_t count = vectors * (piece + 1) / pieces - j;
        switch (count) {
#define CASE(count) case count: NAME(mix)(a, scores, total, from + j * LANES, last, to + j * LANES, bf16, count); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
        j += count;
    }
}

static TARGET void NAME(attend)(const Attend *a, int64_t token, int64_t head, float *scratch) {
    if (a->cache_bf16)
        NAME(head)(a, token, head, scratch, 1);
    else
        NAME(head)(a, token, head, scratch, 0);
}

#undef PARTS
