/* What a decode step does beside its products: norms, gates, rotary, attention over paged keys and values. float32. */
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* e^x with a relative error below 3e-7, in a form that compilers vectorise: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = floorf(x * 1.44269504f + 0.5f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } scale = {.bits = ((int32_t)n + 127) << 23};
    return p * scale.value;
}

/* residual += delta where delta is given; out = residual / sqrt(mean(residual²) + eps) · weight. All [rows, size]. */
void fluent_rms_norm(const float *delta, float *residual, const float *weight, float *out, long rows, long size, float eps) {
    for (long t = 0; t < rows; t++) {
        float *x = residual + t * size, *y = out + t * size;
        float squares = 0;
        if (delta) {
            const float *d = delta + t * size;
            for (long i = 0; i < size; i++) x[i] += d[i];
        }
        for (long i = 0; i < size; i++) squares += x[i] * x[i];
        const float inverse = 1.0f / sqrtf(squares / size + eps);
        for (long i = 0; i < size; i++) y[i] = x[i] * inverse * weight[i];
    }
}

/* gate_up [rows, 2 · size] → out [rows, size] = silu(gate) · up. */
void fluent_silu_mul(const float *gate_up, float *out, long rows, long size) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (long t = 0; t < rows; t++) {
        const float *gate = gate_up + 2 * t * size, *up = gate + size;
        float *y = out + t * size;
        for (long i = 0; i < size; i++) y[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
}

/* x [rows, heads, size], `stride` values from row to row → out, contiguous; cos and sin [rows, size]; pairs (i, i + size / 2). */
void fluent_rotary(
    const float *x, const float *cosines, const float *sines, float *restrict out, long rows, long heads, long size, long stride) {
    const long half = size / 2;
    for (long t = 0; t < rows; t++) {
        const float *c = cosines + t * size, *s = sines + t * size;
        for (long h = 0; h < heads; h++) {
            const float *a = x + t * stride + h * size, *b = a + half;
            float *restrict y = out + (t * heads + h) * size;
            for (long i = 0; i < half; i++) {
                y[i] = a[i] * c[i] + b[i] * s[i];
                y[half + i] = b[i] * c[half + i] + a[i] * s[half + i];
            }
        }
    }
}

typedef struct {
    long sequences, queries; /* rows are sequences × queries, the queries of a sequence one after the other */
    long heads, kv_heads, size;
    long q_stride, k_stride, v_stride; /* values from row to row */
    long page_size, page_stride;       /* page_stride: page numbers from sequence to sequence */
    long first_key;                    /* keys before it are not seen, but by rows before it, whose result means nothing */
    float scale;
} Shape;

/* Asks for `values` floats from p on, which are read soon. */
static inline __attribute__((always_inline)) void fetch(const float *p, const long values) {
    for (long i = 0; i < values; i += 16) __builtin_prefetch(p + i);
}

/* One row's query heads of `count` key-value heads. `size` is a constant where it can be, so that sums stay in registers.
 * queries, key, value, out: those of the first head, key and value in pool row 0; scores: room for count × group × keys.
 * Page by page for all heads, because a page is read from memory once and then lies in the cache; what is computed on one page
 * hides the reading of the next. */
static inline __attribute__((always_inline)) void attend(
    const Shape *shape, const long size, const long count, const float *queries, const float *key, const float *value,
    const int32_t *table, long keys, float *scores, float *out) {
    const long group = shape->heads / shape->kv_heads, row_size = shape->kv_heads * size, page_size = shape->page_size;
    const long heads = count * group, pages = (keys + page_size - 1) / page_size;
    for (long n = 0; n < pages; n++) {
        const long first = n * page_size, filled = keys - first < page_size ? keys - first : page_size;
        const float *page = key + table[n] * page_size * row_size;
        const float *next = n + 1 < pages ? key + table[n + 1] * page_size * row_size : value + table[0] * page_size * row_size;
        for (long j = 0; j < filled; j++) {
            fetch(next + j * row_size, count * size);
            for (long h = 0; h < heads; h++) {
                const float *query = queries + h * size, *x = page + j * row_size + h / group * size;
                float dot = 0;
                for (long i = 0; i < size; i++) dot += query[i] * x[i];
                scores[h * keys + first + j] = dot * shape->scale;
            }
        }
    }
    for (long h = 0; h < heads; h++) {
        float *s = scores + h * keys, largest = -FLT_MAX, sum = 0;
        const long unseen = shape->first_key < keys ? shape->first_key : 0;
        for (long j = 0; j < unseen; j++) s[j] = 0;
        for (long j = unseen; j < keys; j++) largest = s[j] > largest ? s[j] : largest;
        for (long j = unseen; j < keys; j++) {
            s[j] = exponential(s[j] - largest);
            sum += s[j];
        }
        for (long j = 0; j < keys; j++) s[j] /= sum;
    }
    memset(out, 0, heads * size * sizeof(float));
    for (long n = 0; n < pages; n++) {
        const long first = n * page_size, filled = keys - first < page_size ? keys - first : page_size;
        const float *page = value + table[n] * page_size * row_size;
        const float *next = n + 1 < pages ? value + table[n + 1] * page_size * row_size : page;
        for (long h = 0; h < heads; h++) {
            const float *s = scores + h * keys + first, *x = page + h / group * size;
            /* The heads that share values share the asking. */
            for (long j = h % group; j < filled; j += group) fetch(next + j * row_size + h / group * size, size);
            float *y = out + h * size, total[size];
            for (long i = 0; i < size; i++) total[i] = y[i];
            for (long j = 0; j < filled; j++)
                for (long i = 0; i < size; i++) total[i] += s[j] * x[j * row_size + i];
            for (long i = 0; i < size; i++) y[i] = total[i];
        }
    }
}

/* Write k and v [rows, kv_heads, size] to pool rows kv_rows [rows], and attend: query j of sequence n sees the positions
 * first_key … positions[n, j]. Pools [pool rows, kv_heads, size]; pages [sequences, page_stride]; out [rows, heads, size].
 * Returns 0, or 1 if there is no memory for the scores. */
int fluent_decode_attention(
    const Shape *shape, const float *q, const float *k, const float *v, float *pool_k, float *pool_v, const int64_t *kv_rows,
    const int32_t *pages, const int64_t *positions, float *out) {
    const long heads = shape->heads, kv_heads = shape->kv_heads, size = shape->size, group = heads / kv_heads;
    const long rows = shape->sequences * shape->queries, row_size = kv_heads * size;
    long longest = 0;
    /* Serial, and all of it before anything is read: rows that belong to nobody share the scratch page. */
    for (long t = 0; t < rows; t++) {
        memcpy(pool_k + kv_rows[t] * row_size, k + t * shape->k_stride, row_size * sizeof(float));
        memcpy(pool_v + kv_rows[t] * row_size, v + t * shape->v_stride, row_size * sizeof(float));
        if (positions[t] >= longest) longest = positions[t] + 1;
    }
    /* Threads share the rows, or, if those are too few, the key-value heads too. */
    const long count = rows < omp_get_max_threads() ? 1 : kv_heads, splits = kv_heads / count;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *scores = malloc(count * group * longest * sizeof(float));
        failed = scores == NULL;
#pragma omp for schedule(static)
        for (long part = 0; part < rows * splits; part++) {
            if (failed) continue;
            const long t = part / splits, head = part % splits * count, keys = positions[t] + 1;
            const int32_t *table = pages + t / shape->queries * shape->page_stride;
            const float *queries = q + t * shape->q_stride + head * group * size;
            const float *key = pool_k + head * size, *value = pool_v + head * size;
            float *y = out + (t * heads + head * group) * size;
            switch (size) {
                case 64: attend(shape, 64, count, queries, key, value, table, keys, scores, y); break;
                case 128: attend(shape, 128, count, queries, key, value, table, keys, scores, y); break;
                default: attend(shape, size, count, queries, key, value, table, keys, scores, y);
            }
        }
        free(scores);
    }
    return failed;
}
