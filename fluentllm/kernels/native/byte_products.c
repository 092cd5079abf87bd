/* The products of products.c where the CPU multiplies bytes (VNNI): four products of a byte each and their sum in one instruction.
 *
 * The activations of a group of 32 become integers v of 16 bits with one step s, x = s · v, and each v two bytes, 256 · high + low.
 * Sums of products with the weights' bits are then exact, and only v is rounded: by 1 / 65278 of the group's largest value at most.
 * Weights are the tiles of products.c; dword i of a vector is row i's.
 */
#include "vectors.h"

#ifdef BYTES
const int fluent_multiplies_bytes = 1;

#define MOST 32639.0f /* 127 · 256 + 127, so that both bytes stay in range */

/* A group of activations; 76 bytes, as pack.py knows. */
typedef struct {
    int32_t high[GROUP / 4], low[GROUP / 4]; /* four bytes each, in order */
    float step, sum;                         /* s, and s · Σ v */
    int32_t offset;                          /* -128 · Σ v: what is added to weights to make them unsigned, taken away again */
} Activations;

INLINE void split(const float *x, Activations *a) {
    const floats low = load(x), high = load(x + LANES);
    const float largest = largest_of(larger(absolute(low), absolute(high)));
    const float inverse = largest > 1e-30f ? MOST / largest : 0;
    const ints v[2] = {to_ints(low * all(inverse)), to_ints(high * all(inverse))};
    for (int half = 0; half < 2; half++) {
        store_bytes(a->high + half * LANES / 4, (ints)(((words)v[half] + 128) >> 8));
        store_bytes(a->low + half * LANES / 4, v[half]);
    }
    const int32_t sum = sum_of((ints)((words)v[0] + (words)v[1]));
    /* What is no number makes the step none, and with it the products; the largest of such values may be anything. */
    a->step = unordered(low, high) ? __builtin_nanf("") : largest / MOST;
    a->sum = a->step * (float)sum;
    a->offset = -128 * sum;
}

/* Sums of products of one group: 16 weights' rows with each of `rows` activations; `weights`: 32 bytes of each row. */
INLINE void multiply(const int rows, const Activations *a, long groups, const ints *weights, ints *sums) {
    for (int t = 0; t < rows; t++) sums[t] = zeros();
#pragma GCC unroll 8
    for (int c = 0; c < GROUP / 4; c++)
        for (int t = 0; t < rows; t++) sums[t] = add_products(sums[t], weights[c], all_ints(a[t * groups].high[c]));
    for (int t = 0; t < rows; t++) sums[t] = times_256(sums[t]);
#pragma GCC unroll 8
    for (int c = 0; c < GROUP / 4; c++)
        for (int t = 0; t < rows; t++) sums[t] = add_products(sums[t], weights[c], all_ints(a[t * groups].low[c]));
}

INLINE void tile4(const int rows, const Activations *a, const uint8_t *w, float *y, long groups, long outputs) {
    floats total[ROWS];
    for (int t = 0; t < rows; t++) total[t] = zero();
    for (long g = 0; g < groups; g++, w += GROUP4, a++) {
        ints weights[GROUP / 4], sums[ROWS];
        for (int c = 0; c < GROUP / 8; c++) {
            const words both = load_words(w + 4 * TILE + 4 * TILE * c);
            weights[c] = (ints)(both & 0x0f0f0f0f);
            weights[c + GROUP / 8] = (ints)(both >> 4 & 0x0f0f0f0f);
        }
        multiply(rows, a, groups, weights, sums);
        const floats d = halves(w), m = halves(w + 2 * TILE);
        for (int t = 0; t < rows; t++) {
            const Activations *row = a + t * groups;
            total[t] = fma(m, all(row->sum), fma(d * all(row->step), to_floats(sums[t]), total[t]));
        }
    }
    for (int t = 0; t < rows; t++) store(y + t * outputs, total[t]);
}

INLINE void tile8(const int rows, const Activations *a, const uint8_t *w, float *y, long groups, long outputs) {
    floats total[ROWS];
    for (int t = 0; t < rows; t++) total[t] = zero();
    for (long g = 0; g < groups; g++, w += GROUP8, a++) {
        ints weights[GROUP / 4], sums[ROWS];
        /* One of the factors is unsigned: q + 128. */
        for (int c = 0; c < GROUP / 4; c++) weights[c] = (ints)(load_words(w + 2 * TILE + 4 * TILE * c) ^ (int32_t)0x80808080);
        multiply(rows, a, groups, weights, sums);
        const floats d = halves(w);
        for (int t = 0; t < rows; t++) {
            const Activations *row = a + t * groups;
            const words sum = (words)sums[t] + row->offset;
            total[t] = fma(d * all(row->step), to_floats((ints)sum), total[t]);
        }
    }
    for (int t = 0; t < rows; t++) store(y + t * outputs, total[t]);
}

/* As in products.c; workspace: room for [rows, columns / 32] of Activations. Of many rows BLOCK go through all tiles before the
 * next do, so that they stay in the cache. */
#define BLOCK 256
#define PRODUCT(name, tile, bytes) \
    void name(const float *x, const uint8_t *tiles, float *y, void *workspace, long rows, long columns, long outputs) { \
        const long groups = columns / GROUP; \
        Activations *split_x = workspace; \
        _Pragma("omp parallel for schedule(static) if (rows > ROWS)") \
        for (long i = 0; i < rows * groups; i++) split(x + i * GROUP, split_x + i); \
        for (long first = 0; first < rows; first += BLOCK) { \
            const long end = rows - first < BLOCK ? rows : first + BLOCK; \
            _Pragma("omp parallel for schedule(static)") \
            for (long n = 0; n < outputs / TILE; n++) { \
                const uint8_t *w = tiles + n * groups * bytes; \
                for (long t = first; t < end; t += ROWS) { \
                    const Activations *a = split_x + t * groups; \
                    float *b = y + t * outputs + n * TILE; \
                    BY_ROWS(end - t, tile, a, w, b, groups, outputs) \
                } \
            } \
        } \
    }

PRODUCT(fluent_product4, tile4, GROUP4)
PRODUCT(fluent_product8, tile8, GROUP8)
#endif
