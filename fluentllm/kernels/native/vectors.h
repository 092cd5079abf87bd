/* A tile's 16 lanes as the CPU has them: two vectors of 8 (AVX2) or one of 16 (AVX-512). Included by products.c only. */
#include <immintrin.h>
#include <stdint.h>

#define TILE 16

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define VECTORS 1
#define LANES 16
#define ROWS 8 /* activations that share one decoding of the weights: as many as there are registers for */
typedef __m512 floats;
typedef __m512i ints;
#define zero() _mm512_setzero_ps()
#define all(x) _mm512_set1_ps(x)
#define load(p) _mm512_loadu_ps(p)
#define store(p, v) _mm512_storeu_ps(p, v)
#define halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define bytes_unsigned(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define bytes_signed(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define low_nibbles(v) _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(15)))
#define high_nibbles(v) _mm512_cvtepi32_ps(_mm512_srli_epi32(v, 4))
#define to_floats(v) _mm512_cvtepi32_ps(v)
#else
#define VECTORS 2
#define LANES 8
#define ROWS 4
typedef __m256 floats;
typedef __m256i ints;
#define zero() _mm256_setzero_ps()
#define all(x) _mm256_set1_ps(x)
#define load(p) _mm256_loadu_ps(p)
#define store(p, v) _mm256_storeu_ps(p, v)
#define halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define bytes_unsigned(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define bytes_signed(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define low_nibbles(v) _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15)))
#define high_nibbles(v) _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 4))
#define to_floats(v) _mm256_cvtepi32_ps(v)
#endif
