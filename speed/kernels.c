/* One step of decoding on the CPU. It reads a lot of memory once and computes little with it, in two loops,

       product   y = x W^T for a few rows x, weights in int4, int8, bfloat16 or float32
       attend    attention from one position to all before it, keys and values stored likewise
       decode    the layers of the transformer, made of the two: Layer.forward of lm.py without its overhead

   and, for training, in the step of the optimizer at the end. Compiled and loaded by kernels.py, with the
   plain way beside it as the fallback and, in tests/test_speed.py, as the oracle.

   Arithmetic is in float32, but for int8 weights: there x is rounded to whole numbers of 16 bits, and their
   products with the weights are added up exactly. Sums in float32 are added up in the order in which they are
   written here, whatever the compiler. So a row alone gives the same numbers as in a batch. Weights in int4
   become int8 on the way, by a table (`unpack`).

       processor                       int8 weights                                    LANES (float32 at once)
       x86, AVX-512 VNNI or AVX-VNNI   bytes: vpdpbusd, 32 weights by half of x each   8
       x86, AVX2                       words: vpmaddwd, 16 weights                     8
       x86, others                     words: pmaddwd, 8 weights                       4
       ARM with dot products           bytes: sdot, 16 weights by half of x each       4
       ARM, others                     words: smlal, 8 weights                         4
       any other                       plain C, 4 weights                              4

   "Words" are products of 16 bits by 16. "Bytes" are products of 8 bits by 8: x is then 256 upper + lower,
   and each of the two has a sum. First come these rows, one after the other, with the same functions in each;
   what follows is C for all of them. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { INT8, BFLOAT16, FLOAT32, INT4 };
static const long BYTES[] = {1, 2, 4};

#if defined(__AVX2__) && defined(__FMA__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define FLOATS(pointer) (*(floats *)(pointer))

/* --- what differs between processors --------------------------------------------------------------------

       from_int8, from_bfloat16    LANES numbers in memory, as float32
       larger, root                of each of the numbers
       four_totals                 the sum of the numbers in each of four

   and for int8 weights times a row x in whole numbers:

       PARTS           1 for words, 2 for bytes
       WIDE            columns that `widen` and multiply_add take at once
       HOLDS           columns times the largest whole number up to which no sum exceeds 32 bits
       pack            LANES whole numbers into x, from column i on
       widen           weights as multiply_add needs them
       multiply_add    sum + weights x, for one part of x

   HOLDS: with words, each of LANES sums has columns / LANES products of at most 128 times the largest number.
   With bytes it has columns / LANES products of at most 255 * 128, which is enough for 260,000 columns. */

enum { TOP = 127 * 256 };       /* the largest whole number, where HOLDS allows it */

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

INLINE floats from_int8(const int8_t *from)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
}

INLINE floats from_bfloat16(const uint16_t *from)
{
    __m256i upper = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(upper, 16));
}

INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE floats root(floats x) { return _mm256_sqrt_ps(x); }

INLINE void four_totals(const floats *a, float *y)
{
    __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__)
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define INSTRUCTIONS "AVX-512 VNNI"
#define DOT _mm256_dpbusd_epi32
#else
#define INSTRUCTIONS "AVX-VNNI"
#define DOT _mm256_dpbusd_avx_epi32
#endif
typedef __m256i wide;
enum { PARTS = 2, WIDE = 32, HOLDS = INT32_MAX };

/* One factor of DOT has no sign: w + 128. What that adds is in `surplus` below. */
INLINE wide widen(const int8_t *w)
{
    return _mm256_xor_si256(_mm256_loadu_si256((const void *)w), _mm256_set1_epi8(-128));
}

INLINE ints multiply_add(ints sum, wide weights, const int16_t *x)
{
    return (ints)DOT((__m256i)sum, weights, _mm256_loadu_si256((const void *)x));
}

/* Per WIDE columns the upper halves, then the lower ones. */
INLINE void pack(ints n, int16_t *x, long i)
{
    int8_t *upper = (int8_t *)(x + i / WIDE * WIDE) + i % WIDE, *lower = upper + WIDE;
    __m256i first = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                     0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    ints up = (n + 128) >> 8;       /* lower is from -128 to 127 */
    __m256i halves = _mm256_shuffle_epi8((__m256i)((n & 255) | up << 8), first);
    __m128i four = _mm256_castsi256_si128(halves), more = _mm256_extracti128_si256(halves, 1);
    __m128i all = _mm_unpacklo_epi32(four, more);       /* eight lower halves, eight upper ones */
    _mm_storel_epi64((void *)lower, all);
    _mm_storel_epi64((void *)upper, _mm_srli_si128(all, 8));
}

#else
#define INSTRUCTIONS "AVX2"
typedef __m256i wide;
enum { PARTS = 1, WIDE = 16, HOLDS = LANES * (INT32_MAX / 128) };

INLINE wide widen(const int8_t *w)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)w));
}

INLINE ints multiply_add(ints sum, wide weights, const int16_t *x)
{
    return sum + (ints)_mm256_madd_epi16(weights, _mm256_loadu_si256((const void *)x));
}

INLINE void pack(ints n, int16_t *x, long i)
{
    __m128i four = _mm256_castsi256_si128((__m256i)n), more = _mm256_extracti128_si256((__m256i)n, 1);
    _mm_storeu_si128((void *)(x + i), _mm_packs_epi32(four, more));
}
#endif

#elif defined(__SSE2__)
#include <emmintrin.h>
#define INSTRUCTIONS "SSE2"
typedef __m128i wide;
enum { PARTS = 1, WIDE = 8, HOLDS = LANES * (INT32_MAX / 128) };

/* Bytes become words, or words ints, in the upper half, and are then shifted down. */
INLINE floats from_int8(const int8_t *from)
{
    int32_t four;
    memcpy(&four, from, 4);
    __m128i bytes = _mm_cvtsi32_si128(four), words = _mm_unpacklo_epi8(bytes, bytes);
    return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(words, words), 24));
}

INLINE floats from_bfloat16(const uint16_t *from)
{
    __m128i upper = _mm_loadl_epi64((const void *)from);
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), upper));
}

INLINE floats larger(floats a, floats b) { return _mm_max_ps(a, b); }
INLINE floats root(floats x) { return _mm_sqrt_ps(x); }

INLINE void four_totals(const floats *a, float *y)
{
    __m128 b[4] = {a[0], a[1], a[2], a[3]};
    _MM_TRANSPOSE4_PS(b[0], b[1], b[2], b[3]);
    _mm_storeu_ps(y, _mm_add_ps(_mm_add_ps(b[0], b[2]), _mm_add_ps(b[1], b[3])));
}

INLINE wide widen(const int8_t *w)
{
    __m128i bytes = _mm_loadl_epi64((const void *)w);
    return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}

INLINE ints multiply_add(ints sum, wide weights, const int16_t *x)
{
    return sum + (ints)_mm_madd_epi16(weights, _mm_loadu_si128((const void *)x));
}

INLINE void pack(ints n, int16_t *x, long i)
{
    _mm_storel_epi64((void *)(x + i), _mm_packs_epi32((__m128i)n, (__m128i)n));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")      /* gcc would copy every sum twice */
#endif
#include <arm_neon.h>

INLINE floats from_int8(const int8_t *from)
{
    int32_t four;
    memcpy(&four, from, 4);
    int16x8_t words = vmovl_s8(vcreate_s8((uint32_t)four));
    return (floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
}

INLINE floats from_bfloat16(const uint16_t *from) { return (floats)vshll_n_u16(vld1_u16(from), 16); }

INLINE floats larger(floats a, floats b) { return (floats)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE floats root(floats x) { return (floats)vsqrtq_f32((float32x4_t)x); }

INLINE void four_totals(const floats *a, float *y)
{
    float32x4_t two = vpaddq_f32((float32x4_t)a[0], (float32x4_t)a[1]);
    float32x4_t more = vpaddq_f32((float32x4_t)a[2], (float32x4_t)a[3]);
    vst1q_f32(y, vpaddq_f32(two, more));
}

#ifdef __ARM_FEATURE_DOTPROD
#define INSTRUCTIONS "NEON with dot products"
typedef int8x16_t wide;
enum { PARTS = 2, WIDE = 16, HOLDS = INT32_MAX };

INLINE wide widen(const int8_t *w) { return vld1q_s8(w); }

INLINE ints multiply_add(ints sum, wide weights, const int16_t *x)
{
    return (ints)vdotq_s32((int32x4_t)sum, weights, vld1q_s8((const int8_t *)x));
}

/* Per WIDE columns the upper halves, then the lower ones. */
INLINE void pack(ints n, int16_t *x, long i)
{
    int8_t *upper = (int8_t *)(x + i / WIDE * WIDE) + i % WIDE, *lower = upper + WIDE;
    int16x4_t words = vmovn_s32((int32x4_t)n), up = vmovn_s32((int32x4_t)((n + 128) >> 8));
    int8x8_t halves = vmovn_s16(vcombine_s16(words, up));
    memcpy(lower, &halves, 4);      /* from -128 to 127 */
    memcpy(upper, (char *)&halves + 4, 4);
}

#else
#define INSTRUCTIONS "NEON"
typedef int16x8_t wide;
enum { PARTS = 1, WIDE = 8, HOLDS = LANES * (INT32_MAX / 128) };

INLINE wide widen(const int8_t *w) { return vmovl_s8(vld1_s8(w)); }

INLINE ints multiply_add(ints sum, wide weights, const int16_t *x)
{
    int16x8_t from = vld1q_s16(x);
    int32x4_t first = vmlal_s16((int32x4_t)sum, vget_low_s16(weights), vget_low_s16(from));
    return (ints)vmlal_high_s16(first, weights, from);
}

INLINE void pack(ints n, int16_t *x, long i) { vst1_s16(x + i, vmovn_s32((int32x4_t)n)); }
#endif

#else   /* any other processor */
#define INSTRUCTIONS "none"
typedef ints wide;
enum { PARTS = 1, WIDE = LANES, HOLDS = LANES * (INT32_MAX / 128) };

INLINE floats from_int8(const int8_t *from) { return (floats){from[0], from[1], from[2], from[3]}; }

INLINE floats from_bfloat16(const uint16_t *from)
{
    return (floats)((ints){from[0], from[1], from[2], from[3]} << 16);
}

INLINE floats larger(floats a, floats b)
{
    ints first = a > b;
    return (floats)((first & (ints)a) | (~first & (ints)b));
}

INLINE floats root(floats x) { return (floats){sqrtf(x[0]), sqrtf(x[1]), sqrtf(x[2]), sqrtf(x[3])}; }

INLINE void four_totals(const floats *a, float *y)
{
    for (int i = 0; i < 4; i++)
        y[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
}

INLINE wide widen(const int8_t *w) { return (ints){w[0], w[1], w[2], w[3]}; }

INLINE ints multiply_add(ints sum, wide weights, const int16_t *x)
{
    return sum + weights * (ints){x[0], x[1], x[2], x[3]};
}

INLINE void pack(ints n, int16_t *x, long i)
{
    for (int j = 0; j < LANES; j++)
        x[i + j] = (int16_t)n[j];
}
#endif

/* How int8 weights are multiplied; kernels.py tells whom that concerns. */
const char *instructions(void) { return INSTRUCTIONS; }

/* --- threads --------------------------------------------------------------------------------------------
   Those of the OpenMP runtime that torch has loaded, GNU's or LLVM's, called by hand: so any compiler will
   do, with or without OpenMP of its own, and no second runtime with threads of its own comes into the
   process. */

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

/* --- some numbers at once ------------------------------------------------------------------------------- */

/* LANES numbers from index i on, as float32. */
INLINE floats load(const void *data, long i, int kind)
{
    if (kind == INT8)
        return from_int8((const int8_t *)data + i);
    if (kind == BFLOAT16)
        return from_bfloat16((const uint16_t *)data + i);
    return FLOATS((const float *)data + i);
}

INLINE floats all(float x)
{
    floats y = {0};
    return y + x;
}

INLINE float total(floats a)
{
    floats four[4] = {a};
    float y[4];
    four_totals(four, y);
    return y[0];
}

/* The largest of n numbers, and of `least`. */
static float largest(const float *x, long n, float least)
{
    floats top = all(least);
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        top = larger(top, FLOATS(x + i));
    for (int j = 0; j < LANES; j++)
        least = top[j] > least ? top[j] : least;
    for (; i < n; i++)
        least = x[i] > least ? x[i] : least;
    return least;
}

/* The largest absolute value of n numbers, a multiple of LANES, and of `least`. */
static float largest_size(const float *x, long n, float least)
{
    floats top = all(least);
    for (long i = 0; i < n; i += LANES)
        top = larger(top, larger(FLOATS(x + i), -FLOATS(x + i)));
    for (int j = 0; j < LANES; j++)
        least = top[j] > least ? top[j] : least;
    return least;
}

/* The nearest whole numbers, of sizes up to 2^22: what is added pushes the fraction out of the number. */
INLINE ints nearest(floats x)
{
    floats shifted = x + 12582912.0f;   /* 1.5 * 2^23 */
    return (ints)shifted - (ints)all(12582912.0f);
}

/* exp(x) for x <= 0, within 2 units of the last place; 0 below -87. */
INLINE floats exponential(floats x)
{
    ints seen = x > all(-87);
    x = (floats)((ints)x & seen);
    ints powers = nearest(x * 1.44269504f);
    floats n = __builtin_convertvector(powers, floats);
    floats rest = x - n * 0.693359375f + n * 2.12194440e-4f;    /* x = n log(2) + rest; log(2) in two parts */
    floats y = rest * 1.9875691500e-4f + 1.3981999507e-3f;      /* Cephes' expf */
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return (floats)(((ints)y + (powers << 23)) & seen);
}

/* x Phi(x) with the error function as a quotient of polynomials (Eigen's), right to 4e-7. */
INLINE floats gelu_of(floats x)
{
    floats z = x * 0.70710678f;
    z = larger(-larger(-z, all(-4)), all(-4));      /* beyond 4 it is 1 */
    floats s = z * z;
    floats p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    floats q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * 0.5f * (1 + z * p / q);
}

/* --- int4 weights ---------------------------------------------------------------------------------------
   A row of them, whose columns are a multiple of 64, is as `quantize_groups` of checkpoints/files.py makes
   it: columns / 2 bytes with two weights each, then columns / 32 bytes, the scales of the groups of 32
   columns. Of 64 columns, byte i has the columns i, in its lower half, and 32 + i. */

static int8_t int4_table[256][16];      /* scale, 4 bits -> the weight in int8 */

void use_int4_table(const int8_t *table) { memcpy(int4_table, table, sizeof int4_table); }

/* 64 columns from c on as int8. */
INLINE void unpack(const uint8_t *row, long c, long columns, int8_t *out)
{
    const uint8_t *pairs = row + c / 2, *scales = row + columns / 2 + c / 32;
    const int8_t *first = int4_table[scales[0]], *second = int4_table[scales[1]];
#if defined(__AVX2__) && defined(__FMA__)
    __m256i both = _mm256_loadu_si256((const void *)pairs), half = _mm256_set1_epi8(15);
    __m256i of_first = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)first));
    __m256i of_second = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)second));
    __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), half);
    _mm256_storeu_si256((void *)out, _mm256_shuffle_epi8(of_first, _mm256_and_si256(both, half)));
    _mm256_storeu_si256((void *)(out + 32), _mm256_shuffle_epi8(of_second, upper));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    for (int i = 0; i < 32; i += 16) {
        uint8x16_t both = vld1q_u8(pairs + i);
        vst1q_s8(out + i, vqtbl1q_s8(vld1q_s8(first), vandq_u8(both, vdupq_n_u8(15))));
        vst1q_s8(out + 32 + i, vqtbl1q_s8(vld1q_s8(second), vshrq_n_u8(both, 4)));
    }
#else
    for (int i = 0; i < 32; i++) {
        out[i] = first[pairs[i] & 15];
        out[32 + i] = second[pairs[i] >> 4];
    }
#endif
}

INLINE long row_bytes(long columns, int kind)
{
    return kind == INT4 ? columns / 2 + columns / 32 : columns * BYTES[kind];
}

struct unpacking { const uint8_t *w; int8_t *out; long rows, columns; };

static void unpack_part(void *job)
{
    struct unpacking t = *(struct unpacking *)job;
    struct part part = my_part(t.rows);
    for (long r = part.first; r < part.end; r++)
        for (long c = 0; c < t.columns; c += 64)
            unpack(t.w + r * row_bytes(t.columns, INT4), c, t.columns, t.out + r * t.columns + c);
}

/* int4 weights as int8 ones (rows, columns). */
void unpack_int4(int threads, const uint8_t *w, int8_t *out, long rows, long columns)
{
    struct unpacking job = {w, out, rows, columns};
    run_threads(unpack_part, &job, threads, 0);
}

/* --- int8 and int4 weights times whole numbers ---------------------------------------------------------- */

/* A row x in whole numbers. */
struct whole {
    int16_t *x;             /* as `pack` lays it out */
    float unit;             /* what 1 stands for */
    ints surplus[PARTS];    /* what weights of zero add up to, where `widen` adds something to weights */
};

/* n numbers, a multiple of WIDE, as whole ones in `room` (n). */
static struct whole whole_numbers(const float *x, int16_t *room, long n)
{
    long top = HOLDS / n < TOP ? HOLDS / n : TOP;
    float size = largest_size(x, n, 1e-30f);
    for (long i = 0; i < n; i += LANES)
        pack(nearest(FLOATS(x + i) * (top / size)), room, i);
    struct whole whole = {room, size / top, {{0}}};
    static const int8_t zeros[WIDE];
    for (int part = 0; part < PARTS; part++)
        for (long c = 0; c < n; c += WIDE)
            whole.surplus[part] = multiply_add(whole.surplus[part], widen(zeros), room + c + part * WIDE / 2);
    return whole;
}

/* The sums that the parts stand for, in float32. */
INLINE floats whole_sum(const ints *part, const struct whole *x)
{
    floats sum = __builtin_convertvector(part[PARTS - 1] - x->surplus[PARTS - 1], floats);
    if (PARTS == 2)
        sum += 256 * __builtin_convertvector(part[0] - x->surplus[0], floats);
    return sum * x->unit;
}

/* Four rows of w, in int8 or int4, times N (1 or 2) rows x. y (2, 4). */
INLINE void four_rows_by_whole(const char *w, const struct whole *x, float *y, long columns, int kind, int N)
{
    ints sum[2][4][PARTS] = {{{{0}}}};
    long bytes = row_bytes(columns, kind), step = kind == INT4 ? 64 : WIDE;
    for (long c = 0; c < columns; c += step) {
        for (int line = 0; line < 4 * row_bytes(step, kind); line += 64)    /* rows that come next */
            __builtin_prefetch(w + 4 * bytes + 4 * (kind == INT4 ? c / 2 : c) + 1024 + line);
        for (int i = 0; i < 4; i++) {
            const int8_t *from = (const int8_t *)w + i * bytes + c;
            int8_t unpacked[64];
            if (kind == INT4) {
                unpack((const uint8_t *)w + i * bytes, c, columns, unpacked);
                from = unpacked;
            }
            for (int n = 0; n < step; n += WIDE) {
                wide weights = widen(from + n);
                for (int b = 0; b < N; b++)
                    for (int part = 0; part < PARTS; part++)
                        sum[b][i][part] = multiply_add(sum[b][i][part], weights,
                                                       x[b].x + c + n + part * WIDE / 2);
            }
        }
    }
    for (int b = 0; b < N; b++) {
        floats found[4];
        for (int i = 0; i < 4; i++)
            found[i] = whole_sum(sum[b][i], x + b);
        four_totals(found, y + 4 * b);
    }
}

/* --- products ------------------------------------------------------------------------------------------- */

/* Four rows of w times N (1 or 2) rows of x: sums that do not wait for each other. y (2, 4). */
INLINE void four_rows(const char *w, const float *x, float *y, long columns, int kind, int N)
{
    floats sum[2][4] = {{{0}}};
    for (long c = 0; c < columns; c += LANES) {
        __builtin_prefetch(w + 4 * (columns + c) * BYTES[kind] + 1024);     /* rows that come next */
        for (int i = 0; i < 4; i++) {
            floats weights = load(w, i * columns + c, kind);
            for (int b = 0; b < N; b++)
                sum[b][i] += weights * FLOATS(x + b * columns + c);
        }
    }
    for (int b = 0; b < N; b++)
        four_totals(sum[b], y + 4 * b);
}

struct norm { const float *weight, *bias; };            /* of a layer norm; NULLs where there is none */

static const struct norm NO_NORM = {0, 0};

/* Layer norm of each row of x (batch, columns), in place. columns is a multiple of LANES. */
static void normalize(float *x, struct norm norm, long columns, long batch)
{
    for (; norm.weight && batch--; x += columns) {
        floats sum = {0}, squares = {0};
        for (long c = 0; c < columns; c += LANES)
            sum += FLOATS(x + c);
        float mean = total(sum) / columns;
        for (long c = 0; c < columns; c += LANES) {
            floats centered = FLOATS(x + c) - mean;
            squares += centered * centered;
        }
        float factor = 1 / sqrtf(total(squares) / columns + 1e-5f);
        for (long c = 0; c < columns; c += LANES)
            FLOATS(x + c) = (FLOATS(x + c) - mean) * factor * FLOATS(norm.weight + c) + FLOATS(norm.bias + c);
    }
}

struct product {
    int kind, gelu;
    const char *w;
    const float *scale, *x, *add;
    const struct whole *whole;      /* the rows of x in whole numbers, or NULL */
    float *y;
    long rows, columns, batch;
};

/* Rows r to r + 3 of w times N (1 or 2) rows of x from row b on. y (2, 4). */
INLINE void four_by_two(const struct product *p, long r, long b, float *y, int N)
{
    const char *w = p->w + r * row_bytes(p->columns, p->kind);
    const float *x = p->x + b * p->columns;
    if (p->kind == INT4)
        four_rows_by_whole(w, p->whole + b, y, p->columns, INT4, N);
    else if (p->whole)
        four_rows_by_whole(w, p->whole + b, y, p->columns, INT8, N);
    else if (p->kind == INT8)
        four_rows(w, x, y, p->columns, INT8, N);
    else if (p->kind == BFLOAT16)
        four_rows(w, x, y, p->columns, BFLOAT16, N);
    else
        four_rows(w, x, y, p->columns, FLOAT32, N);
}

/* A thread's part of the rows of a product. */
static void product_part(void *job)
{
    struct product p = *(struct product *)job;
    struct part part = my_part(p.rows / 4);
    for (long r = 4 * part.first; r < 4 * part.end; r += 4)
        for (long b = 0; b < p.batch; b += 2) {
            float y[8] = {0};
            int N = b + 1 < p.batch ? 2 : 1;
            if (N == 2)
                four_by_two(&p, r, b, y, 2);
            else
                four_by_two(&p, r, b, y, 1);
            for (int n = 0; n < N; n++) {
                for (int i = 0; p.scale && i < 4; i++)
                    y[4 * n + i] *= p.scale[r + i];
                for (int i = 0; p.add && i < 4; i++)
                    y[4 * n + i] += p.add[(b + n) * p.rows + r + i];
            }
            for (int i = 0; p.gelu && i < 8; i += LANES)
                FLOATS(y + i) = gelu_of(FLOATS(y + i));
            for (int n = 0; n < N; n++)
                memcpy(p.y + (b + n) * p.rows + r, y + 4 * n, 4 * sizeof(float));
        }
}

/* (rows, columns), times scale (rows) or NULL. */
struct matrix {
    long kind;
    const char *w;
    const float *scale;
};

/* y (batch, rows) = gelu(add + norm(x) W^T), x (batch, columns). norm, gelu and add (batch, rows), which may
   be y, can be missing. rows is a multiple of 4, columns of 8, with int4 of 64. */
static void multiply(int threads, struct matrix m, const float *x, struct norm norm, int gelu,
                     const float *add, float *y, long rows, long columns, long batch)
{
    struct product job = {m.kind, gelu, m.w, m.scale, x, add, 0, y, rows, columns, batch};
    float *normed = 0;
    int16_t *room = 0;
    struct whole whole[batch];
    if (norm.weight) {
        normed = malloc(batch * columns * sizeof *normed);
        memcpy(normed, x, batch * columns * sizeof *normed);
        normalize(normed, norm, columns, batch);
        job.x = normed;
    }
    if ((m.kind == INT8 || m.kind == INT4) && columns % WIDE == 0) {
        room = malloc(batch * columns * sizeof *room);
        for (long b = 0; b < batch; b++)
            whole[b] = whole_numbers(job.x + b * columns, room + b * columns, columns);
        job.whole = whole;
    }
    run_threads(product_part, &job, threads, 0);
    free(normed);
    free(room);
}

void product(int threads, int kind, const char *w, const float *scale, const float *x, float *y,
             long rows, long columns, long batch)
{
    multiply(threads, (struct matrix){kind, w, scale}, x, NO_NORM, 0, 0, y, rows, columns, batch);
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
    floats sum = {0};
    long s = 0;
    for (; s + LANES <= length; s += LANES) {
        FLOATS(p + s) = exponential(FLOATS(p + s) - top);
        sum += FLOATS(p + s);
    }
    if (s < length) {       /* fewer than LANES: what is not there weighs nothing */
        float rest[LANES];
        for (int j = 0; j < LANES; j++)
            rest[j] = s + j < length ? p[s + j] : -INFINITY;
        FLOATS(rest) = exponential(FLOATS(rest) - top);
        sum += FLOATS(rest);
        memcpy(p + s, rest, (length - s) * sizeof *p);
    }
    float factor = 1 / total(sum);
    for (s = 0; s < length; s++)
        p[s] *= (kind == INT8 ? v_scale[s] : 1) * factor;
}

/* q (E) times the key at position s of k (length, E), as LANES sums; whole: q in whole numbers, or NULL. */
INLINE floats score(const float *q, const struct whole *whole, const void *k, long s, long E, int kind)
{
    if (whole) {
        ints sum[PARTS] = {{0}};
        for (long e = 0; e < E; e += WIDE)
            for (int part = 0; part < PARTS; part++)
                sum[part] = multiply_add(sum[part], widen((const int8_t *)k + s * E + e),
                                         whole->x + e + part * WIDE / 2);
        return whole_sum(sum, whole);
    }
    floats dot = {0};
    for (long e = 0; e < E; e += LANES)
        dot += FLOATS(q + e) * load(k, s * E + e, kind);
    return dot;
}

/* The sum of p times the rows of v (length, E), in n (up to 8) times LANES columns from `first` on. */
INLINE void weighted_sum(const float *p, const void *v, float *out, long length, long E, long first, long n,
                       int kind)
{
    floats mean[8] = {{0}};
    for (long s = 0; s < length; s++)
        for (long e = 0; e < n; e++)
            mean[e] += p[s] * load(v, s * E + first + LANES * e, kind);
    for (long e = 0; e < n; e++)
        FLOATS(out + first + LANES * e) = mean[e];
}

/* One head: q (E) to keys and values (length, E); p is room for the scores. */
INLINE void one_head(const float *q, const void *k, const float *k_scale, const void *v, const float *v_scale,
                     const float *hidden, float *p, float *out, long length, long E, int kind)
{
    float unit = 1 / sqrtf(E);
    int16_t room[64];
    struct whole numbers;
    const struct whole *whole = 0;
    if (kind == INT8 && E == 64) {
        numbers = whole_numbers(q, room, 64);
        whole = &numbers;
    }
    for (long s = 0; s < length; s += 4) {
        floats scores[4];
        float four[4];
        for (long i = 0; i < 4; i++)
            scores[i] = score(q, whole, k, s + i < length ? s + i : s, E, kind);
        four_totals(scores, four);
        memcpy(p + s, four, sizeof(float) * (length - s < 4 ? length - s : 4));
    }
    softmax(p, k_scale, v_scale, hidden, length, unit, kind);
    long first = 0;
    for (; first + 8 * LANES <= E; first += 8 * LANES)      /* as many sums as there are registers */
        weighted_sum(p, v, out, length, E, first, 8, kind);
    if (first < E)
        weighted_sum(p, v, out, length, E, first, (E - first) / LANES, kind);
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
   `length`. q, k_new, v_new: rows of `stride` numbers, one an item, of heads x E; k, v (batch, heads, steps,
   E) and their scales (batch, heads, steps); hidden (batch, steps) is added to the scores, or NULL; scores:
   room for (batch, heads, steps); out (batch, heads, E). E is a multiple of 8. */
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
    struct norm q_norm, k_norm;     /* of every head, or NULLs */
    char *k; float *k_scale;
    char *v; float *v_scale;
    struct norm norm2;
    struct matrix ff1, ff2;
    struct norm norm_cross;
    struct matrix cross_q, cross_out;
    struct norm cross_q_norm;
    char *cross_k, *cross_v;        /* (batch, heads, cross_length, E) in float32 */
};

/* Rotary positions, as lm.py's `rotate`: the first and second halves of x (heads, E) turned by E/2 angles. */
static void rotate(float *x, const float *cosine, const float *sine, long heads, long E)
{
    long half = E / 2;
    for (long h = 0; h < heads; h++, x += E)
        for (long e = 0; e < half; e++) {
            float a = x[e], b = x[half + e];
            x[e] = a * cosine[e] - b * sine[e];
            x[half + e] = a * sine[e] + b * cosine[e];
        }
}

/* x (batch, heads * E) through N layers, in place. kind: of keys and values. cosine, sine: (batch, E/2) of
   rotary positions, or NULL. */
void decode(int threads, int kind, const struct layer *layer, long N, float *x, const float *cosine,
            const float *sine, const float *hidden, const float *cross_hidden, float *scores, long batch,
            long heads, long length, long steps, long E, long wide, long cross_length)
{
    long D = heads * E;
    float *qkv = malloc(batch * (3 * D + D + wide) * sizeof *qkv);
    float *heard = qkv + batch * 3 * D, *between = heard + batch * D;
    for (; N--; layer++) {
        multiply(threads, layer->qkv, x, layer->norm1, 0, 0, qkv, 3 * D, D, batch);
        for (long b = 0; b < batch; b++) {
            float *q = qkv + b * 3 * D, *k = q + D;
            normalize(q, layer->q_norm, E, heads);
            normalize(k, layer->k_norm, E, heads);
            if (cosine)
                rotate(q, cosine + b * E / 2, sine + b * E / 2, 2 * heads, E);      /* k stands behind q */
        }
        attend(threads, kind, qkv, qkv + D, qkv + 2 * D, 3 * D, layer->k, layer->k_scale, layer->v,
               layer->v_scale, hidden, scores, heard, batch, heads, length, steps, E);
        multiply(threads, layer->out, heard, NO_NORM, 0, x, x, D, D, batch);
        if (layer->cross_k) {
            multiply(threads, layer->cross_q, x, layer->norm_cross, 0, 0, qkv, D, D, batch);
            normalize(qkv, layer->cross_q_norm, E, batch * heads);
            attend(threads, FLOAT32, qkv, 0, 0, D, layer->cross_k, 0, layer->cross_v, 0,
                   cross_hidden, scores, heard, batch, heads, cross_length, cross_length, E);
            multiply(threads, layer->cross_out, heard, NO_NORM, 0, x, x, D, D, batch);
        }
        multiply(threads, layer->ff1, x, layer->norm2, 1, 0, between, wide, D, batch);
        multiply(threads, layer->ff2, between, NO_NORM, 0, x, x, D, wide, batch);
    }
    free(qkv);
}

/* --- many positions at the beginning --------------------------------------------------------------------
   Their products are torch's; what stands between these passes over memory once. Numbers of a `kind`: in
   float32 or bfloat16. columns is a multiple of LANES. */

/* LANES numbers to index i on. */
INLINE void put(floats x, void *data, long i, int kind)
{
    if (kind == FLOAT32) {
        FLOATS((float *)data + i) = x;
        return;
    }
    ints bits = (ints)x;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    for (long j = 0; j < LANES; j++)
        ((uint16_t *)data)[i + j] = bits[j];
}

struct rows {
    int kind;       /* of y and out */
    float *x;
    void *y;
    struct norm norm;
    void *out;
    long columns, batch;
};

INLINE void add_row(const struct rows *a, long i, int kind)
{
    float *x = a->x + i * a->columns;
    floats sum = {0}, squares = {0};
    for (long c = 0; c < a->columns; c += LANES) {
        if (a->y)
            FLOATS(x + c) += load(a->y, i * a->columns + c, kind);
        sum += FLOATS(x + c);
    }
    if (!a->out)
        return;
    float mean = total(sum) / a->columns;
    for (long c = 0; c < a->columns; c += LANES) {
        floats centered = FLOATS(x + c) - mean;
        squares += centered * centered;
    }
    float factor = 1 / sqrtf(total(squares) / a->columns + 1e-5f);
    for (long c = 0; c < a->columns; c += LANES)
        put((FLOATS(x + c) - mean) * factor * FLOATS(a->norm.weight + c) + FLOATS(a->norm.bias + c), a->out,
            i * a->columns + c, kind);
}

static void add_part(void *job)
{
    struct rows a = *(struct rows *)job;
    struct part part = my_part(a.batch);
    for (long i = part.first; i < part.end; i++)
        if (a.kind == BFLOAT16)
            add_row(&a, i, BFLOAT16);
        else
            add_row(&a, i, FLOAT32);
}

/* x (batch, columns) += y, if there is a y; then out = norm(x), if there is an out, of the same kind as y. */
void add_norm(int threads, float *x, int kind, void *y, const float *weight, const float *bias, void *out,
              long columns, long batch)
{
    struct rows job = {kind, x, y, {weight, bias}, out, columns, batch};
    run_threads(add_part, &job, threads, 0);
}

struct scaled { int kind; const int8_t *w; const float *scale; void *y; long rows, columns; };

static void unpack_int8_part(void *job)
{
    struct scaled u = *(struct scaled *)job;
    struct part part = my_part(u.rows);
    for (long r = part.first; r < part.end; r++)
        for (long c = r * u.columns, end = c + u.columns; c < end; c += LANES) {
            if (u.kind == BFLOAT16)
                put(load(u.w, c, INT8) * u.scale[r], u.y, c, BFLOAT16);
            else
                put(load(u.w, c, INT8) * u.scale[r], u.y, c, FLOAT32);
        }
}

/* y (rows, columns) = w, times the scales of its rows. */
void unpack_int8(int threads, int kind, const int8_t *w, const float *scale, void *y, long rows, long columns)
{
    struct scaled job = {kind, w, scale, y, rows, columns};
    run_threads(unpack_int8_part, &job, threads, 0);
}

struct stored {
    int from, kind;
    const void *x;
    char *data; float *scale;
    long batch, heads, length, steps, E, stride;
};

static void store_part(void *job)
{
    struct stored t = *(struct stored *)job;
    struct part part = my_part(t.batch * t.heads);
    float x[t.E];
    for (long i = part.first; i < part.end; i++)
        for (long s = 0; s < t.length; s++) {
            long b = i / t.heads, h = i % t.heads, at = (b * t.length + s) * t.stride + h * t.E;
            for (long e = 0; e < t.E; e += LANES)
                FLOATS(x + e) = t.from == BFLOAT16 ? load(t.x, at + e, BFLOAT16) : load(t.x, at + e, FLOAT32);
            store(x, t.data + i * t.steps * t.E * BYTES[t.kind], t.scale + i * t.steps, s, t.E, t.kind);
        }
}

/* x, rows of `stride` numbers of the kind `from`, (batch, length) of them, each of heads x E, into data
   (batch, heads, steps, E) and scale (batch, heads, steps) from the beginning on. */
void store_first(int threads, int from, const void *x, int kind, char *data, float *scale, long batch,
                 long heads, long length, long steps, long E, long stride)
{
    struct stored job = {from, kind, x, data, scale, batch, heads, length, steps, E, stride};
    run_threads(store_part, &job, threads, 0);
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

/* The moments of LANES weights; adds to three sums. */
INLINE void add_moments(const struct moments *t, const float *g_from, float *m, float *v, float *s,
                        floats *sum)
{
    floats g = FLOATS(g_from);
    FLOATS(m) += t->c1 * (t->lam * g - FLOATS(m));
    FLOATS(s) += t->c2 * (t->lam * g - FLOATS(s));
    FLOATS(v) += t->c2 * (g * g - FLOATS(v));
    floats inverse = 1 / (root(FLOATS(v)) + t->eps);
    sum[0] += g * g * inverse;
    sum[1] += FLOATS(s) * FLOATS(s) * inverse;
    sum[2] += larger(FLOATS(s), -FLOATS(s));
}

static void moments_part(void *job)
{
    struct moments t = *(struct moments *)job;
    struct part part = my_part((t.n + BLOCK - 1) / BLOCK);
    for (long block = part.first; block < part.end; block++) {
        floats sum[3] = {{0}};
        long i = block * BLOCK, end = (block + 1) * BLOCK < t.n ? (block + 1) * BLOCK : t.n;
        for (; i + LANES <= end; i += LANES)
            add_moments(&t, t.g + i, t.m + i, t.v + i, t.s + i, sum);
        if (i < end) {      /* fewer than LANES at the end of a tensor: zeros add nothing */
            long size = (end - i) * sizeof(float);
            float g[LANES] = {0}, m[LANES] = {0}, v[LANES] = {0}, s[LANES] = {0};
            memcpy(g, t.g + i, size), memcpy(m, t.m + i, size);
            memcpy(v, t.v + i, size), memcpy(s, t.s + i, size);
            add_moments(&t, g, m, v, s, sum);
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
