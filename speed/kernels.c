/* One step of decoding on the CPU. It reads a lot of memory once and computes little with it, in two loops,

       product   y = x W^T for a few rows x, weights in int8, bfloat16 or float32
       attend    attention from one position to all before it, keys and values stored likewise
       decode    the layers of the transformer, made of the two: Layer.forward of lm.py without its overhead

   and, for training, in the step of the optimizer at the end. Compiled and loaded by kernels.py, with the
   plain way beside it as the fallback and, in tests/test_speed.py, as the oracle.

   Arithmetic is in float32. int8 weights are multiplied by rows x in whole numbers of 15 bits where the
   processor has instructions for it. Sums are added up in the order in which they are written here, whatever
   the compiler: a row alone gives the same numbers as in a batch. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define AVX2
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { INT8, BFLOAT16, FLOAT32 };
static const long BYTES[] = {1, 2, 4};

#define INLINE static inline __attribute__((always_inline))

/* --- threads --------------------------------------------------------------------------------------------
   Those of the OpenMP runtime that torch has loaded, GNU's or LLVM's, called by hand: so any compiler will do,
   with or without OpenMP of its own, and no second runtime with threads of its own comes into the process. */

static void run_alone(void (*work)(void *), void *job, unsigned threads, unsigned flags)
{
    (void)threads, (void)flags;
    work(job);
}
static int zero(void) { return 0; }
static int one(void) { return 1; }

static void (*run_threads)(void (*)(void *), void *, unsigned, unsigned) = run_alone;     /* GOMP_parallel */
static int (*thread_num)(void) = zero, (*num_threads)(void) = one;                         /* omp_get_... */

void use_threads(void *parallel, void *get_thread_num, void *get_num_threads)
{
    run_threads = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    thread_num = (int (*)(void))get_thread_num;
    num_threads = (int (*)(void))get_num_threads;
}

struct part { long first, end; };

/* What the thread that asks does of n pieces. */
static struct part my_part(long n)
{
    long t = thread_num(), threads = num_threads();
    return (struct part){n * t / threads, n * (t + 1) / threads};
}

/* --- eight numbers at once ------------------------------------------------------------------------------ */

typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));
#define F8(pointer) (*(f8 *)(pointer))

/* Eight numbers from index i on, as float32. */
INLINE f8 load(const void *data, long i, int kind)
{
    if (kind == FLOAT32)
        return F8((const float *)data + i);
#ifdef AVX2
    if (kind == INT8) {
        __m128i bytes = _mm_loadl_epi64((const void *)((const int8_t *)data + i));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    __m128i upper = _mm_loadu_si128((const void *)((const uint16_t *)data + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16));
#elif defined(__SSE2__)
    union { __m128 four[2]; f8 eight; } y;
    if (kind == INT8) {     /* each byte in the upper half of a word, which is then shifted down */
        __m128i bytes = _mm_loadl_epi64((const void *)((const int8_t *)data + i));
        __m128i words = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
        y.four[0] = _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(words, words), 16));
        y.four[1] = _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpackhi_epi16(words, words), 16));
    } else {
        __m128i upper = _mm_loadu_si128((const void *)((const uint16_t *)data + i));
        y.four[0] = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), upper));
        y.four[1] = _mm_castsi128_ps(_mm_unpackhi_epi16(_mm_setzero_si128(), upper));
    }
    return y.eight;
#elif defined(__ARM_NEON)
    union { float32x4_t four[2]; f8 eight; } y;
    if (kind == INT8) {
        int16x8_t words = vmovl_s8(vld1_s8((const int8_t *)data + i));
        y.four[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
        y.four[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(words)));
    } else {
        uint16x8_t upper = vld1q_u16((const uint16_t *)data + i);
        y.four[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(upper), 16));
        y.four[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(upper), 16));
    }
    return y.eight;
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

INLINE f8 all(float x)
{
    return (f8){x, x, x, x, x, x, x, x};
}

INLINE float total(f8 a)
{
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

/* Four totals at once. */
INLINE void totals(const f8 *a, float *y)
{
#ifdef AVX2
    __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
    for (int i = 0; i < 4; i++)
        y[i] = total(a[i]);
#endif
}

INLINE f8 larger(f8 a, f8 b)
{
#ifdef AVX2
    return _mm256_max_ps(a, b);
#else
    i8 first = a > b;
    return (f8)((first & (i8)a) | (~first & (i8)b));
#endif
}

INLINE f8 root(f8 x)
{
#ifdef AVX2
    return _mm256_sqrt_ps(x);
#else
    for (int j = 0; j < 8; j++)
        x[j] = sqrtf(x[j]);
    return x;
#endif
}

/* The largest of n numbers, and of `least`. */
static float largest(const float *x, long n, float least)
{
    f8 top = all(least);
    long i = 0;
    for (; i + 8 <= n; i += 8)
        top = larger(top, F8(x + i));
    for (int j = 0; j < 8; j++)
        least = top[j] > least ? top[j] : least;
    for (; i < n; i++)
        least = x[i] > least ? x[i] : least;
    return least;
}

/* The largest absolute value of n numbers, a multiple of 8, and of `least`. */
static float largest_size(const float *x, long n, float least)
{
    f8 top = all(least);
    for (long i = 0; i < n; i += 8)
        top = larger(top, larger(F8(x + i), -F8(x + i)));
    for (int j = 0; j < 8; j++)
        least = top[j] > least ? top[j] : least;
    return least;
}

/* The nearest whole numbers, of sizes up to 2^22: what is added pushes the fraction out of the number. */
INLINE i8 nearest(f8 x)
{
    f8 shifted = x + 12582912.0f;   /* 1.5 * 2^23 */
    return (i8)shifted - (i8)all(12582912.0f);
}

/* exp(x) for x <= 0, within 2 units of the last place; 0 below -87. */
INLINE f8 exponential(f8 x)
{
    i8 seen = x > all(-87);
    x = (f8)((i8)x & seen);
    i8 powers = nearest(x * 1.44269504f);
    f8 n = __builtin_convertvector(powers, f8);
    f8 rest = x - n * 0.693359375f + n * 2.12194440e-4f;    /* x = n log(2) + rest; log(2) in two parts */
    f8 y = rest * 1.9875691500e-4f + 1.3981999507e-3f;      /* Cephes' expf */
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return (f8)(((i8)y + (powers << 23)) & seen);
}

/* x Phi(x) with the error function as a quotient of polynomials (Eigen's), right to 4e-7. */
INLINE f8 gelu_of(f8 x)
{
    f8 z = x * 0.70710678f;
    z = larger(-larger(-z, all(-4)), all(-4));      /* beyond 4 it is 1 */
    f8 s = z * z;
    f8 p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    f8 q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * 0.5f * (1 + z * p / q);
}

/* --- int8 times whole numbers ---------------------------------------------------------------------------
   x in whole numbers up to TOP, so that a product and the sum of a pair of them are one or two instructions:

       WIDE            columns that one `widen` takes
       FITS            columns that can be added up before a sum may be too large for 32 bits
       pack            eight whole numbers into their places among x
       widen           WIDE weights, as the products want them
       multiply_add    sums + weights x
       as_float        sums -> eight sums in float32 */

enum { TOP = 127 * 256 };

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WHOLE "AVX-512 VNNI"
typedef __m512i wide, sums;
enum { WIDE = 32, FITS = 8192 };

INLINE wide widen(const int8_t *w)
{
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)w));
}

INLINE sums multiply_add(sums sum, wide weights, const int16_t *x)
{
    return _mm512_dpwssd_epi32(sum, weights, _mm512_loadu_si512(x));
}

INLINE f8 as_float(sums sum)
{
    __m256i first = _mm512_castsi512_si256(sum), second = _mm512_extracti64x4_epi64(sum, 1);
    return _mm256_cvtepi32_ps(first) + _mm256_cvtepi32_ps(second);
}

#elif defined(AVX2)
#ifdef __AVXVNNI__
#define WHOLE "AVX-VNNI"
#else
#define WHOLE "AVX2"
#endif
typedef __m256i wide, sums;
enum { WIDE = 16, FITS = 4096 };

INLINE wide widen(const int8_t *w)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)w));
}

INLINE sums multiply_add(sums sum, wide weights, const int16_t *x)
{
    __m256i from = _mm256_loadu_si256((const void *)x);
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, weights, from);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, from));
#endif
}

INLINE f8 as_float(sums sum)
{
    return _mm256_cvtepi32_ps(sum);
}

#elif defined(__SSE2__)
#define WHOLE "SSE2"
typedef __m128i wide, sums;
enum { WIDE = 8, FITS = 2048 };

INLINE wide widen(const int8_t *w)
{
    __m128i bytes = _mm_loadl_epi64((const void *)w);
    return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}

INLINE sums multiply_add(sums sum, wide weights, const int16_t *x)
{
    return _mm_add_epi32(sum, _mm_madd_epi16(weights, _mm_loadu_si128((const void *)x)));
}

INLINE f8 as_float(sums sum)
{
    union { __m128 four[2]; f8 eight; } y = {{_mm_cvtepi32_ps(sum), _mm_setzero_ps()}};
    return y.eight;
}

#elif defined(__ARM_FEATURE_DOTPROD)
#define WHOLE "NEON with dot products"
typedef int8x16_t wide;
typedef struct { int32x4_t upper, lower; } sums;    /* x = 256 upper + lower */
enum { WIDE = 16, FITS = 65536 };

INLINE wide widen(const int8_t *w)
{
    return vld1q_s8(w);
}

INLINE sums multiply_add(sums sum, wide weights, const int16_t *x)
{
    sum.upper = vdotq_s32(sum.upper, weights, vld1q_s8((const int8_t *)x));
    sum.lower = vdotq_s32(sum.lower, weights, vld1q_s8((const int8_t *)x + 16));
    return sum;
}

INLINE f8 as_float(sums sum)
{
    union { float32x4_t four[2]; f8 eight; } y;
    y.four[0] = vmulq_n_f32(vcvtq_f32_s32(sum.upper), 256);
    y.four[1] = vcvtq_f32_s32(sum.lower);
    return y.eight;
}
#endif

#ifdef WHOLE
/* Eight whole numbers n, those from index i on, into x. */
INLINE void pack(i8 n, int16_t *x, long i)
{
#ifdef __SSE2__
    union { i8 eight; __m128i four[2]; } y = {n};
    _mm_storeu_si128((void *)(x + i), _mm_packs_epi32(y.four[0], y.four[1]));
#else   /* sixteen upper halves, sixteen lower ones */
    int8_t *upper = (int8_t *)x + 2 * (i / WIDE * WIDE) + i % WIDE, *lower = upper + WIDE;
    for (int j = 0; j < 8; j++) {
        lower[j] = (int8_t)n[j];
        upper[j] = (n[j] - lower[j]) / 256;
    }
#endif
}

/* n numbers, a multiple of WIDE, as whole ones -> what 1 stands for */
static float whole_numbers(const float *x, int16_t *whole, long n)
{
    float top = largest_size(x, n, 1e-30f);
    for (long i = 0; i < n; i += 8)
        pack(nearest(F8(x + i) * (TOP / top)), whole, i);
    return top / TOP;
}

/* Four rows of w times N (1 or 2) rows of x. y (2, 4). */
INLINE void four_rows_of_int8(const int8_t *w, const int16_t *x, float *y, long columns, int N)
{
    f8 found[2][4] = {{{0}}};
    for (long first = 0; first < columns; first += FITS) {
        long end = first + FITS < columns ? first + FITS : columns;
        sums sum[2][4] = {{{0}}};
        for (long c = first; c < end; c += WIDE) {
            for (int line = 0; line < 4 * WIDE; line += 64)     /* rows that come next */
                __builtin_prefetch(w + 4 * (columns + c) + 1024 + line);
            for (int i = 0; i < 4; i++) {
                wide weights = widen(w + i * columns + c);
                for (int b = 0; b < N; b++)
                    sum[b][i] = multiply_add(sum[b][i], weights, x + b * columns + c);
            }
        }
        for (int b = 0; b < N; b++)
            for (int i = 0; i < 4; i++)
                found[b][i] += as_float(sum[b][i]);
    }
    for (int b = 0; b < N; b++)
        totals(found[b], y + 4 * b);
}
#endif

/* How int8 weights are multiplied; kernels.py tells whom that concerns. */
const char *instructions(void)
{
#ifdef WHOLE
    return WHOLE;
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "none";
#endif
}

/* --- products ------------------------------------------------------------------------------------------- */

/* Four rows of w times N (1 or 2) rows of x: sums that do not wait for each other. y (2, 4). */
INLINE void four_rows(const char *w, const float *x, float *y, long columns, int kind, int N)
{
    f8 sum[2][4] = {{{0}}};
    for (long c = 0; c < columns; c += 8) {
        __builtin_prefetch(w + 4 * (columns + c) * BYTES[kind] + 1024);  /* rows that come next */
        for (int i = 0; i < 4; i++) {
            f8 weights = load(w, i * columns + c, kind);
            for (int b = 0; b < N; b++)
                sum[b][i] += weights * F8(x + b * columns + c);
        }
    }
    for (int b = 0; b < N; b++)
        totals(sum[b], y + 4 * b);
}

/* Layer norm of each row of x, in place. columns is a multiple of 8. */
static void normalise(float *x, const float *weight, const float *bias, long columns, long batch)
{
    for (; batch--; x += columns) {
        f8 sum = {0}, squares = {0};
        for (long c = 0; c < columns; c += 8)
            sum += F8(x + c);
        float mean = total(sum) / columns;
        for (long c = 0; c < columns; c += 8) {
            f8 centered = F8(x + c) - mean;
            squares += centered * centered;
        }
        float factor = 1 / sqrtf(total(squares) / columns + 1e-5f);
        for (long c = 0; c < columns; c += 8)
            F8(x + c) = (F8(x + c) - mean) * factor * F8(weight + c) + F8(bias + c);
    }
}

struct product {
    int kind, gelu;
    const char *w;
    const float *scale, *x, *add;
    const int16_t *whole;       /* x in whole numbers, and what 1 stands for in each row */
    const float *units;
    float *y;
    long rows, columns, batch;
};

/* A thread's part of the rows of a product. */
static void product_part(void *job)
{
    struct product p = *(struct product *)job;
    struct part part = my_part(p.rows / 4);
    for (long r = 4 * part.first; r < 4 * part.end; r += 4)
        for (long b = 0; b < p.batch; b += 2) {
            const char *w = p.w + r * p.columns * BYTES[p.kind];
            const float *x = p.x + b * p.columns;
            float y[8] = {0};
            int two = b + 1 < p.batch;
            if (p.kind == INT8 && p.whole) {
#ifdef WHOLE
                const int16_t *whole = p.whole + b * p.columns;
                two ? four_rows_of_int8((void *)w, whole, y, p.columns, 2)
                    : four_rows_of_int8((void *)w, whole, y, p.columns, 1);
#endif
            } else if (p.kind == INT8)
                two ? four_rows(w, x, y, p.columns, INT8, 2) : four_rows(w, x, y, p.columns, INT8, 1);
            else if (p.kind == BFLOAT16)
                two ? four_rows(w, x, y, p.columns, BFLOAT16, 2) : four_rows(w, x, y, p.columns, BFLOAT16, 1);
            else
                two ? four_rows(w, x, y, p.columns, FLOAT32, 2) : four_rows(w, x, y, p.columns, FLOAT32, 1);
            for (int n = 0; n <= two; n++) {
                float unit = p.whole ? p.units[b + n] : 1;
                for (int i = 0; i < 4; i++)
                    y[4 * n + i] *= unit * (p.scale ? p.scale[r + i] : 1);
                for (int i = 0; p.add && i < 4; i++)
                    y[4 * n + i] += p.add[(b + n) * p.rows + r + i];
            }
            if (p.gelu)
                F8(y) = gelu_of(F8(y));
            for (int n = 0; n <= two; n++)
                memcpy(p.y + (b + n) * p.rows + r, y + 4 * n, 4 * sizeof(float));
        }
}

struct matrix { const char *w; const float *scale; };   /* (rows, columns), times scale (rows) if there is one */
struct norm { const float *weight, *bias; };            /* layer norm in front of a product, or NULLs */

static const struct norm NO_NORM = {0, 0};

/* y (batch, rows) = gelu(add + norm(x) W^T), x (batch, columns). norm, gelu and add (batch, rows), which may be
   y, can be missing. rows is a multiple of 4, columns of 8. */
static void multiply(int threads, int kind, struct matrix m, const float *x, struct norm norm, int gelu,
                     const float *add, float *y, long rows, long columns, long batch)
{
    struct product job = {kind, gelu, m.w, m.scale, x, add, 0, 0, y, rows, columns, batch};
    float *normed = 0;
    int16_t *whole = 0;
    float units[batch];
    if (norm.weight) {
        normed = malloc(batch * columns * sizeof *normed);
        memcpy(normed, x, batch * columns * sizeof *normed);
        normalise(normed, norm.weight, norm.bias, columns, batch);
        job.x = normed;
    }
#ifdef WHOLE
    if (kind == INT8 && columns % WIDE == 0) {
        whole = malloc(batch * columns * sizeof *whole);
        for (long b = 0; b < batch; b++)
            units[b] = whole_numbers(job.x + b * columns, whole + b * columns, columns);
    }
#endif
    job.whole = whole;
    job.units = units;
    run_threads(product_part, &job, threads, 0);
    free(normed);
    free(whole);
}

void product(int threads, int kind, const char *w, const float *scale, const float *x, float *y,
             long rows, long columns, long batch)
{
    multiply(threads, kind, (struct matrix){w, scale}, x, NO_NORM, 0, 0, y, rows, columns, batch);
}

/* --- attention ------------------------------------------------------------------------------------------ */

/* x (E) into row `at` of data: int8 with a scale of its own, or rounded to bfloat16, or as it is. */
static void store(const float *x, void *data, float *scale, long at, long E, int kind)
{
    float top = largest_size(x, E, 1e-12f);
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
INLINE void softmax(float *p, const float *k_scale, const float *v_scale, const float *hidden, long length,
                    float unit, int kind)
{
    for (long s = 0; s < length; s++)
        p[s] = p[s] * ((kind == INT8 ? k_scale[s] : 1) * unit) + (hidden ? hidden[s] : 0);
    float top = largest(p, length, -3e38f);
    f8 sum = {0};
    for (long s = 0; s < length; s += 8) {
        long n = length - s < 8 ? length - s : 8;
        f8 score = {0}, weight = {0};
        memcpy(&score, p + s, n * sizeof(float));
        score = exponential(score - top);
        memcpy(&weight, &score, n * sizeof(float));     /* zero behind the end */
        sum += weight;
        memcpy(p + s, &weight, n * sizeof(float));
    }
    float factor = 1 / total(sum);
    for (long s = 0; s < length; s++)
        p[s] *= (kind == INT8 ? v_scale[s] : 1) * factor;
}

/* One head: q (E) to keys and values (length, E); p is room for the scores. */
INLINE void one_head(const float *q, const void *k, const float *k_scale, const void *v, const float *v_scale,
                     const float *hidden, float *p, float *out, long length, long E, int kind)
{
    float unit = 1 / sqrtf(E);
#ifdef WHOLE
    if (kind == INT8 && E == 64) {      /* q in whole numbers, four positions at a time */
        int16_t whole[64];
        unit *= whole_numbers(q, whole, 64);
        for (long s = 0; s < length; s += 4) {
            f8 dots[4];
            float four[4];
            for (long i = 0; i < 4; i++) {
                const int8_t *key = (const int8_t *)k + 64 * (s + i < length ? s + i : s);
                sums dot = {0};
                for (long e = 0; e < 64; e += WIDE)
                    dot = multiply_add(dot, widen(key + e), whole + e);
                dots[i] = as_float(dot);
            }
            totals(dots, four);
            memcpy(p + s, four, sizeof(float) * (length - s < 4 ? length - s : 4));
        }
    } else
#endif
        for (long s = 0; s < length; s++) {
            f8 dot = {0};
            for (long e = 0; e < E; e += 8)
                dot += F8(q + e) * load(k, s * E + e, kind);
            p[s] = total(dot);
        }
    softmax(p, k_scale, v_scale, hidden, length, unit, kind);
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

struct attention {
    int kind;
    const float *q, *k_new, *v_new;
    long stride;
    char *k; float *k_scale;
    char *v; float *v_scale;
    const float *hidden;
    float *scores, *out;
    long batch, heads, length, steps, E;
};

/* A thread's part of the heads of all items. */
static void attend_part(void *job)
{
    struct attention a = *(struct attention *)job;
    struct part part = my_part(a.batch * a.heads);
    for (long i = part.first; i < part.end; i++) {
        long row = i / a.heads * a.stride + i % a.heads * a.E, data = i * a.steps * a.E * BYTES[a.kind];
        float *ks = a.k_scale + i * a.steps, *vs = a.v_scale + i * a.steps, *p = a.scores + i * a.steps;
        const float *q = a.q + row, *h = a.hidden ? a.hidden + i / a.heads * a.steps : 0;
        char *k = a.k + data, *v = a.v + data;
        float *out = a.out + i * a.E;
        if (a.k_new) {
            store(a.k_new + row, k, ks, a.length - 1, a.E, a.kind);
            store(a.v_new + row, v, vs, a.length - 1, a.E, a.kind);
        }
        if (a.kind == INT8 && a.E == 64)
            one_head(q, k, ks, v, vs, h, p, out, a.length, 64, INT8);
        else if (a.kind == INT8)
            one_head(q, k, ks, v, vs, h, p, out, a.length, a.E, INT8);
        else if (a.kind == BFLOAT16)
            one_head(q, k, ks, v, vs, h, p, out, a.length, a.E, BFLOAT16);
        else
            one_head(q, k, ks, v, vs, h, p, out, a.length, a.E, FLOAT32);
    }
}

/* Stores the newest key and value, if there are any, at position length - 1, and attends from q to all
   `length`. q, k_new, v_new: rows of `stride` numbers, one an item, of heads x E; k, v (batch, heads, steps, E)
   and their scales (batch, heads, steps); hidden (batch, steps) is added to the scores, or NULL; scores: room
   for (batch, heads, steps); out (batch, heads, E). E is a multiple of 8. */
void attend(int threads, int kind, const float *q, const float *k_new, const float *v_new, long stride,
            char *k, float *k_scale, char *v, float *v_scale, const float *hidden, float *scores, float *out,
            long batch, long heads, long length, long steps, long E)
{
    struct attention job = {kind, q, k_new, v_new, stride, k, k_scale, v, v_scale, hidden, scores, out,
                            batch, heads, length, steps, E};
    run_threads(attend_part, &job, threads, 0);
}

/* --- the transformer ------------------------------------------------------------------------------------ */

/* The tensors of a layer, in the order in which decoding.py lists them; cross-attention's may be missing. */
struct layer {
    struct norm norm1;
    struct matrix qkv, out;
    char *k; float *k_scale;
    char *v; float *v_scale;
    struct norm norm2;
    struct matrix ff1, ff2;
    struct norm norm_cross;
    struct matrix cross_q, cross_out;
    char *cross_k, *cross_v;    /* (batch, heads, cross_length, E) in float32 */
};

/* x (batch, heads * E) through N layers, in place. */
void decode(int threads, int kind, const struct layer *layer, long N, float *x, const float *hidden,
            const float *cross_hidden, float *scores, long batch, long heads, long length, long steps, long E,
            long wide, long cross_length)
{
    long D = heads * E;
    float *qkv = malloc(batch * (3 * D + D + wide) * sizeof *qkv);
    float *heard = qkv + batch * 3 * D, *between = heard + batch * D;
    for (; N--; layer++) {
        multiply(threads, kind, layer->qkv, x, layer->norm1, 0, 0, qkv, 3 * D, D, batch);
        attend(threads, kind, qkv, qkv + D, qkv + 2 * D, 3 * D, layer->k, layer->k_scale, layer->v,
               layer->v_scale, hidden, scores, heard, batch, heads, length, steps, E);
        multiply(threads, kind, layer->out, heard, NO_NORM, 0, x, x, D, D, batch);
        if (layer->cross_k) {
            multiply(threads, kind, layer->cross_q, x, layer->norm_cross, 0, 0, qkv, D, D, batch);
            attend(threads, FLOAT32, qkv, 0, 0, D, layer->cross_k, 0, layer->cross_v, 0,
                   cross_hidden, scores, heard, batch, heads, cross_length, cross_length, E);
            multiply(threads, kind, layer->cross_out, heard, NO_NORM, 0, x, x, D, D, batch);
        }
        multiply(threads, kind, layer->ff1, x, layer->norm2, 1, 0, between, wide, D, batch);
        multiply(threads, kind, layer->ff2, between, NO_NORM, 0, x, x, D, wide, batch);
    }
    free(qkv);
}

/* --- training: D-Adaptation -----------------------------------------------------------------------------
   train.DAdaptAdam has the formulas. Each weight is read and written once a pass. */

enum { BLOCK = 16384 };     /* weights added up by themselves: sums do not depend on the number of threads */

struct moments {
    const float *g;
    float *m, *v, *s;
    long n;
    float lam, c1, c2, eps;
    float (*found)[3];      /* of each block */
};

/* The moments of eight weights; adds to three sums. */
INLINE void eight_moments(const struct moments *t, const float *g_from, float *m, float *v, float *s, f8 *sum)
{
    f8 g = F8(g_from);
    F8(m) += t->c1 * (t->lam * g - F8(m));
    F8(s) += t->c2 * (t->lam * g - F8(s));
    F8(v) += t->c2 * (g * g - F8(v));
    f8 inverse = 1 / (root(F8(v)) + t->eps);
    sum[0] += g * g * inverse;
    sum[1] += F8(s) * F8(s) * inverse;
    sum[2] += larger(F8(s), -F8(s));
}

static void moments_part(void *job)
{
    struct moments t = *(struct moments *)job;
    struct part part = my_part((t.n + BLOCK - 1) / BLOCK);
    for (long block = part.first; block < part.end; block++) {
        f8 sum[3] = {{0}};
        long i = block * BLOCK, end = (block + 1) * BLOCK < t.n ? (block + 1) * BLOCK : t.n;
        for (; i + 8 <= end; i += 8)
            eight_moments(&t, t.g + i, t.m + i, t.v + i, t.s + i, sum);
        if (i < end) {      /* less than eight at the end of a tensor: zeros add nothing */
            long size = (end - i) * sizeof(float);
            float g[8] = {0}, m[8] = {0}, v[8] = {0}, s[8] = {0};
            memcpy(g, t.g + i, size), memcpy(m, t.m + i, size);
            memcpy(v, t.v + i, size), memcpy(s, t.s + i, size);
            eight_moments(&t, g, m, v, s, sum);
            memcpy(t.m + i, m, size), memcpy(t.v + i, v, size), memcpy(t.s + i, s, size);
        }
        for (int k = 0; k < 3; k++)
            t.found[block][k] = total(sum[k]);
    }
}

/* The moments of n weights; adds sum(g^2 / a), sum(s^2 / a), sum|s| to sums (3). */
void dadapt_moments(int threads, const float *g, float *m, float *v, float *s, long n,
                    double lam, double b1, double b2, double eps, float *sums)
{
    long blocks = (n + BLOCK - 1) / BLOCK;
    struct moments job = {g, m, v, s, n, lam, 1 - b1, 1 - b2, eps, malloc(blocks * sizeof *job.found)};
    run_threads(moments_part, &job, threads, 0);
    for (int k = 0; k < 3; k++) {
        double sum = sums[k];
        for (long block = 0; block < blocks; block++)
            sum += job.found[block][k];
        sums[k] = sum;
    }
    free(job.found);
}

struct step {
    float *w;
    const float *m, *v;
    long n;
    float shrink, eps;
};

static void step_part(void *job)
{
    struct step t = *(struct step *)job;
    struct part part = my_part(t.n);
    float *restrict w = t.w;
    for (long i = part.first; i < part.end; i++)
        w[i] = w[i] - t.shrink * w[i] - t.m[i] / (sqrtf(t.v[i]) + t.eps);   /* 1 - shrink may round to 1 */
}

/* weights <- (1 - decay) weights - m / a */
void dadapt_step(int threads, float *w, const float *m, const float *v, long n, double decay, double eps)
{
    struct step job = {w, m, v, n, decay, eps};
    run_threads(step_part, &job, threads, 0);
}
