/* Linear layers for x86-64 CPUs with weights of 8, 4 or 16 bits, called through ../cpu.py.

   y[m][n] = sum over k of x[m][k] * w[n][k] + bias[n], for m < M rows (tokens), n < N outputs, k < K inputs.

   How it works
   1. int8 and int4: each row of x is quantised to whole numbers of 16 bits, q = round(x * 32512 / max |x|), which are
      two signed bytes: q = 256 * high + low. Both are multiplied with the same weights, as if they were two rows, and
      y = (256 * sum of high + sum of low) * factors. With one part there are 8 bits, q = round(x * 127 / max |x|): half
      of the work, and the larger error where a few values of a row are much larger than the others.
   2. Their weights are whole numbers too, stored as unsigned numbers with an offset (128 or 8), because the instruction
      that multiplies four pairs of bytes and adds them up (vpdpbusd) wants one unsigned factor:
      sum q * w = sum q * (w + offset) - offset * sum q.
   3. bf16: x and the weights are widened to float, products are added up in the order of k.
   Sums of whole numbers are exact and those of floats have one fixed order, so a row's result depends neither on the
   number of threads, nor on the rows beside it, nor on the instruction set.

   Weights lie in the order in which they are multiplied: a token reads them as a few streams, many tokens read them
   once for up to 12 of them. All three layouts are 32-bit words [N/16][K/inputs per word][16], padded with zeros:
     int8  4 inputs per word, one in each byte
     int4  8 inputs per word; byte j holds input j in its low half and input j + 4 in its high half
     bf16  2 inputs per word
   Scales: int8 float [N]; int4 float16 [N/16][K/128][16], one for each 128 inputs of an output. */

#include "kernels.h"

enum { INT8, INT4, BF16 };  /* kinds of weights */
enum { NOTHING, GELU };     /* what is done to an output before it is stored */

#if defined(__x86_64__) && defined(__GNUC__)

#define GROUP 128              /* inputs that share one scale in int4 */
#define CHUNK_BYTES (2 << 20)  /* rows worked on between two readings of the weights: what a core's caches hold */
#define BAND_BYTES (768 << 10) /* two bands of weights, of several panels: what a core's second cache holds beside rows */
#define AHEAD 2048             /* bytes to fetch ahead in each stream of weights */
/* So few rows are quantised by each thread for itself. Shared, their cache lines go from core to core and back in each
   call: one row of 10240 inputs took 22 us more in 8 bits and 45 us in 16 (two cores, AVX-512), quantising takes 3. */
#define OWN_ROWS 12
#define NOT_FINITE 0x7f800000 /* bits of infinity; those of NaN are larger */
#define SMALLEST 1e-30f        /* a row without a larger value counts as zero: 32512 / max would overflow */
#define STEPS_8 127.0f         /* the largest value of a row quantised to one byte */
#define STEPS_16 32512.0f      /* to two: 127 * 256, so that the high one is at most 127 */

/* One call of dolly_linear. */
typedef struct {
    int kind, bf16;         /* kind of weights; whether x and out are bfloat16, otherwise float */
    int parts;              /* bytes of a quantised value of x: 1 or 2; 1 for bf16 weights */
    int activation;
    int64_t m, n, k;        /* k without padding */
    const void *x;          /* [M][K] */
    const uint32_t *weights;
    int64_t words;          /* 32-bit words of one output: K / inputs per word, rounded up */
    const void *scales;
    const float *bias;      /* [N] or NULL */
    void *out;              /* [M][N] */
    /* Rows as they are multiplied, in panels: [inputs / 4][rows][parts][4] int8, or [inputs][rows] float for bf16. */
    uint8_t *rows;
    int64_t row_bytes;      /* of all parts of a row */
    float *factors;         /* [M] value of one step of q */
    int32_t *sums;          /* [M][parts], or [M][parts][groups] for int4: offset * sum of a part of q */
    int64_t groups;
    int64_t panels;
} Call;

typedef struct {
    int64_t first;
    int rows; /* of x */
    int lines; /* rows * parts: what is multiplied */
    /* While it multiplies one vector of weights it fetches what lies `ahead` bytes behind it, and then `pace` more. */
    int64_t ahead, pace;
} Panel;

/* Rows are spread evenly, so that no panel is much lower than the others. */
static Panel panel_of(const Call *c, int64_t index) {
    int64_t low = c->m / c->panels, higher = c->m % c->panels;
    int rows = (int)(low + (index < higher));
    Panel panel = {index * low + (index < higher ? index : higher), rows, rows * c->parts, AHEAD, 64};
    return panel;
}

/* ---------------------------------------------------------------- AVX-512 with VNNI */

#define LANES 16
#include "vector.h"
#undef LANES

INLINE AVX512 __m512 load_512(const void *x, int bf16, int64_t index, __mmask16 mask) {
    if (!bf16) return _mm512_maskz_loadu_ps(mask, (const float *)x + index);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE AVX512 void store_512(void *out, int bf16, int64_t index, __mmask16 mask, __m512 value) {
    if (!bf16) {
        _mm512_mask_storeu_ps((float *)out + index, mask, value);
        return;
    }
    __m512i bits = _mm512_castps_si512(value); /* to the nearest, ties to even */
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    bits = _mm512_mask_set1_epi32(bits, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), 0x7fc0);
    _mm256_mask_storeu_epi16((uint16_t *)out + index, mask, _mm512_cvtepi32_epi16(bits));
}

INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

/* The low bytes of 16 numbers, as `count` words that lie `stride` words apart. */
INLINE AVX512 void put_words_512(int32_t *q, int64_t stride, __m512i numbers, int count) {
    __m128i words = _mm512_cvtepi32_epi8(numbers);
    q[0] = _mm_extract_epi32(words, 0);
    if (count > 1) q[stride] = _mm_extract_epi32(words, 1);
    if (count > 2) q[2 * stride] = _mm_extract_epi32(words, 2);
    if (count > 3) q[3 * stride] = _mm_extract_epi32(words, 3);
}

/* Quantise one row into a panel of `stride` lines, of which it takes `parts` from `q` on; the inputs from k to `padded`
   become 0. Returns the value of one step, NaN for a row that is not finite. sums: one number per `group` inputs for
   each part [parts][groups], each times `offset`. */
static AVX512 float quantise_row_512(const void *x, int bf16, int64_t from, int64_t k, int64_t padded, int parts,
                                     int32_t *q, int64_t stride, int32_t *sums, int64_t group, int32_t offset) {
    const __m512i positive = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512(); /* as whole numbers: NaN is above infinity, infinity above the rest */
    for (int64_t i = 0; i < k; i += 16) {
        __m512 value = load_512(x, bf16, from + i, first_lanes(k - i));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(value), positive));
    }
    int32_t bits = _mm512_reduce_max_epi32(largest);
    if (bits >= NOT_FINITE) k = 0; /* the factor says it; the numbers themselves have no whole number to become */
    float top;
    memcpy(&top, &bits, 4);
    const float steps = parts == 2 ? STEPS_16 : STEPS_8;
    const int64_t groups = (padded + group - 1) / group;
    const __m512 inverse = _mm512_set1_ps(top > SMALLEST ? steps / top : 0.0f);
    for (int64_t g = 0, i = 0; g < groups; g++) {
        int64_t end = (g + 1) * group < padded ? (g + 1) * group : padded;
        __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (; i < end; i += 16) {
            __m512 value = load_512(x, bf16, from + i, i < k ? first_lanes(k - i) : 0);
            __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
            int32_t *place = q + i / 4 * stride;
            int count = end - i < 16 ? (int)(end - i) / 4 : 4;
            if (parts == 2) {
                __m512i high = _mm512_srai_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(128)), 8);
                __m512i low = _mm512_sub_epi32(first, _mm512_slli_epi32(high, 8));
                sum[1] = _mm512_add_epi32(sum[1], low);
                put_words_512(place + 1, stride, low, count);
                first = high;
            }
            sum[0] = _mm512_add_epi32(sum[0], first);
            put_words_512(place, stride, first, count);
        }
        for (int part = 0; sums && part < parts; part++)
            sums[part * groups + g] = offset * _mm512_reduce_add_epi32(sum[part]);
    }
    return bits >= NOT_FINITE ? widen(0x7fc0) : top > SMALLEST ? top / steps : 0.0f;
}

/* From sums [rows][parts][blocks][16] to outputs. Apart from the tiles, so that the compiler keeps their sums in
   registers. */
static AVX512 __attribute__((noinline)) void finish_512(const Call *c, Panel p, int64_t block, int blocks,
                                                        const __m512i *sums) {
    for (int i = 0; i < p.rows; i++) {
        int64_t row = p.first + i;
        for (int b = 0; b < blocks; b++) {
            int64_t n = (block + b) * 16;
            __mmask16 mask = first_lanes(c->n - n);
            __m512 part[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, scale = _mm512_set1_ps(1.0f);
            for (int j = 0; j < c->parts; j++) {
                part[j] = _mm512_load_ps((const float *)(sums + (i * c->parts + j) * blocks + b));
                if (c->kind == INT8) {
                    __m512i offset = _mm512_set1_epi32(c->sums[row * c->parts + j]);
                    part[j] = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(part[j]), offset));
                }
            }
            __m512 value = part[0];
            if (c->parts == 2) value = _mm512_fmadd_ps(part[0], _mm512_set1_ps(256.0f), part[1]);
            if (c->kind == INT8) scale = _mm512_maskz_loadu_ps(mask, (const float *)c->scales + n);
            if (c->kind != BF16) value = _mm512_mul_ps(value, _mm512_set1_ps(c->factors[row]));
            __m512 bias = c->bias ? _mm512_maskz_loadu_ps(mask, c->bias + n) : _mm512_setzero_ps();
            value = _mm512_fmadd_ps(value, scale, bias);
            if (c->activation == GELU) value = gelu_512(value);
            store_512(c->out, c->bf16, row * c->n + n, mask, value);
        }
    }
}

INLINE AVX512 void tile_int8_512(const Call *c, Panel p, int64_t block, const int rows, const int blocks,
                                 __m512i *done) {
    __m512i sum[12][4];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_setzero_si512();
    const int32_t *q = (const int32_t *)(c->rows + p.first * c->row_bytes);
    const uint32_t *w = c->weights + block * c->words * 16;
    const char *fetch = (const char *)w + p.ahead;
    for (int64_t k = 0; k < c->words; k++, q += rows, w += 16, fetch += p.pace) {
        __m512i weight[4];
        UNROLL for (int b = 0; b < blocks; b++) {
            weight[b] = _mm512_loadu_si512(w + b * c->words * 16);
            _mm_prefetch(fetch + b * c->words * 64, _MM_HINT_T0);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            __m512i x = _mm512_set1_epi32(q[i]);
            UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_dpbusd_epi32(sum[i][b], weight[b], x);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int b = 0; b < blocks; b++) _mm512_store_si512(done + i * blocks + b, sum[i][b]);
}

INLINE AVX512 void tile_int4_512(const Call *c, Panel p, int64_t block, const int rows, const int blocks,
                                 __m512i *done) {
    float *total = (float *)done;
    for (int i = 0; i < rows * blocks; i++) _mm512_store_ps(total + 16 * i, _mm512_setzero_ps());
    const __m512i low = _mm512_set1_epi8(15);
    const int32_t *q = (const int32_t *)(c->rows + p.first * c->row_bytes);
    const uint32_t *w = c->weights + block * c->words * 16;
    const char *fetch = (const char *)w + p.ahead;
    const uint16_t *scales = (const uint16_t *)c->scales + block * c->groups * 16;
    const int32_t *offsets = c->sums + p.first * c->parts * c->groups;
    for (int64_t group = 0; group < c->groups; group++) {
        __m512i sum[12][4];
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_setzero_si512();
        for (int word = 0; word < GROUP / 8; word++, q += 2 * rows, w += 16, fetch += p.pace) {
            __m512i first[4], second[4];
            UNROLL for (int b = 0; b < blocks; b++) {
                __m512i both = _mm512_loadu_si512(w + b * c->words * 16);
                _mm_prefetch(fetch + b * c->words * 64, _MM_HINT_T0);
                first[b] = _mm512_and_si512(both, low);
                second[b] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            }
            UNROLL for (int i = 0; i < rows; i++) {
                __m512i x = _mm512_set1_epi32(q[i]);
                UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_dpbusd_epi32(sum[i][b], first[b], x);
                x = _mm512_set1_epi32(q[rows + i]);
                UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_dpbusd_epi32(sum[i][b], second[b], x);
            }
        }
        UNROLL for (int b = 0; b < blocks; b++) {
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + (b * c->groups + group) * 16)));
            UNROLL for (int i = 0; i < rows; i++) {
                __m512i whole = _mm512_sub_epi32(sum[i][b], _mm512_set1_epi32(offsets[i * c->groups + group]));
                float *place = total + 16 * (i * blocks + b);
                _mm512_store_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, _mm512_load_ps(place)));
            }
        }
    }
}


INLINE AVX512 void tile_bf16_512(const Call *c, Panel p, int64_t block, const int rows, const int blocks,
                                 __m512i *done) {
    __m512 sum[12][4];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_setzero_ps();
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    const float *x = (const float *)(c->rows + p.first * c->row_bytes);
    const uint32_t *w = c->weights + block * c->words * 16;
    const char *fetch = (const char *)w + p.ahead;
    for (int64_t k = 0; k < c->words; k++, x += 2 * rows, w += 16, fetch += p.pace) {
        __m512 first[4], second[4];
        UNROLL for (int b = 0; b < blocks; b++) {
            __m512i both = _mm512_loadu_si512(w + b * c->words * 16);
            _mm_prefetch(fetch + b * c->words * 64, _MM_HINT_T0);
            first[b] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            second[b] = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
        }
        UNROLL for (int i = 0; i < rows; i++) {
            __m512 value = _mm512_set1_ps(x[i]);
            UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_fmadd_ps(first[b], value, sum[i][b]);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            __m512 value = _mm512_set1_ps(x[rows + i]);
            UNROLL for (int b = 0; b < blocks; b++) sum[i][b] = _mm512_fmadd_ps(second[b], value, sum[i][b]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int b = 0; b < blocks; b++) _mm512_store_ps((float *)(done + i * blocks + b), sum[i][b]);
}

/* One panel times the outputs of the blocks from `block` to `end`. Few lines leave registers for four streams of weights
   at a time, which are fetched faster than two; int4 needs two registers for each. */
#define TILES(kind, set, rows, blocks)                                      \
    for (; block + blocks <= end; block += blocks) {                        \
        tile_##kind##_##set(c, p, block, rows, blocks, done);               \
        finish_##set(c, p, block, blocks, done);                            \
    }
#define CASE(kind, set, rows, blocks)                                       \
    case rows:                                                              \
        TILES(kind, set, rows, blocks)                                      \
        if (blocks > 1) TILES(kind, set, rows, 1)                           \
        break;
#define BAND_512(kind, of_5_and_6)                                                      \
    static AVX512 void band_##kind##_512(const Call *c, Panel p, int64_t block, int64_t end) { \
        __m512i done[24];                                                               \
        switch (p.lines) {                                                              \
            CASE(kind, 512, 1, 4) CASE(kind, 512, 2, 4) CASE(kind, 512, 3, 4)           \
            CASE(kind, 512, 4, 4) CASE(kind, 512, 5, of_5_and_6) CASE(kind, 512, 6, of_5_and_6) \
            CASE(kind, 512, 7, 2) CASE(kind, 512, 8, 2) CASE(kind, 512, 9, 2)           \
            CASE(kind, 512, 10, 2) CASE(kind, 512, 11, 2) CASE(kind, 512, 12, 2)        \
        }                                                                               \
    }
BAND_512(int8, 4)
BAND_512(int4, 2)
BAND_512(bf16, 4)

/* ---------------------------------------------------------------- AVX2 */

#define LANES 8
#include "vector.h"
#undef LANES

INLINE AVX2 __m256 load_256(const void *x, int bf16, int64_t index, int64_t count) {
    float values[8] = {0};
    if (count >= 8 && !bf16) return _mm256_loadu_ps((const float *)x + index);
    for (int64_t i = 0; i < 8 && i < count; i++) values[i] = value_at(x, bf16, index + i);
    return _mm256_loadu_ps(values);
}

INLINE AVX2 __m128 load_128(const void *x, int bf16, int64_t index, int64_t count) {
    if (count < 4) return _mm256_castps256_ps128(load_256(x, bf16, index, count));
    if (!bf16) return _mm_loadu_ps((const float *)x + index);
    __m128i half = _mm_loadl_epi64((const __m128i *)((const uint16_t *)x + index));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}

/* The low bytes of four numbers. */
INLINE AVX2 int32_t low_bytes(__m128i numbers) {
    return _mm_cvtsi128_si32(_mm_shuffle_epi8(numbers, _mm_set1_epi32(0x0c080400)));
}

/* As quantise_row_512. */
static AVX2 float quantise_row_256(const void *x, int bf16, int64_t from, int64_t k, int64_t padded, int parts,
                                   int32_t *q, int64_t stride, int32_t *sums, int64_t group, int32_t offset) {
    __m128i largest = _mm_setzero_si128();
    for (int64_t i = 0; i < k; i += 4) {
        __m128i bits = _mm_castps_si128(load_128(x, bf16, from + i, k - i));
        largest = _mm_max_epi32(largest, _mm_and_si128(bits, _mm_set1_epi32(0x7fffffff)));
    }
    int32_t lanes[4], bits = 0;
    memcpy(lanes, &largest, 16);
    for (int i = 0; i < 4; i++) bits = lanes[i] > bits ? lanes[i] : bits;
    if (bits >= NOT_FINITE) k = 0;
    float top;
    memcpy(&top, &bits, 4);
    const float steps = parts == 2 ? STEPS_16 : STEPS_8;
    const int64_t groups = (padded + group - 1) / group;
    const __m128 inverse = _mm_set1_ps(top > SMALLEST ? steps / top : 0.0f);
    for (int64_t g = 0, i = 0; g < groups; g++) {
        int64_t end = (g + 1) * group < padded ? (g + 1) * group : padded;
        __m128i sum[2] = {_mm_setzero_si128(), _mm_setzero_si128()};
        for (; i < end; i += 4) {
            __m128i first = _mm_cvtps_epi32(_mm_mul_ps(load_128(x, bf16, from + i, k - i), inverse));
            if (parts == 2) {
                __m128i high = _mm_srai_epi32(_mm_add_epi32(first, _mm_set1_epi32(128)), 8);
                __m128i low = _mm_sub_epi32(first, _mm_slli_epi32(high, 8));
                sum[1] = _mm_add_epi32(sum[1], low);
                q[i / 4 * stride + 1] = low_bytes(low);
                first = high;
            }
            sum[0] = _mm_add_epi32(sum[0], first);
            q[i / 4 * stride] = low_bytes(first);
        }
        for (int part = 0; sums && part < parts; part++) {
            memcpy(lanes, &sum[part], 16);
            sums[part * groups + g] = offset * (lanes[0] + lanes[1] + lanes[2] + lanes[3]);
        }
    }
    return bits >= NOT_FINITE ? widen(0x7fc0) : top > SMALLEST ? top / steps : 0.0f;
}

/* As finish_512; sums [rows][parts][2][8]. */
static AVX2 __attribute__((noinline)) void finish_256(const Call *c, Panel p, int64_t block, int blocks,
                                                      const __m256i *sums) {
    (void)blocks;
    for (int i = 0; i < p.rows; i++) {
        int64_t row = p.first + i;
        for (int h = 0; h < 2; h++) {
            int64_t n = block * 16 + h * 8, count = c->n - n;
            __m256 part[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, scale = _mm256_set1_ps(1.0f);
            for (int j = 0; j < c->parts; j++) {
                part[j] = _mm256_load_ps((const float *)(sums + (i * c->parts + j) * 2 + h));
                if (c->kind == INT8) part[j] = _mm256_cvtepi32_ps(_mm256_castps_si256(part[j]));
            }
            __m256 value = part[0];
            if (c->parts == 2) value = _mm256_fmadd_ps(part[0], _mm256_set1_ps(256.0f), part[1]);
            if (c->kind == INT8) scale = load_256(c->scales, 0, n, count);
            if (c->kind != BF16) value = _mm256_mul_ps(value, _mm256_set1_ps(c->factors[row]));
            __m256 bias = c->bias ? load_256(c->bias, 0, n, count) : _mm256_setzero_ps();
            value = _mm256_fmadd_ps(value, scale, bias);
            if (c->activation == GELU) value = gelu_256(value);
            for (int64_t j = 0; j < 8 && j < count; j++) put_at(c->out, c->bf16, row * c->n + n + j, value[j]);
        }
    }
}

/* sum += the four products in each 32-bit word of unsigned a and signed b; exact where |a[i] * b[i]| < 2^14: a byte of
   x may be -128 (its size is then 128), one of the weights is at most 127 in size. */
INLINE AVX2 __m256i multiply_add_256(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}

INLINE AVX2 void tile_int8_256(const Call *c, Panel p, int64_t block, const int rows, const int blocks,
                               __m256i *done) {
    (void)blocks; /* always 1, in two halves */
    __m256i sum[4][2];
    UNROLL for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    const int32_t *q = (const int32_t *)(c->rows + p.first * c->row_bytes);
    const uint32_t *w = c->weights + block * c->words * 16;
    const char *fetch = (const char *)w + p.ahead;
    for (int64_t k = 0; k < c->words; k++, q += rows, w += 16, fetch += p.pace) {
        __m256i weight[2];
        _mm_prefetch(fetch, _MM_HINT_T0);
        UNROLL for (int h = 0; h < 2; h++) /* without the offset: products of unsigned bytes would not fit 16 bits */
            weight[h] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)w + h), _mm256_set1_epi8((char)0x80));
        UNROLL for (int i = 0; i < rows; i++) {
            __m256i x = _mm256_set1_epi32(q[i]), size = _mm256_abs_epi8(x);
            UNROLL for (int h = 0; h < 2; h++)
                sum[i][h] = multiply_add_256(sum[i][h], size, _mm256_sign_epi8(weight[h], x));
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int h = 0; h < 2; h++) _mm256_store_si256(done + i * 2 + h, sum[i][h]);
}

INLINE AVX2 void tile_int4_256(const Call *c, Panel p, int64_t block, const int rows, const int blocks,
                               __m256i *done) {
    (void)blocks; /* always 1, in two halves */
    float *total = (float *)done;
    for (int i = 0; i < rows * 2; i++) _mm256_store_ps(total + 8 * i, _mm256_setzero_ps());
    const __m256i low = _mm256_set1_epi8(15);
    const int32_t *q = (const int32_t *)(c->rows + p.first * c->row_bytes);
    const uint32_t *w = c->weights + block * c->words * 16;
    const char *fetch = (const char *)w + p.ahead;
    const uint16_t *scales = (const uint16_t *)c->scales + block * c->groups * 16;
    const int32_t *offsets = c->sums + p.first * c->parts * c->groups;
    for (int64_t group = 0; group < c->groups; group++) {
        __m256i sum[4][2];
        UNROLL for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        for (int word = 0; word < GROUP / 8; word++, q += 2 * rows, w += 16, fetch += p.pace) {
            _mm_prefetch(fetch, _MM_HINT_T0);
            UNROLL for (int h = 0; h < 2; h++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)w + h);
                __m256i first = _mm256_and_si256(both, low);
                __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                UNROLL for (int i = 0; i < rows; i++) {
                    sum[i][h] = multiply_add_256(sum[i][h], first, _mm256_set1_epi32(q[i]));
                    sum[i][h] = multiply_add_256(sum[i][h], second, _mm256_set1_epi32(q[rows + i]));
                }
            }
        }
        UNROLL for (int h = 0; h < 2; h++) {
            __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + group * 16) + h));
            UNROLL for (int i = 0; i < rows; i++) {
                __m256i offset = _mm256_set1_epi32(offsets[i * c->groups + group]);
                __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[i][h], offset));
                float *place = total + 8 * (i * 2 + h);
                _mm256_store_ps(place, _mm256_fmadd_ps(whole, scale, _mm256_load_ps(place)));
            }
        }
    }
}

INLINE AVX2 void tile_bf16_256(const Call *c, Panel p, int64_t block, const int rows, const int blocks,
                               __m256i *done) {
    (void)blocks; /* always 1, in two halves */
    __m256 sum[4][2];
    UNROLL for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    const float *x = (const float *)(c->rows + p.first * c->row_bytes);
    const uint32_t *w = c->weights + block * c->words * 16;
    const char *fetch = (const char *)w + p.ahead;
    for (int64_t k = 0; k < c->words; k++, x += 2 * rows, w += 16, fetch += p.pace) {
        _mm_prefetch(fetch, _MM_HINT_T0);
        UNROLL for (int h = 0; h < 2; h++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)w + h);
            __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            __m256 second = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
            UNROLL for (int i = 0; i < rows; i++) {
                sum[i][h] = _mm256_fmadd_ps(first, _mm256_set1_ps(x[i]), sum[i][h]);
                sum[i][h] = _mm256_fmadd_ps(second, _mm256_set1_ps(x[rows + i]), sum[i][h]);
            }
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int h = 0; h < 2; h++) _mm256_store_ps((float *)(done + i * 2 + h), sum[i][h]);
}

#define BAND_256(kind)                                                                  \
    static AVX2 void band_##kind##_256(const Call *c, Panel p, int64_t block, int64_t end) {   \
        __m256i done[8];                                                                \
        switch (p.lines) {                                                              \
            CASE(kind, 256, 1, 1) CASE(kind, 256, 2, 1)                                 \
            CASE(kind, 256, 3, 1) CASE(kind, 256, 4, 1)                                 \
        }                                                                               \
    }
BAND_256(int8)
BAND_256(int4)
BAND_256(bf16)

/* ---------------------------------------------------------------- common */

typedef void (*Band)(const Call *, Panel, int64_t, int64_t);
typedef float (*Quantise)(const void *, int, int64_t, int64_t, int64_t, int, int32_t *, int64_t, int32_t *, int64_t,
                          int32_t);

static const Band BANDS[3][3] = {
    {0}, {band_int8_256, band_int4_256, band_bf16_256}, {band_int8_512, band_int4_512, band_bf16_512}};
static const Quantise QUANTISE[3] = {0, quantise_row_256, quantise_row_512};
static const int MOST_LINES[3] = {2, 4, 12}; /* of a panel */
static const int INPUTS_PER_WORD[3] = {4, 8, 2};

/* The best level of this machine. */
int dolly_level(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return LEVEL_AVX512;
    /* every CPU with AVX2 has F16C */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? LEVEL_AVX2 : LEVEL_NONE;
}

static void prepare_panel(const Call *c, int level, Panel p) {
    int64_t inputs = c->words * INPUTS_PER_WORD[c->kind];
    uint8_t *panel = c->rows + p.first * c->row_bytes;
    for (int i = 0; i < p.rows; i++) {
        int64_t row = p.first + i;
        if (c->kind == BF16) {
            float *values = (float *)panel + i;
            for (int64_t k = 0; k < c->k; k++) values[k * p.rows] = value_at(c->x, c->bf16, row * c->k + k);
            for (int64_t k = c->k; k < inputs; k++) values[k * p.rows] = 0;
        } else {
            c->factors[row] = QUANTISE[level](c->x, c->bf16, row * c->k, c->k, inputs, c->parts,
                                              (int32_t *)panel + i * c->parts, p.lines,
                                              c->sums + row * c->parts * c->groups, c->kind == INT4 ? GROUP : inputs,
                                              c->kind == INT4 ? 8 : 128);
        }
    }
}

/* Memory of all rows as they are multiplied, with their factors and sums: a multiple of a cache line. */
static int64_t rows_bytes(const Call *c) {
    return (c->m * (c->row_bytes + 4 + 4 * c->parts * c->groups) + 63) / 64 * 64;
}

static void own_rows(Call *c, uint8_t *memory) {
    c->rows = memory;
    c->factors = (float *)(memory + c->m * c->row_bytes);
    c->sums = (int32_t *)(c->factors + c->m);
}

/* The first of several panels would wait for its weights from memory, the others would find them in the cache: so each
   of them fetches its share of what the next band needs, and the memory is never idle. */
static void fetch_next_band(const Call *c, Panel *p, int64_t band, int64_t index, int64_t panels) {
    int64_t stream = c->words * 64;
    p->ahead = band * stream + stream * index / panels;
    p->pace = panels < 64 ? 64 / panels : 1;
}

static void work(const Call *c, int level) {
    Call own = *c;
    if (c->m <= OWN_ROWS) {
        own_rows(&own, c->rows + omp_get_thread_num() * rows_bytes(c));
        for (int64_t index = 0; index < c->panels; index++) prepare_panel(&own, level, panel_of(c, index));
        c = &own;
    } else {
#pragma omp for schedule(static)
        for (int64_t index = 0; index < c->panels; index++) prepare_panel(c, level, panel_of(c, index));
    }
    /* Outputs are split in one piece per thread, so that each reads its weights as long streams. */
    int64_t quads = (c->n + 63) / 64, blocks = (c->n + 15) / 16;
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t begin = quads * thread / threads * 4, end = quads * (thread + 1) / threads * 4;
    if (end > blocks) end = blocks;
    int64_t chunk = CHUNK_BYTES / (c->row_bytes / c->parts * MOST_LINES[level]);
    if (chunk < 1) chunk = 1;
    for (int64_t first = 0; first < c->panels; first += chunk) {
        int64_t last = first + chunk < c->panels ? first + chunk : c->panels;
        int64_t band = last - first > 1 && 8 * c->words * 64 > BAND_BYTES ? 2 : 4;
        for (int64_t block = begin; block < end; block += band)
            for (int64_t index = first; index < last; index++) {
                Panel p = panel_of(c, index);
                if (last - first > 1) fetch_next_band(c, &p, band, index - first, last - first);
                BANDS[level][c->kind](c, p, block, block + band < end ? block + band : end);
            }
    }
}

/* Returns 0, or 1 when there is no memory for the quantised rows. level: at most dolly_level(). parts: bytes of a
   quantised value of x, 1 or 2; anything for bf16. */
int dolly_linear(int level, int kind, int parts, int bf16, int activation, int64_t m, int64_t n, int64_t k,
                 const void *x, const uint32_t *weights, const void *scales, const float *bias, void *out,
                 int threads) {
    Call c = {.kind = kind, .bf16 = bf16, .parts = kind == BF16 ? 1 : parts, .activation = activation, .m = m, .n = n,
              .k = k, .x = x, .weights = weights, .scales = scales, .bias = bias, .out = out};
    c.groups = kind == INT4 ? (k + GROUP - 1) / GROUP : 1;
    c.words = kind == INT4 ? c.groups * (GROUP / 8) : (k + INPUTS_PER_WORD[kind] - 1) / INPUTS_PER_WORD[kind];
    c.row_bytes = c.words * INPUTS_PER_WORD[kind] * (kind == BF16 ? 4 : c.parts);
    int most = MOST_LINES[level] / c.parts;
    c.panels = (m + most - 1) / most;
    uint8_t *memory = aligned_alloc(64, rows_bytes(&c) * (m <= OWN_ROWS ? threads : 1));
    if (!memory) return 1;
    own_rows(&c, memory);
#pragma omp parallel num_threads(threads)
    work(&c, level);
    free(memory);
    return 0;
}

/* Quantise the rows of x [M][K] to 8 bits: q [M/panel][K/4][panel][4] (panel 1: row by row; 16: as int8 weights, but
   signed), K padded to 4 with zeros, rows that are missing in the last panel left as they are; factors [M]. */
void dolly_quantise(int level, int bf16, int64_t m, int64_t k, const void *x, int64_t panel, int8_t *q, float *factors,
                    int threads) {
    int64_t padded = (k + 3) / 4 * 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < m; row++)
        factors[row] = QUANTISE[level](x, bf16, row * k, k, padded, 1,
                                       (int32_t *)(q + row / panel * panel * padded) + row % panel, panel, 0, padded, 0);
}

/* How many threads a parallel region really gets. */
int dolly_threads(int threads) {
    int count = 0;
#pragma omp parallel num_threads(threads)
#pragma omp atomic
    count++;
    return count;
}

#else

int dolly_level(void) { return LEVEL_NONE; }

#endif

/* Counted up when the arguments of a function change: a library that was built before is then not called. */
int dolly_interface(void) { return 2; }
