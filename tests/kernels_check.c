/* kernels.c against sums in double precision. test_speed.py compiles it for several processors and runs it:
   prints what instructions it took, and fails at the first number that is not near enough or, where it ought
   to be, not the same. */
#include "../speed/kernels.c"
#include <stdio.h>

enum { ROWS = 8, BATCH = 3, MOST = 12288, HEADS = 2, STEPS = 40 };

static float w[ROWS * MOST], x[BATCH * MOST], scale[ROWS], together[BATCH * ROWS], alone[ROWS];
static char packed[ROWS * MOST * 4];
static int8_t table[256][16];

static float uniform(void)
{
    static uint32_t state = 1;
    state = 1664525 * state + 1013904223;
    return (int32_t)state / 2147483648.0f;
}

static void expect(int fine, const char *what, int kind, long n)
{
    if (!fine) {
        printf("%s: kind %d, size %ld\n", what, kind, n);
        exit(1);
    }
}

/* Bits and scales of a row of int4 by chance into `packed`; w becomes what they stand for. */
static void pack_int4(int r, long columns, int largest)
{
    uint8_t *pairs = (uint8_t *)packed + r * columns * 17 / 32, *scales = pairs + columns / 2;
    for (long i = 0; i < columns / 2; i++)
        pairs[i] = largest ? 0 : (int)(128 + 127 * uniform());
    for (long i = 0; i < columns / 32; i++)
        scales[i] = largest ? 127 + r % 2 * 2 : (int)(128 + 127 * uniform());
    for (long c = 0; c < columns; c++) {
        uint8_t both = pairs[c / 64 * 32 + c % 32];
        w[r * columns + c] = table[scales[c / 32]][c % 64 < 32 ? both & 15 : both >> 4];
    }
}

/* n numbers of w in `packed`; w becomes what was stored. */
static void pack_weights(long n, int kind)
{
    for (long i = 0; i < n; i++)
        if (kind == INT8) {
            ((int8_t *)packed)[i] = (int8_t)lrintf(127 * w[i]);
            w[i] = ((int8_t *)packed)[i];
        } else {
            uint32_t bits;
            memcpy(&bits, w + i, 4);
            bits &= kind == BFLOAT16 ? 0xffff0000 : 0xffffffff;
            memcpy(w + i, &bits, 4);
            if (kind == BFLOAT16)
                ((uint16_t *)packed)[i] = (uint16_t)(bits >> 16);
            else
                ((float *)packed)[i] = w[i];
        }
}

/* largest: all weights and numbers are of the largest size, so that sums are as large as they can be. */
static void check_product(int kind, long columns, int largest)
{
    for (long i = 0; i < ROWS * columns; i++)
        w[i] = largest ? (i / columns % 2 ? -1 : 1) : uniform();
    for (long i = 0; i < BATCH * columns; i++)
        x[i] = largest ? 1 : uniform();
    for (int r = 0; r < ROWS; r++)
        scale[r] = kind == INT8 || kind == INT4 ? 0.5f + r : 1;
    if (kind == INT4)
        for (int r = 0; r < ROWS; r++)
            pack_int4(r, columns, largest);
    else
        pack_weights(ROWS * columns, kind);
    const float *scales = kind == INT8 || kind == INT4 ? scale : 0;
    product(3, kind, packed, scales, x, together, ROWS, columns, BATCH);
    for (int b = 0; b < BATCH; b++) {
        for (int r = 0; r < ROWS; r++) {
            double sum = 0, size = 0;
            for (long c = 0; c < columns; c++) {
                sum += (double)w[r * columns + c] * x[b * columns + c] * scale[r];
                size += fabs((double)w[r * columns + c] * x[b * columns + c] * scale[r]);
            }
            double bound = scales ? 1e-4 : 1e-6;
            expect(fabs(together[b * ROWS + r] - sum) <= bound * size, "a product is wrong", kind, columns);
        }
        product(3, kind, packed, scales, x + b * columns, alone, ROWS, columns, 1);
        expect(!memcmp(alone, together + b * ROWS, sizeof alone), "a row alone is another", kind, columns);
    }
    static int8_t unpacked[ROWS * MOST];
    if (kind == INT4)
        unpack_int4(3, (const uint8_t *)packed, unpacked, ROWS, columns);
    for (long i = 0; kind == INT4 && i < ROWS * columns; i++)
        expect(unpacked[i] == w[i], "a weight is another", kind, columns);
}

static void check_attention(int kind, long E, long length)
{
    long n = HEADS * STEPS * E;
    static float scales[HEADS * STEPS], q[HEADS * 128], scores[HEADS * STEPS], out[HEADS * 128];
    for (long i = 0; i < n; i++)
        w[i] = uniform();
    pack_weights(n, kind);
    for (int i = 0; i < HEADS * STEPS; i++)
        scales[i] = kind == INT8 ? (1.5f + uniform()) / 127 : 1;
    for (long i = 0; i < HEADS * E; i++)
        q[i] = 4 * uniform();
    attend(3, kind, q, 0, 0, HEADS * E, packed, scales, packed, scales, 0, scores, out, 1, HEADS, length,
           STEPS, E);
    for (int h = 0; h < HEADS; h++) {
        double weight[STEPS], sum = 0, mean[128] = {0};
        const float *k = w + h * STEPS * E, *s = scales + h * STEPS;
        for (long t = 0; t < length; t++) {
            double dot = 0;
            for (long e = 0; e < E; e++)
                dot += (double)q[h * E + e] * k[t * E + e] * s[t];
            sum += weight[t] = exp(dot / sqrt(E));
        }
        for (long e = 0; e < E; e++) {
            for (long t = 0; t < length; t++)
                mean[e] += weight[t] / sum * k[t * E + e] * s[t];
            expect(fabs(out[h * E + e] - mean[e]) < 2e-4, "attention is wrong", kind, E);
        }
    }
}

/* Three threads, one after the other. */
static int thread;
static int this_thread(void) { return thread; }
static int three(void) { return 3; }
static void three_threads(void (*work)(void *), void *job, unsigned threads, unsigned flags)
{
    (void)threads, (void)flags;
    for (thread = 0; thread < 3; thread++)
        work(job);
}

int main(void)
{
    for (int s = 0; s < 256; s++)
        for (int i = 0; i < 16; i++)
            table[s][i] = (int8_t)((s < 128 ? s : s - 256) * (2 * i - 16) / 17);
    use_int4_table(table[0]);
    for (int round = 0; round < 2; round++) {
        for (int kind = INT8; kind <= FLOAT32; kind++) {
            for (long columns = 40; columns <= 4096; columns = columns == 40 ? 64 : 8 * columns)
                check_product(kind, columns, 0);
            check_product(kind, 1536, 1);
            check_product(kind, MOST, 1);
            check_attention(kind, 64, 37);
            check_attention(kind, 72, 1);
            check_attention(kind, 72, 40);
        }
        for (long columns = 64; columns <= MOST; columns += columns == 64 ? 128 : 4032)
            check_product(INT4, columns, 0);
        check_product(INT4, MOST, 1);
        use_threads(three_threads, this_thread, three);
    }
    puts(instructions());
    return 0;
}
