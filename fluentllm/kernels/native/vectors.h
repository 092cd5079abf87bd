/* A tile of weights, and its 16 lanes as the CPU has them: two vectors of 8 (AVX2) or one of 16 (AVX-512). */
#include <immintrin.h>
#include <stdint.h>

#define TILE 16
#define GROUP 32
#define GROUP4 (4 * TILE + GROUP / 2 * TILE)
#define GROUP8 (2 * TILE + GROUP * TILE)
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define VECTORS 1
#define LANES 16
#define ROWS 8 /* activations that share one decoding of the weights: as many as there are registers for */
typedef __m512 floats;
typedef __m512i ints;
typedef int32_t words __attribute__((vector_size(64)));
#define zero() _mm512_setzero_ps()
#define all(x) _mm512_set1_ps(x)
#define store(p, v) _mm512_storeu_ps(p, v)
#define halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define load_words(p) ((words)_mm512_loadu_si512(p))
#define to_floats(v) _mm512_cvtepi32_ps(v)
#ifdef __AVX512VNNI__
#define BYTES
#define load(p) _mm512_loadu_ps(p)
#define absolute(v) _mm512_abs_ps(v)
#define larger(a, b) _mm512_max_ps(a, b)
#define largest_of(v) _mm512_reduce_max_ps(v)
#define sum_of(v) _mm512_reduce_add_epi32(v)
#define unordered(a, b) _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)
#define to_ints(v) _mm512_cvtps_epi32(v)
#define store_bytes(p, v) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8(v)) /* the lowest of each dword */
#define zeros() _mm512_setzero_si512()
#define all_ints(x) _mm512_set1_epi32(x)
#define times_256(v) _mm512_slli_epi32(v, 8)
#define add_products(sum, unsigned_bytes, signed_bytes) _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes)
#endif
#else
#define VECTORS 2
#define LANES 8
#define ROWS 4
typedef __m256 floats;
typedef __m256i ints;
typedef int32_t words __attribute__((vector_size(32)));
#define zero() _mm256_setzero_ps()
#define all(x) _mm256_set1_ps(x)
#define store(p, v) _mm256_storeu_ps(p, v)
#define halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define load_words(p) ((words)_mm256_loadu_si256((const __m256i *)(p)))
#define to_floats(v) _mm256_cvtepi32_ps(v)
#endif

/* `tile`(number of rows as a constant, …) for the next rows of `left`. */
#if ROWS == 8
#define MORE_ROWS(tile, ...) \
    case 4: tile(4, __VA_ARGS__); break; \
    case 5: tile(5, __VA_ARGS__); break; \
    case 6: tile(6, __VA_ARGS__); break; \
    case 7: tile(7, __VA_ARGS__); break;
#else
#define MORE_ROWS(tile, ...)
#endif
#define BY_ROWS(left, tile, ...) \
    switch (left) { \
        case 1: tile(1, __VA_ARGS__); break; \
        case 2: tile(2, __VA_ARGS__); break; \
        case 3: tile(3, __VA_ARGS__); break; \
        MORE_ROWS(tile, __VA_ARGS__) \
        default: tile(ROWS, __VA_ARGS__); \
    }
