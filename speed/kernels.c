/* One step of decoding on the CPU. It reads a lot of memory once and computes little with it, in two loops,

       product   y = x W^T for a few rows x, weights in int8, bfloat16 or float32
       attend    attention from one position to all before it, keys and values stored likewise
       decode    the layers of the transformer, made of the two: Layer.forward of lm.py without its overhead

   and, for training, in the step of the optimizer at the end. Compiled and loaded by precision.py,
   with the plain way beside it as the fallback and, in tests/test_speed.py, as the oracle. Arithmetic is
   in float32, but for int8 weights on processors with AVX-512 VNNI. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { INT8, BFLOAT16, FLOAT32 };
static const long BYTES[] = {1, 2, 4};

typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
#define F8(pointer) (*(f8 *)(pointer))
#define INLINE static inline __attribute__((always_inline))

/* Eight numbers from index i on, as float32. */
INLINE f8 load(const void *data, long i, int kind)
{
    if (kind == FLOAT32)
        return F8((const float *)data + i);
#ifdef __AVX2__
    if (kind == INT8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)((const int8_t *)data + i))));
    __m128i upper = _mm_loadu_si128((const void *)((const uint16_t *)data + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16));
#else
    f8 y;
    for (int j = 0; j < 8; j++)
        if (kind == INT8) {
            y[j] = ((const int8_t *)data)[i + j];
        } else {
            uint32_t bits = (uint32_t)((const uint16_t *)data)[i + j] << 16;
            float value;
            memcpy(&value, &bits, 4);
            y[j] = value;
        }
    return y;
#endif
}

INLINE float total(f8 a)
{
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

/* Four rows of w times N (1 or 2) rows of x: sums that do not wait for each other. y (2, 4). */
INLINE void four_rows(const char *w, const float *x, float *y, long columns, int kind, int N)
{
    f8 sum[4][2] = {{{0}}};
    for (long c = 0; c < columns; c += 8) {
        __builtin_prefetch(w + 4 * (columns + c) * BYTES[kind] + 1024);  /* rows that come next */
        for (int i = 0; i < 4; i++) {
            f8 weights = load(w, i * columns + c, kind);
            for (int b = 0; b < N; b++)
                sum[i][b] += weights * F8(x + b * columns + c);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int b = 0; b < N; b++)
            y[4 * b + i] = total(sum[i][b]);
}

#ifdef __AVX512VNNI__
/* n numbers as whole ones of 15 bits -> what 1 stands for */
static float whole_numbers(const float *x, int16_t *whole, long n)
{
    float top = 1e-30f;
    for (long i = 0; i < n; i++)
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    for (long i = 0; i < n; i++)
        whole[i] = (int16_t)lrintf(x[i] * (32767 / top));
    return top / 32767;
}

/* The same for int8 weights: x in whole numbers of 15 bits, 32 products an instruction, so that memory is the limit. */
INLINE void four_rows_of_int8(const int8_t *w, const int16_t *x, int32_t *y, long columns, int N)
{
    __m512i sum[4][2] = {{{0}}};
    for (long c = 0; c < columns; c += 32) {
        __builtin_prefetch(w + 4 * (columns + c) + 1024);
        __builtin_prefetch(w + 4 * (columns + c) + 1088);
        for (int i = 0; i < 4; i++) {
            __m512i weights = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(w + i * columns + c)));
            for (int b = 0; b < N; b++)
                sum[i][b] = _mm512_dpwssd_epi32(sum[i][b], weights, _mm512_loadu_si512(x + b * columns + c));
        }
    }
    for (int i = 0; i < 4; i++)
        for (int b = 0; b < N; b++)
            y[4 * b + i] = _mm512_reduce_add_epi32(sum[i][b]);
}
#endif

/* Layer norm of each row of x, in place. */
static void normalise(float *x, const float *weight, const float *bias, long columns, long batch)
{
    for (; batch--; x += columns) {
        float mean = 0, variance = 0;
        for (long c = 0; c < columns; c++)
            mean += x[c];
        mean /= columns;
        for (long c = 0; c < columns; c++)
            variance += (x[c] - mean) * (x[c] - mean);
        float factor = 1 / sqrtf(variance / columns + 1e-5f);
        for (long c = 0; c < columns; c++)
            x[c] = (x[c] - mean) * factor * weight[c] + bias[c];
    }
}

/* y (batch, rows) = gelu(add + norm(x) W^T): x (batch, columns), w (rows, columns) times scale (rows). Each of scale,
   norm (weight and bias), gelu and add (batch, rows), which may be y, can be missing. rows is a multiple of 4, columns
   of 8. */
void product(int kind, const char *w, const float *scale, const float *x, const float *norm_weight, const float *norm_bias,
             int gelu, const float *add, float *y, long rows, long columns, long batch)
{
    float normed[norm_weight ? batch * columns : 1];
    if (norm_weight) {
        memcpy(normed, x, sizeof normed);
        normalise(normed, norm_weight, norm_bias, columns, batch);
        x = normed;
    }
#ifdef __AVX512VNNI__
    int whole = kind == INT8 && columns % 32 == 0 && columns <= 8192;   /* 127 * 32767 * 8192 / 16 fits 32 bits */
    int16_t rounded[whole ? batch * columns : 1];
    float unit[batch];      /* what 1 stands for */
    for (long b = 0; whole && b < batch; b++)
        unit[b] = whole_numbers(x + b * columns, rounded + b * columns, columns);
#endif
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (long r = 0; r < rows; r += 4)
            for (long b = 0; b < batch; b += 2) {
                const char *four = w + r * columns * BYTES[kind];
                const float *from = x + b * columns;
                float sums[8];
                int two = b + 1 < batch;
#ifdef __AVX512VNNI__
                if (whole) {
                    int32_t found[8];
                    const int16_t *from = rounded + b * columns;
                    two ? four_rows_of_int8((void *)four, from, found, columns, 2)
                        : four_rows_of_int8((void *)four, from, found, columns, 1);
                    for (int i = 0; i < 4 << two; i++)
                        sums[i] = found[i] * unit[b + i / 4];
                } else
#endif
                if (kind == INT8)
                    two ? four_rows(four, from, sums, columns, INT8, 2) : four_rows(four, from, sums, columns, INT8, 1);
                else if (kind == BFLOAT16)
                    two ? four_rows(four, from, sums, columns, BFLOAT16, 2) : four_rows(four, from, sums, columns, BFLOAT16, 1);
                else
                    two ? four_rows(four, from, sums, columns, FLOAT32, 2) : four_rows(four, from, sums, columns, FLOAT32, 1);
                for (int i = 0; i < 4 << two; i++) {
                    long row = r + i % 4, at = (b + i / 4) * rows + row;
                    y[at] = (add ? add[at] : 0) + sums[i] * (scale ? scale[row] : 1);
                }
            }
        if (gelu)
            #pragma omp for schedule(static)
            for (long i = 0; i < batch * rows; i++)
                y[i] = y[i] * 0.5f * (1 + erff(y[i] * 0.70710678f));
    }
}

/* x (E) into row `at` of data: int8 with a scale of its own, or rounded to bfloat16, or as it is. */
static void store(const float *x, void *data, float *scale, long at, long E, int kind)
{
    float top = 1e-12f;
    for (long e = 0; e < E; e++)
        top = fabsf(x[e]) > top ? fabsf(x[e]) : top;
    if (kind == INT8)
        scale[at] = top / 127;
    for (long e = 0; e < E; e++)
        if (kind == INT8) {
            ((int8_t *)data)[at * E + e] = (int8_t)lrintf(x[e] * (127 / top));
        } else if (kind == BFLOAT16) {
            uint32_t bits;
            memcpy(&bits, x + e, 4);
            ((uint16_t *)data)[at * E + e] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        } else {
            ((float *)data)[at * E + e] = x[e];
        }
}

/* Scores of `length` positions -> what each weighs, in place; `unit` is what a score of 1 stands for. */
INLINE void softmax(float *p, const float *k_scale, const float *v_scale, const float *hidden, long length, float unit, int kind)
{
    float top = -INFINITY, sum = 0;
    for (long s = 0; s < length; s++)
        p[s] *= (kind == INT8 ? k_scale[s] : 1) * unit;
    if (hidden)
        for (long s = 0; s < length; s++)
            p[s] += hidden[s];
    for (long s = 0; s < length; s++)
        top = p[s] > top ? p[s] : top;
    for (long s = 0; s < length; s++)
        p[s] = expf(p[s] - top);
    for (long s = 0; s < length; s++)
        sum += p[s];
    for (long s = 0; s < length; s++)
        p[s] *= (kind == INT8 ? v_scale[s] : 1) / sum;
}

/* One head: q (E) to keys and values (length, E); p is room for the scores. */
INLINE void one_head(const float *q, const void *k, const float *k_scale, const void *v, const float *v_scale,
                     const float *hidden, float *p, float *out, long length, long E, int kind)
{
    for (long s = 0; s < length; s++) {
        f8 dot = {0};
        for (long e = 0; e < E; e += 8)
            dot += F8(q + e) * load(k, s * E + e, kind);
        p[s] = total(dot);
    }
    softmax(p, k_scale, v_scale, hidden, length, 1 / sqrtf(E), kind);
    for (long first = 0; first < E; first += 64) {  /* as many sums as there are registers */
        f8 mean[8] = {{0}};
        long n = E - first < 64 ? (E - first) / 8 : 8;
        if (n == 8)
            for (long s = 0; s < length; s++)
                for (long e = 0; e < 8; e++)
                    mean[e] += p[s] * load(v, s * E + first + 8 * e, kind);
        else
            for (long s = 0; s < length; s++)
                for (long e = 0; e < n; e++)
                    mean[e] += p[s] * load(v, s * E + first + 8 * e, kind);
        for (long e = 0; e < n; e++)
            F8(out + first + 8 * e) = mean[e];
    }
}

#ifdef __AVX512VNNI__
/* The same for keys and values in int8 and E = 64: q in whole numbers, four positions at a time. */
static void one_head_of_int8(const float *q, const int8_t *k, const float *k_scale, const int8_t *v, const float *v_scale,
                             const float *hidden, float *p, float *out, long length)
{
    int16_t whole[64];
    float unit = whole_numbers(q, whole, 64);
    __m512i q0 = _mm512_loadu_si512(whole), q1 = _mm512_loadu_si512(whole + 32);
    for (long s = 0; s < length; s += 4) {
        __m256i dots[4];
        for (long i = 0; i < 4; i++) {
            const int8_t *key = k + 64 * (s + i < length ? s + i : s);
            __m512i a = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)key));
            __m512i b = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(key + 32)));
            a = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(_mm512_setzero_si512(), a, q0), b, q1);
            dots[i] = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
        }
        __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(dots[0], dots[1]), _mm256_hadd_epi32(dots[2], dots[3]));
        __m128 four = _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
        memcpy(p + s, &four, sizeof(float) * (length - s < 4 ? length - s : 4));
    }
    softmax(p, k_scale, v_scale, hidden, length, unit / 8, INT8);
    __m512 mean[4] = {{0}};
    for (long s = 0; s < length; s++) {
        __m512 weight = _mm512_set1_ps(p[s]);
        for (long i = 0; i < 4; i++) {
            __m512i value = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(v + 64 * s + 16 * i)));
            mean[i] = _mm512_fmadd_ps(weight, _mm512_cvtepi32_ps(value), mean[i]);
        }
    }
    for (long i = 0; i < 4; i++)
        _mm512_storeu_ps(out + 16 * i, mean[i]);
}
#endif

/* Stores the newest key and value, if there are any, at position length - 1, and attends from q to all `length`.
   q, k_new, v_new: rows of `stride` numbers, one an item, of heads x E; k, v (batch, heads, steps, E) and their
   scales (batch, heads, steps); hidden (batch, steps) is added to the scores, or NULL; scores: room for
   (batch, heads, steps); out (batch, heads, E). E is a multiple of 8. */
void attend(int kind, const float *q, const float *k_new, const float *v_new, long stride,
            char *k, float *k_scale, char *v, float *v_scale, const float *hidden, float *scores, float *out,
            long batch, long heads, long length, long steps, long E)
{
    #pragma omp parallel for schedule(static)
    for (long i = 0; i < batch * heads; i++) {
        long row = i / heads * stride + i % heads * E, data = i * steps * E * BYTES[kind];
        float *ks = k_scale + i * steps, *vs = v_scale + i * steps, *p = scores + i * steps;
        const float *h = hidden ? hidden + i / heads * steps : 0;
        if (k_new) {
            store(k_new + row, k + data, ks, length - 1, E, kind);
            store(v_new + row, v + data, vs, length - 1, E, kind);
        }
        if (kind == INT8 && E == 64)
#ifdef __AVX512VNNI__
            one_head_of_int8(q + row, (void *)(k + data), ks, (void *)(v + data), vs, h, p, out + i * E, length);
#else
            one_head(q + row, k + data, ks, v + data, vs, h, p, out + i * E, length, 64, INT8);
#endif
        else if (kind == INT8)
            one_head(q + row, k + data, ks, v + data, vs, h, p, out + i * E, length, E, INT8);
        else if (kind == BFLOAT16)
            one_head(q + row, k + data, ks, v + data, vs, h, p, out + i * E, length, E, BFLOAT16);
        else
            one_head(q + row, k + data, ks, v + data, vs, h, p, out + i * E, length, E, FLOAT32);
    }
}

/* The tensors of a layer, in the order in which lm.py lists them; those of cross-attention may be missing. */
struct layer {
    const float *norm1, *norm1_bias;
    const char *qkv; const float *qkv_scale;
    const char *out; const float *out_scale;
    char *k; float *k_scale;
    char *v; float *v_scale;
    const float *norm2, *norm2_bias;
    const char *ff1; const float *ff1_scale;
    const char *ff2; const float *ff2_scale;
    const float *norm_cross, *norm_cross_bias;
    const char *cross_q; const float *cross_q_scale;
    const char *cross_out; const float *cross_out_scale;
    char *cross_k, *cross_v;    /* (batch, heads, cross_length, E) in float32 */
};

/* x (batch, heads * E) through N layers, in place. */
void decode(int kind, const struct layer *layer, long N, float *x, const float *hidden, const float *cross_hidden,
            float *scores, long batch, long heads, long length, long room, long E, long wide, long cross_length)
{
    long D = heads * E;
    float qkv[batch * 3 * D], heard[batch * D], between[batch * wide];
    for (; N--; layer++) {
        product(kind, layer->qkv, layer->qkv_scale, x, layer->norm1, layer->norm1_bias, 0, 0, qkv, 3 * D, D, batch);
        attend(kind, qkv, qkv + D, qkv + 2 * D, 3 * D, layer->k, layer->k_scale, layer->v, layer->v_scale, hidden,
               scores, heard, batch, heads, length, room, E);
        product(kind, layer->out, layer->out_scale, heard, 0, 0, 0, x, x, D, D, batch);
        if (layer->cross_k) {
            product(kind, layer->cross_q, layer->cross_q_scale, x, layer->norm_cross, layer->norm_cross_bias, 0, 0, qkv, D, D, batch);
            attend(FLOAT32, qkv, 0, 0, D, layer->cross_k, 0, layer->cross_v, 0, cross_hidden, scores, heard, batch,
                   heads, cross_length, cross_length, E);
            product(kind, layer->cross_out, layer->cross_out_scale, heard, 0, 0, 0, x, x, D, D, batch);
        }
        product(kind, layer->ff1, layer->ff1_scale, x, layer->norm2, layer->norm2_bias, 1, 0, between, wide, D, batch);
        product(kind, layer->ff2, layer->ff2_scale, between, 0, 0, 0, x, x, D, wide, batch);
    }
}

/* --- training: D-Adaptation (train.DAdaptAdam, which has the formulas), each weight read and written once a pass --- */

enum { BLOCK = 16384 };     /* weights that are added up by themselves: sums do not depend on the number of threads */

/* The moments of n weights; adds sum(g^2 / a), sum(s^2 / a), sum|s| to sums (3). */
void dadapt_moments(const float *restrict g, float *restrict m, float *restrict v, float *restrict s, long n,
                    double lam, double b1, double b2, double eps, float *sums)
{
    long blocks = (n + BLOCK - 1) / BLOCK;
    float found[blocks][3], l = lam, c1 = 1 - b1, c2 = 1 - b2, e = eps;
    #pragma omp parallel for schedule(static)
    for (long block = 0; block < blocks; block++) {
        float g_sum = 0, s_sum = 0, s_size = 0;
        long end = block + 1 < blocks ? (block + 1) * BLOCK : n;
        for (long i = block * BLOCK; i < end; i++) {
            m[i] += c1 * (l * g[i] - m[i]);
            s[i] += c2 * (l * g[i] - s[i]);
            v[i] += c2 * (g[i] * g[i] - v[i]);
            float inverse = 1 / (sqrtf(v[i]) + e);
            g_sum += g[i] * g[i] * inverse;
            s_sum += s[i] * s[i] * inverse;
            s_size += fabsf(s[i]);
        }
        found[block][0] = g_sum, found[block][1] = s_sum, found[block][2] = s_size;
    }
    for (int k = 0; k < 3; k++) {
        double sum = sums[k];
        for (long block = 0; block < blocks; block++)
            sum += found[block][k];
        sums[k] = sum;
    }
}

/* weights <- (1 - decay) weights - m / a */
void dadapt_step(float *restrict w, const float *restrict m, const float *restrict v, long n, double decay, double eps)
{
    float shrink = decay, e = eps;
    #pragma omp parallel for simd schedule(static)
    for (long i = 0; i < n; i++)
        w[i] = fmaf(-shrink, w[i], w[i]) - m[i] / (sqrtf(v[i]) + e);   /* early on 1 - decay would round to 1 */
}
