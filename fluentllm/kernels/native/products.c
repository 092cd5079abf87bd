/* Products of a few rows of float32 activations with weights of 4 or 8 bits in groups of 32: y = x Wᵀ, all sums in float32.
 *
 * W [out, in] comes in tiles of 16 of its rows, as `pack.py` lays them out: a tile holds in / 32 groups one after the other,
 * so that it is read from front to back. Lane i of a vector is row i of the tile.
 *   4 bits, value = q · d + m: float16 d[16], float16 m[16], then for k = 0 … 15 the bytes q[i][k] | q[i][k + 16] << 4, i = 0 … 15
 *   8 bits, value = q · d:     float16 d[16], then for k = 0 … 31 the bytes q[i][k], i = 0 … 15
 */
#include "vectors.h"

#define GROUP 32
#define GROUP4 (4 * TILE + GROUP / 2 * TILE)
#define GROUP8 (2 * TILE + GROUP * TILE)
#define INLINE static inline __attribute__((always_inline))

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
        const uint8_t *q = w + 4 * TILE;
        const float *xg = x + g * GROUP;
#pragma GCC unroll 2
        for (int k = 0; k < GROUP / 2; k++) {
            floats low[VECTORS], high[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                const ints both = bytes_unsigned(q + k * TILE + v * LANES);
                low[v] = low_nibbles(both);
                high[v] = high_nibbles(both);
            }
            for (int t = 0; t < rows; t++) {
                const floats a = all(xg[t * columns + k]), b = all(xg[t * columns + k + GROUP / 2]);
                for (int v = 0; v < VECTORS; v++) part[t][v] = fma(high[v], b, fma(low[v], a, part[t][v]));
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
        const uint8_t *q = w + 2 * TILE;
        const float *xg = x + g * GROUP;
#pragma GCC unroll 4
        for (int k = 0; k < GROUP; k++) {
            floats values[VECTORS];
            for (int v = 0; v < VECTORS; v++) values[v] = to_floats(bytes_signed(q + k * TILE + v * LANES));
            for (int t = 0; t < rows; t++) {
                const floats a = all(xg[t * columns + k]);
                for (int v = 0; v < VECTORS; v++) part[t][v] = fma(values[v], a, part[t][v]);
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

#if ROWS == 8
#define MORE(tile) \
    case 5: tile(5, a, s, w, b, columns, outputs); break; \
    case 6: tile(6, a, s, w, b, columns, outputs); break; \
    case 7: tile(7, a, s, w, b, columns, outputs); break; \
    case 8: tile(8, a, s, w, b, columns, outputs); break;
#else
#define MORE(tile)
#endif

/* x [rows, columns], w tiles, y [rows, outputs]; columns a multiple of 32, outputs of 16; sums: room for [rows, columns / 32]. */
#define PRODUCT(name, tile, bytes) \
    void name(const float *x, const uint8_t *tiles, float *y, float *sums, long rows, long columns, long outputs) { \
        const long groups = columns / GROUP; \
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
                switch (rows - t < ROWS ? rows - t : ROWS) { \
                    case 1: tile(1, a, s, w, b, columns, outputs); break; \
                    case 2: tile(2, a, s, w, b, columns, outputs); break; \
                    case 3: tile(3, a, s, w, b, columns, outputs); break; \
                    case 4: tile(4, a, s, w, b, columns, outputs); break; \
                    MORE(tile) \
                } \
            } \
        } \
    }

PRODUCT(fluent_product4, tile4, GROUP4)
PRODUCT(fluent_product8, tile8, GROUP8)
