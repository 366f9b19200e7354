/* Attention over the key/value cache for x86-64 CPUs, for tokens whose predecessors are in the cache; see ../cpu.py.

   For each of N new tokens, at a position of a slot: rotate query and key, write key and value into the cache, then
   softmax(query . keys / sqrt(D)) . values over the places 0 .. position of that slot. All keys are written before the
   first is read, so several tokens of one slot may come at once, and there is no mask.

   One head of one token is a unit of work: it reads keys and then values once, as long streams, and computes in float
   whatever the number type. Each sum has one order, given by the position alone, so a result depends neither on the
   other tokens, nor on the number of threads, nor on the instruction set. */

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <math.h>

#define FETCH 1024 /* bytes to fetch ahead in the cache */

/* One call of dolly_attend; a number type is 1 for bfloat16 and 0 for float. */
typedef struct {
    int64_t tokens, heads, width, turned; /* N, H, D (a multiple of 16), R: values of a head that are rotated (even) */
    int64_t slots, length;                /* of the cache */
    int bf16, cache_bf16;
    const void *qkv;                    /* [N][H][3][D] query, key, value */
    const float *cos, *sin;               /* [N][R], see rotate */
    const int64_t *slot, *position;       /* [N] */
    void *keys, *values;                  /* [slots][H][length][D] */
    void *out;                            /* [N][H][D] */
    float scale;                          /* 1 / sqrt(D) */
} Attend;

/* x' = x cos + partner sin, the partner of i being i + R / 2; the first half of sin is negative. `to`: D floats. */
static void rotate(const Attend *a, int64_t token, const void *x, int64_t from, float *to) {
    const float *cos = a->cos + token * a->turned, *sin = a->sin + token * a->turned;
    int64_t half = a->turned / 2;
    for (int64_t i = 0; i < a->width; i++) to[i] = value_at(x, a->bf16, from + i);
    for (int64_t i = 0; i < half; i++) {
        float first = to[i], second = to[i + half];
        to[i] = first * cos[i] + second * sin[i];
        to[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* Key and value of one head into the cache. */
static void remember(const Attend *a, int64_t token, int64_t head, float *scratch) {
    int64_t from = (token * a->heads + head) * 3 * a->width;
    int64_t to = ((a->slot[token] * a->heads + head) * a->length + a->position[token]) * a->width;
    rotate(a, token, a->qkv, from + a->width, scratch);
    for (int64_t i = 0; i < a->width; i++) {
        put_at(a->keys, a->cache_bf16, to + i, scratch[i]);
        put_at(a->values, a->cache_bf16, to + i, value_at(a->qkv, a->bf16, from + 2 * a->width + i));
    }
}

#define LANES 16
#include "vector.h"
#include "attention_level.h"
#undef LANES
#define LANES 8
#include "vector.h"
#include "attention_level.h"
#undef LANES

/* Returns 0; 1 when there is no memory for the scores; 2 for a slot or position outside the cache, before anything is
   written. level: 1 or 2, at most dolly_level(). */
int dolly_attend(int level, int bf16, int cache_bf16, int64_t tokens, int64_t heads, int64_t width, int64_t turned,
                 int64_t slots, int64_t length, const void *qkv, const float *cos, const float *sin,
                 const int64_t *slot, const int64_t *position, void *keys, void *values, void *out, int threads) {
    Attend a = {tokens, heads, width, turned, slots, length, bf16, cache_bf16, qkv, cos, sin, slot, position,
                keys, values, out, 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss((float)width)))};
    int64_t last = 0;
    for (int64_t token = 0; token < tokens; token++) {
        if (slot[token] < 0 || slot[token] >= slots || position[token] < 0 || position[token] >= length) return 2;
        if (position[token] > last) last = position[token];
    }
    int64_t each = width + (last / 16 + 1) * 16;
    float *scratch = malloc(threads * each * sizeof(float));
    if (!scratch) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *own = scratch + omp_get_thread_num() * each;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < heads * tokens; unit++) remember(&a, unit % tokens, unit / tokens, own);
        /* The tokens of a slot follow each other, so that one head's keys are read for all of them. */
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < heads * tokens; unit++)
            (level == LEVEL_AVX512 ? attend_512 : attend_256)(&a, unit % tokens, unit / tokens, own);
    }
    free(scratch);
    return 0;
}

#endif
