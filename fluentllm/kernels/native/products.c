/* Products of a few rows of float32 activations with weights of 4 or 8 bits in groups of 32: y = x Wᵀ, all sums in float32.
 *
 * W [out, in] comes in tiles of 16 of its rows, as `pack.py` lays them out: a tile holds in / 32 groups one after the other,
 * so that it is read from front to back. A vector has one dword for each row of the tile: four columns, as products of bytes want
 * them (byte_products.c).
 *   4 bits, value = q · d + m: float16 d[16], float16 m[16], then for c = 0 … 3 and i = 0 … 15
 *                              the bytes q[i][4c + j] | q[i][4c + j + 16] << 4, j = 0 … 3
 *   8 bits, value = q · d:     float16 d[16], then for c = 0 … 7 and i = 0 … 15 the bytes q[i][4c + j], j = 0 … 3
 */
#include "vectors.h"

#ifndef BYTES
const int fluent_multiplies_bytes = 0;

#define FOUR_BITS(dwords, place) to_floats((ints)((dwords) >> (place) & 15))
#define BYTE(dwords, j) to_floats((ints)((dwords) << (24 - 8 * (j)) >> 24))

/* One tile times `rows` rows of x; `rows` is a constant wherever this is inlined. sums [rows, in / 32]: of x over each group. */
INLINE void tile4(const int rows, const float *x, const float *sums, const uint8_t *w, float *y, long columns, long outputs) {
    const long groups = columns / GROUP;
    floats total[ROWS][VECTORS];
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS; v++) total[t][v] = zero();
    for (long g = 0; g < groups; g++, w += GROUP4) {
        floats part[ROWS][VECTORS];
        for (int t = 0; t < rows; t++)
            for (int v = 0; v < VECTORS; v++) part[t][v] = zero();
        const float *xg = x + g * GROUP;
        for (int c = 0; c < GROUP / 8; c++) {
            words both[VECTORS];
            for (int v = 0; v < VECTORS; v++) both[v] = load_words(w + 4 * TILE + 4 * (c * TILE + v * LANES));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                floats low[VECTORS], high[VECTORS];
                for (int v = 0; v < VECTORS; v++) {
                    low[v] = FOUR_BITS(both[v], 8 * j);
                    high[v] = FOUR_BITS(both[v], 8 * j + 4);
                }
                for (int t = 0; t < rows; t++) {
                    const float *xk = xg + t * columns + 4 * c + j;
                    const floats a = all(xk[0]), b = all(xk[GROUP / 2]);
                    for (int v = 0; v < VECTORS; v++) part[t][v] = fma(high[v], b, fma(low[v], a, part[t][v]));
                }
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            const floats d = halves(w + 2 * v * LANES), m = halves(w + 2 * TILE + 2 * v * LANES);
            for (int t = 0; t < rows; t++)
                total[t][v] = fma(m, all(sums[t * groups + g]), fma(d, part[t][v], total[t][v]));
        }
    }
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS; v++) store(y + t * outputs + v * LANES, total[t][v]);
}

INLINE void tile8(const int rows, const float *x, const float *sums, const uint8_t *w, float *y, long columns, long outputs) {
    (void)sums;
    const long groups = columns / GROUP;
    floats total[ROWS][VECTORS];
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS; v++) total[t][v] = zero();
    for (long g = 0; g < groups; g++, w += GROUP8) {
        floats part[ROWS][VECTORS];
        for (int t = 0; t < rows; t++)
            for (int v = 0; v < VECTORS; v++) part[t][v] = zero();
        const float *xg = x + g * GROUP;
        for (int c = 0; c < GROUP / 4; c++) {
            words four[VECTORS];
            for (int v = 0; v < VECTORS; v++) four[v] = load_words(w + 2 * TILE + 4 * (c * TILE + v * LANES));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                floats values[VECTORS];
                for (int v = 0; v < VECTORS; v++) values[v] = BYTE(four[v], j);
                for (int t = 0; t < rows; t++) {
                    const floats a = all(xg[t * columns + 4 * c + j]);
                    for (int v = 0; v < VECTORS; v++) part[t][v] = fma(values[v], a, part[t][v]);
                }
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            const floats d = halves(w + 2 * v * LANES);
            for (int t = 0; t < rows; t++) total[t][v] = fma(d, part[t][v], total[t][v]);
        }
    }
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS; v++) store(y + t * outputs + v * LANES, total[t][v]);
}

/* x [rows, columns], w tiles, y [rows, outputs]; columns a multiple of 32, outputs of 16; workspace: room for [rows, columns / 32]
 * floats. */
#define PRODUCT(name, tile, bytes) \
    void name(const float *x, const uint8_t *tiles, float *y, void *workspace, long rows, long columns, long outputs) { \
        const long groups = columns / GROUP; \
        float *sums = workspace; \
        for (long i = 0; i < rows * groups; i++) { \
            float sum = 0; \
            for (int k = 0; k < GROUP; k++) sum += x[i * GROUP + k]; \
            sums[i] = sum; \
        } \
        _Pragma("omp parallel for schedule(static)") \
        for (long n = 0; n < outputs / TILE; n++) { \
            const uint8_t *w = tiles + n * groups * bytes; \
            for (long t = 0; t < rows; t += ROWS) { \
                const float *a = x + t * columns, *s = sums + t * groups; \
                float *b = y + t * outputs + n * TILE; \
                BY_ROWS(rows - t, tile, a, s, w, b, columns, outputs) \
            } \
        } \
    }

PRODUCT(fluent_product4, tile4, GROUP4)
PRODUCT(fluent_product8, tile8, GROUP8)
#endif
