// The scores warpgroup of `mla_decode_cluster.cu`: S, softmax and P of its CTA's 64 rows.
#pragma once
#include "mla_plan.cuh"
#include "mla_products.cuh"

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ u32 add_f16x2(u32 a, u32 b) {
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

// Is one of two FP16 larger?
__device__ __forceinline__ bool exceeds(u32 a, u32 b) {
    u32 larger;
    asm("{\n"
        ".reg .pred low, high;\n"
        "setp.gtu.f16x2 low|high, %1, %2;\n"
        "or.pred low, low, high;\n"
        "selp.u32 %0, 1, 0, low;\n"
        "}"
        : "=r"(larger)
        : "r"(a), "r"(b));
    return larger;
}

// Of a row, which a quad of lanes has.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// What a thread of the scores knows of its two rows, g and g + 8 of its warp's sixteen.
struct Softmax {
    float factor[2];  // to log2 units
    int visible[2];   // keys that the row may see
    float top[2];     // reference
    float total[2];   // of this thread's keys
};

// This thread's part of a warp's 16 rows of rotary queries, as the first operand of four products.
__device__ __forceinline__ void load_rotary(u32 (&rotary)[16], const u32* q_rope, int sequence, int row, int rows) {
    int t = threadIdx.x % 4;
    for (int i = 0; i < 16; ++i) {
        int own = row + i % 2 * 8;
        int pair = i / 4 * 8 + i / 2 % 2 * 4 + t;
        rotary[i] = own < rows ? q_rope[(long long)(sequence * rows + own) * (ROPE / 2) + pair] : 0;
    }
}

// The sums of FP8 products are kept to some 14 bits below the largest addend, those of BF16 products in full: where the rotary
// part comes last, what it adds is not in the way of the latent's.
#ifndef LATENT_FIRST
#define LATENT_FIRST 0
#endif
constexpr int FIRST_ROTARY = LATENT_FIRST ? PRODUCTS - ROTARY_PRODUCTS : 0;
constexpr int FIRST_LATENT = LATENT_FIRST ? 0 : ROTARY_PRODUCTS;

// Q K^T of one page, unscaled: sixteen products of the latent and four of the rotary part.
template <int FROM, int TO>
__device__ __forceinline__ void multiply_page(float (&raw)[32], const u32 (&rotary)[16], u32 shared, u32 stage) {
    u64 rope = matrix_descriptor(shared + ROPE_AT + stage * ROPE_BYTES);
    u64 content = matrix_descriptor(shared + CONTENT_AT + stage * CONTENT_BYTES);
    u64 queries = matrix_descriptor(shared + QUERY_AT);
    if (FROM < TO) products_begin();
#pragma unroll
    for (int i = FROM; i < TO; ++i) {
        int latent = i - FIRST_LATENT, turned = i - FIRST_ROTARY;
        if (turned >= 0 && turned < ROTARY_PRODUCTS) {
            if (i == 0) multiply_bf16<false>(raw, rotary, rope);
            if (i > 0) multiply_bf16<true>(raw, rotary + 4 * turned, rope + turned * STEP);
        } else {
            u64 along = latent / 4 * (PANEL_BYTES >> 4) + latent % 4 * STEP;
            if (i == 0) multiply_e4m3<false>(raw, queries, content);
            if (i > 0) multiply_e4m3<true>(raw, queries + along, content + along);
        }
    }
    if (FROM < TO && TO == PRODUCTS) products_commit();
}

// A thread's sixteen keys' scales, which are powers of two. A page never written has zeros there, which masked keys survive.
struct Scales {
    uint2 keys[8];

    __device__ __forceinline__ void load(u32 from) {
#pragma unroll
        for (int i = 0; i < 8; ++i) keys[i] = load_shared_pair(from + i * 32);
    }
    __device__ __forceinline__ u32 bits(int i) const { return i % 2 ? keys[i / 4].y : keys[i / 4].x; }
    __device__ __forceinline__ float of(int i) const { return __uint_as_float(bits(i)); }
    __device__ __forceinline__ float reciprocal_of(int i) const { return __uint_as_float(0x7F000000 - bits(i)); }
    // By putting the exponent behind the bits of 2^23.
    __device__ __forceinline__ float log2_of(int i) const {
        return __uint_as_float(__funnelshift_r(bits(i), 0x4B000000 >> 9, 23)) - (8388608.0f + 127.0f);
    }
};

// Keys that a row may not see.
__device__ __forceinline__ void hide(float (&logits)[32], const Softmax& rows, int page_key) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        int key = page_key + i / 4 * 8 + t * 2 + i % 2;
        if (key >= rows.visible[i / 2 % 2]) logits[i] = minus_infinity();
    }
}

// P with the references as they are, FP16 pairs of keys (row g in even places, row g + 8 in odd ones), and the rows' sums. A
// key's scale multiplies P and not the sums. -> is P too large?
__device__ __forceinline__ bool exponentiate(const float (&logits)[32], const Scales& scales, u32 (&p)[16], float (&sum)[2]) {
    u32 both[2];
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        int half = i / 2 % 2;
        float low = exp2_fast(logits[i]), high = exp2_fast(logits[i + 1]);
        sum[half] = i < 4 ? low + high : sum[half] + (low + high);
        p[i / 2] = pack_f16(low * scales.of(i), high * scales.of(i + 1));
        both[half] = i < 4 ? p[i / 2] : add_f16x2(both[half], p[i / 2]);
    }
    return exceeds(add_f16x2(both[0], both[1]), MOST_P);
}

// Rare: some P are too large. The references of rows whose logits exceed them by more than LAG follow those; alpha is what
// earlier sums are worth then. A piece begins with references so low that its first page comes here.
__device__ __forceinline__ void follow_logits(const float (&raw)[32], u32 from, Softmax& rows, bool hidden, int page_key,
                                              u32 (&p)[16], float (&alpha)[2], float (&sum)[2]) {
    Scales scales;
    scales.load(from);
    float logits[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) logits[i] = fmaf(raw[i], scales.of(i) * rows.factor[i / 2 % 2], scales.log2_of(i));
    if (hidden) hide(logits, rows, page_key);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float best = logits[2 * half];
#pragma unroll
        for (int i = 0; i < 32; i += 4) best = fmaxf(best, fmaxf(logits[i + 2 * half], logits[i + 2 * half + 1]));
        best = quad_max(best);
        float top = best > rows.top[half] + LAG ? best : rows.top[half];
        alpha[half] = exp2_fast(rows.top[half] - top);
        rows.top[half] = top;
    }
    // Not as above: where logits are huge, a scale's logarithm is lost beside them, and P must be at most 2^LAG all the same.
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        int half = i / 2 % 2;
        float low = exp2_fast(logits[i] - rows.top[half]), high = exp2_fast(logits[i + 1] - rows.top[half]);
        float both = low * scales.reciprocal_of(i) + high * scales.reciprocal_of(i + 1);
        sum[half] = i < 4 ? both : sum[half] + both;
        p[i / 2] = pack_f16(low, high);
    }
}

// A warp's 16 rows of P and alpha to this CTA's shared memory.
__device__ __forceinline__ void write_probabilities(const u32 (&p)[16], const float (&alpha)[2], u32 shared, u32 rank, u32 step) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    u32 buffer = step % BUFFERS;
    u32 row = shared + P_AT + buffer * P_BYTES + (rank * ROW_TILE + warp * 16 + lane / 8 % 2 * 8 + lane % 8) * P_ROW_BYTES;
    u32 in_row = (lane / 16 ^ lane % 8) << 4;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        store_matrices(row + (in_row ^ i << 5), p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]);
    }
    u32 alphas = shared + ALPHA_AT + (buffer * 2 + rank) * ALPHA_BYTES;
    u32 moved = __any_sync(~0u, alpha[0] < 1.0f || alpha[1] < 1.0f) != 0;
    if (lane % 4 == 0) {
        store_shared(alphas + (warp * 16 + lane / 4) * 4, __float_as_uint(alpha[0]));
        store_shared(alphas + (warp * 16 + lane / 4 + 8) * 4, __float_as_uint(alpha[1]));
    }
    if (lane == 0) store_shared(alphas + (ROW_TILE + warp) * 4, moved);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared + WRITTEN_AT + 8 * buffer);
}

// End of a piece: log-sum-exps for whoever merges, if the sequence has other pieces, then reciprocal sums for both CTAs.
__device__ __forceinline__ void publish_sums(const Softmax& rows, const Piece& piece, const Results& results, int row, u32 shared,
                                             u32 other, u32 rank) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    wait_for(shared + SUMS_EMPTY_AT, piece.number + 1);
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float total = quad_sum(rows.total[half]);
        int own = row + half * 8;
        if (lane % 4 == 0) {
            if (!piece.whole() && own < results.rows) {
                float sum = total > 0 ? rows.top[half] + __log2f(total) : minus_infinity();
                results.lse[(long long)piece.slot() * results.rows + own] = sum;
            }
            u32 inverse = __float_as_uint(total > 0 ? 1.0f / total : 0.0f);
            u32 place = INVERSE_AT + (rank * ROW_TILE + warp * 16 + half * 8 + lane / 4) * 4;
            store_shared(shared + place, inverse);
            remote_store(other + place, inverse, other + SUMS_FULL_AT);
        }
    }
    __syncwarp();
    if (lane == 0) barrier_expect(shared + SUMS_FULL_AT, 16 * 4);
}

// One warpgroup: S, softmax and P of this CTA's rows.
struct Scores {
    u32 shared, rank;
    u32 rotary[16];
    Softmax rows;
    int least;  // keys that all rows may see

    // Of the page at hand:
    float raw[32];
    Scales scales;
    bool there;  // the page behind it
    bool free;   // the buffer of its probabilities: the step that had it is two back, its stage two on

    __device__ __forceinline__ u32 from(u32 step) const {
        return shared + SCALE_AT + step % STAGES * SCALE_BYTES + threadIdx.x % 4 * 8;
    }

    // What takes long to learn, and is asked for while products run.
    __device__ __forceinline__ void look_ahead(u32 step) {
        scales.load(from(step));
        there = passed(shared + FULL_AT + 8 * ((step + 1) % STAGES), (step + 1) / STAGES);
        free = passed(shared + DONE_AT + 8 * ((step + 2) % STAGES), (step + 2) / STAGES + 1);
    }

    // Page `index`, whose products have been asked for. MORE: the piece has another.
    template <bool MORE>
    __device__ __forceinline__ void finish_page(int index, u32 step) {
        u32 next = (step + 1) % STAGES;
        int page_key = index * PAGE;
        bool hidden = least - page_key < PAGE;
        u32 p[16];
        float alpha[2] = {1.0f, 1.0f}, sum[2], logits[32];
        products_wait<0>();
        if (!MORE && threadIdx.x % 32 == 0) barrier_arrive(shared + Q_EMPTY_AT);
#pragma unroll
        for (int i = 0; i < 32; ++i) logits[i] = fmaf(raw[i], scales.of(i) * rows.factor[i / 2 % 2], -rows.top[i / 2 % 2]);
        if (hidden) hide(logits, rows, page_key);
        bool exceeded = exponentiate(logits, scales, p, sum);
        if (__any_sync(~0u, exceeded)) follow_logits(raw, from(step), rows, hidden, page_key, p, alpha, sum);
#pragma unroll
        for (int half = 0; half < 2; ++half) rows.total[half] = rows.total[half] * alpha[half] + sum[half];
        if (MORE) {
            if (!there) wait_for(shared + FULL_AT + 8 * next, (step + 1) / STAGES);
            multiply_page<0, BEFORE_P>(raw, rotary, shared, next);
        }
        if (!free) wait_for(shared + DONE_AT + 8 * ((step + 2) % STAGES), (step + 2) / STAGES + 1);
        write_probabilities(p, alpha, shared, rank, step);
        if (MORE) {
            look_ahead(step + 1);
            multiply_page<BEFORE_P, BEFORE_TURN>(raw, rotary, shared, next);
        }
        if (threadIdx.x % 32 == 0) barrier_arrive(shared + TURN_AT + 8 * (step % BUFFERS));
        if (MORE) multiply_page<BEFORE_TURN, PRODUCTS>(raw, rotary, shared, next);
    }
};

__device__ __forceinline__ void keep_scores(const Plan& plan, const Results& results, const u32* q_rope, const float* q_scale,
                                            float scale_log2, int heads, u32 shared, u32 other, u32 rank, int first_row) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    int row = first_row + warp * 16 + lane / 4;
    u32 step = 0;
    Scores scores;
    scores.shared = shared;
    scores.rank = rank;
    for_each_piece(plan, [&](const Piece& piece) {
        Softmax& rows = scores.rows;
        scores.least = piece.keys - results.rows / heads + 1;
        for (int half = 0; half < 2; ++half) {
            int own = row + half * 8;
            rows.factor[half] = own < results.rows ? q_scale[piece.sequence * results.rows + own] * scale_log2 : 0.0f;
            rows.visible[half] = scores.least + own / heads;
            rows.top[half] = -1.0e30f;
            rows.total[half] = 0.0f;
        }
        load_rotary(scores.rotary, q_rope, piece.sequence, row, results.rows);
        wait_for(shared + Q_FULL_AT, piece.number);
        wait_for(shared + FULL_AT + 8 * (step % STAGES), step / STAGES);
        multiply_page<0, PRODUCTS>(scores.raw, scores.rotary, shared, step % STAGES);
        scores.look_ahead(step);
        int index = piece.first;
#pragma unroll 1
        for (; index + 1 < piece.last; ++index, ++step) scores.finish_page<true>(index, step);
        scores.finish_page<false>(index, step++);
        publish_sums(rows, piece, results, row, shared, other, rank);
    });
}
