// y = x W^T for few rows of x on Hopper. `linear_cluster.py` launches it and says what each argument is.
//
// A cluster of programs has a tile of 64 rows of the matrix; each multiplies its share of the depth:
//
//     weights (64 rows x 128 bytes a step)  M of the matrix instruction, asked for before the kernels in front have ended
//     tokens  (TOKENS, padded)              N of it; FP8 sums are promoted to float32 every 128 columns
//
// What they found is added up by tokens: each program sends every other, through distributed shared memory, its sums for two
// neighbouring tokens at a time, and finishes the tokens that are its own.
//
// Defined by the compiler's options: TOKENS 8, 16, 32 or 64; ELEMENT 0 E4M3 with scales, 1 BF16, 2 float16; HALVES 2: W holds N
// gate rows, then N up rows; OUT, OTHER, RESIDUAL, NORM: Bf16, Half or float; PDL: where the next kernel
// may start, 1 at once, 2 when all that is read is there (`triton.launch.START_NEXT`).
#include "hopper.cuh"
#include "row_products.cuh"

using Out = OUT;

static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32 || TOKENS == 64);

constexpr int ROWS = 64;
constexpr int BYTES = 128;  // of a row, in a step
constexpr int CONSUMERS = 128, THREADS = CONSUMERS + 32;
constexpr int WARPS = CONSUMERS / 32;
constexpr bool SCALED = ELEMENT == 0;
constexpr int WEIGHT_BYTES = HALVES * ROWS * BYTES, TOKEN_BYTES = TOKENS * BYTES, STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
constexpr int SUMS = TOKENS / 2;  // of a thread
constexpr int PAIR_BYTES = ROWS * 2 * 4;  // sums of two tokens
constexpr int IN_FLIGHT = TOKENS * HALVES > 64 ? 1 : TOKENS * HALVES > 16 ? 2 : 4;  // steps; what they find needs registers

struct Ends {  // what happens at both ends of the product: `row_product.RowProduct`
    Out* out;
    const OTHER* other;
    RESIDUAL* residual;
    const NORM* norm;
    const float* squares;
    float* squares_out;
    long long out_row, other_row, residual_row;
    float factor, eps;
    int parts, normed;
};

struct Sizes {
    int tokens, rows, depth;
    int scale_row;  // of x_scale
    int steps;      // of 128 bytes, along the depth; in FP8 each has a scale
    int share;      // of them a program's, the last one's may be fewer
    int stages;
    int each;       // pairs of tokens that a program finishes
};

// Which stage of the ring comes next, and the parity of its barriers' phase. Dividing would take longer than a step.
struct Turn {
    int stage = 0;
    u32 parity = 0;

    __device__ void advance(const Sizes& s) {
        if (++stage == s.stages) stage = 0, parity ^= 1;
    }
};

// This program's part, and where things lie in its shared memory, which is the same in all programs of a cluster.
struct Program {
    int rank, size;  // in its cluster
    int tile;
    int low, span;   // its steps
    int pairs;       // of tokens that it finishes
    u32 ring, there, empty, received, sums;
    float *scales, *norms;
};

// Asks for a step's weights, or tokens.
__device__ inline void ask_weights(const Program& p, const TensorMap& w_box, const Sizes& s, int step, int stage) {
    const int row = p.tile * ROWS, column = (p.low + step) * (SCALED ? BYTES : BYTES / 2);
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
        async_load(w_box, column, row + half * s.rows, p.ring + stage * STAGE_BYTES + half * ROWS * BYTES, p.there + 8 * stage);
}
__device__ inline void ask_tokens(const Program& p, const TensorMap& x_box, int step, int stage) {
    const int column = (p.low + step) * (SCALED ? BYTES : BYTES / 2);
    async_load(x_box, column, 0, p.ring + stage * STAGE_BYTES + WEIGHT_BYTES, p.there + 8 * stage);
}

// One thread: weights as far as there is room, then, once the kernels in front have ended, everything.
__device__ inline void ask(const Program& p, const TensorMap& x_box, const TensorMap& w_box, const Sizes& s) {
    const int first = min(s.stages, p.span);
    for (int step = 0; step < first; ++step) {
        barrier_expect(p.there + 8 * step, STAGE_BYTES);
        ask_weights(p, w_box, s, step, step);
    }
    fetch_map(x_box);
    wait_for_inputs();
    for (int step = 0; step < first; ++step) ask_tokens(p, x_box, step, step);
    Turn turn;
    for (int step = s.stages; step < p.span; ++step, turn.advance(s)) {
        barrier_wait(p.empty + 8 * turn.stage, turn.parity);
        barrier_expect(p.there + 8 * turn.stage, STAGE_BYTES);
        ask_weights(p, w_box, s, step, turn.stage);
        ask_tokens(p, x_box, step, turn.stage);
    }
}

// The matrix's scales of all steps, and what they are with the tokens': [half][step][TOKENS].
__device__ inline void load_weight_scales(const Program& p, const Sizes& s, const float* w_scale, float* found) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        const float* row = w_scale + (p.tile * ROWS + half * s.rows) / 128 * s.steps + p.low;
        for (int step = threadIdx.x; step < p.span; step += CONSUMERS) found[half * p.span + step] = row[step];
    }
}
__device__ inline void load_token_scales(const Program& p, const Sizes& s, const float* x_scale, const float* of_weights) {
    constexpr int APART = CONSUMERS / TOKENS, AT_ONCE = 8;
    const int token = threadIdx.x % TOKENS;
    for (int begin = threadIdx.x / TOKENS; begin < p.span; begin += AT_ONCE * APART) {
        // All are asked for before the first is waited for.
        float of_token[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int step = begin + n * APART;
            const bool inside = step < p.span && token < s.tokens;
            of_token[n] = inside ? x_scale[(long long)(p.low + step) * s.scale_row + token] : 0.f;
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int step = begin + n * APART;
            if (step >= p.span) break;
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                const int i = half * p.span + step;
                p.scales[i * TOKENS + token] = of_token[n] * of_weights[i];
            }
        }
    }
}
// Factors of x's norm, of this program's own tokens.
__device__ inline void load_norms(const Program& p, const Sizes& s, const Ends& ends) {
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < 2 * p.pairs; i += WARPS) {
        const int token = 2 * p.rank * s.each + i;
        float sum = 0;
        if (token < s.tokens)
            for (int part = lane; part < ends.parts; part += 32) sum += ends.squares[(long long)part * s.tokens + token];
#pragma unroll
        for (int away = 16; away; away /= 2) sum += __shfl_xor_sync(~0u, sum, away);
        if (lane == 0) p.norms[i] = rsqrtf(sum / s.depth + ends.eps);
    }
}

// A step's products, in flight behind this.
__device__ inline void multiply(const Program& p, const Turn& turn, float (&found)[HALVES][SUMS], bool add) {
    barrier_wait(p.there + 8 * turn.stage, turn.parity);
    const u32 at = p.ring + turn.stage * STAGE_BYTES;
    const u64 tokens = matrix_descriptor(at + WEIGHT_BYTES);
    products_begin();
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        const u64 rows = matrix_descriptor(at + half * ROWS * BYTES);
#pragma unroll
        for (int k = 0; k < 4; ++k) mma(found[half], rows + 2 * k, tokens + 2 * k, add || k > 0);
    }
    products_commit();
}

__device__ inline void release(const Program& p, int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(p.empty + 8 * stage);
}

// Tensor cores add E4M3 products up in fewer bits than float32: a step's sums are promoted.
__device__ inline void promote(const Program& p, int step, float (&sums)[HALVES][SUMS], float (&found)[HALVES][SUMS]) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        products_there(found[half]);
        const float2* scales = (const float2*)(p.scales + (half * p.span + step) * TOKENS) + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            const float2 scale = scales[4 * j];
            sums[half][4 * j] += found[half][4 * j] * scale.x;
            sums[half][4 * j + 1] += found[half][4 * j + 1] * scale.y;
            sums[half][4 * j + 2] += found[half][4 * j + 2] * scale.x;
            sums[half][4 * j + 3] += found[half][4 * j + 3] * scale.y;
        }
    }
}

// Sums of the steps from I on, of as many in flight as there are.
template <int Steps, int I = 0>
__device__ inline void settle(const Program& p, const Sizes& s, Turn& turn, int step, float (&sums)[HALVES][SUMS],
                              float (&found)[Steps][HALVES][SUMS]) {
    if constexpr (I < Steps) {
        products_wait<Steps - 1 - I>();
        release(p, turn.stage);
        turn.advance(s);
        promote(p, step + I, sums, found[I]);
        settle<Steps, I + 1>(p, s, turn, step, sums, found);
    }
}

// So many steps' products in flight, then their sums, one after the other.
template <int Steps>
__device__ inline void add_promoted(const Program& p, const Sizes& s, Turn& turn, int step, float (&sums)[HALVES][SUMS]) {
    float found[Steps][HALVES][SUMS] = {};
    Turn ahead = turn;
#pragma unroll
    for (int i = 0; i < Steps; ++i, ahead.advance(s)) multiply(p, ahead, found[i], false);
    settle(p, s, turn, step, sums, found);
}

// The sums of this program's share of the tile.
__device__ inline void add_steps(const Program& p, const Sizes& s, float (&sums)[HALVES][SUMS]) {
    Turn turn;
    int step = 0;
    if constexpr (SCALED) {
        for (; step + IN_FLIGHT <= p.span; step += IN_FLIGHT) add_promoted<IN_FLIGHT>(p, s, turn, step, sums);
        if constexpr (IN_FLIGHT > 1)
            for (; step < p.span; ++step) add_promoted<1>(p, s, turn, step, sums);
    } else {
        for (int before = 0; step < p.span; ++step, before = turn.stage, turn.advance(s)) {
            multiply(p, turn, sums, step > 0);
            products_wait<1>();
            if (step > 0) release(p, before);
        }
        products_wait<0>();
#pragma unroll
        for (int half = 0; half < HALVES; ++half) products_there(sums[half]);
    }
}

// To each program its tokens' sums. A thread has, of every eight tokens, two neighbours and the rows g and g + 8 of its warp's
// sixteen: 16 bytes at a time, straight from registers.
__device__ inline void send(const Program& p, const Sizes& s, float (&sums)[HALVES][SUMS]) {
    const int row = threadIdx.x / 32 * 8 + threadIdx.x % 32 / 4;
    const int inverse = (65535 + s.each) / s.each;  // of 65,536ths: exact for up to 32 pairs
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
        const int pair = 4 * j + threadIdx.x % 4;
        if (2 * pair >= s.tokens) continue;
        const int target = pair * inverse >> 16, slot = pair - target * s.each;
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const u32 place = p.sums + ((half * p.size + p.rank) * s.each + slot) * PAIR_BYTES + row * 16;
            const float* found = sums[half] + 4 * j;
            remote_store(remote_address(place, target), found[0], found[1], found[2], found[3],
                         remote_address(p.received, target));
        }
    }
}

__device__ inline float silu(float x) { return x / (1.f + __expf(-x)); }
__device__ inline float as_out(float x) { return to_float(rounded<Out>(x)); }

// y of two tokens and two rows, as `linear_streamed` finishes a product.
__device__ inline void finish(const Sizes& s, const Ends& ends, float (&y)[2][2], int tile, int row, int token) {
    float squares[2] = {};
    const bool normed = ends.norm && tile * ROWS < ends.normed;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const int m = token + b;
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            const int n = tile * ROWS + row + 8 * a;
            if (n >= s.rows || m >= s.tokens) continue;
            float value = as_out(y[a][b]);
            if (ends.other) value = as_out((value + to_float(ends.other[m * ends.other_row + n])) * ends.factor);
            if (ends.residual) {
                // The sum has the stream's dtype, as an addition of its own would leave it.
                RESIDUAL* at = ends.residual + m * ends.residual_row + n;
                value = as_out(value + to_float(*at));
                *at = rounded<RESIDUAL>(value);
            }
            if (normed) {
                squares[b] += value * value;
                value *= to_float(ends.norm[n]);
            }
            ends.out[m * ends.out_row + n] = rounded<Out>(value);
        }
    }
    if (!normed) return;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int away = 16; away; away /= 2) squares[b] += __shfl_xor_sync(~0u, squares[b], away);
        if (threadIdx.x % 32 == 0 && token + b < s.tokens) ends.squares_out[(long long)tile * s.tokens + token + b] = squares[b];
    }
}

// Adds up what the cluster's programs found, in their order, for this program's tokens: a warp a pair.
__device__ inline void add_and_finish(const Program& p, const Sizes& s, const Ends& ends, const u8* memory) {
    const int lane = threadIdx.x % 32;
    const int row = lane / 8 * 16 + lane % 8;
    for (int slot = threadIdx.x / 32; slot < p.pairs; slot += WARPS) {
        float y[HALVES][2][2] = {};
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
#pragma unroll 8
            for (int from = 0; from < p.size; ++from) {
                const u32 place = p.sums - p.ring + ((half * p.size + from) * s.each + slot) * PAIR_BYTES + lane * 16;
                const float4 part = *(const float4*)(memory + place);
                y[half][0][0] += part.x, y[half][0][1] += part.y, y[half][1][0] += part.z, y[half][1][1] += part.w;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (ends.parts) y[half][i / 2][i % 2] *= p.norms[2 * slot + i % 2];
        }
        if constexpr (HALVES == 2) {
            // Rounded first, as a product of its own would leave them.
#pragma unroll
            for (int i = 0; i < 4; ++i) y[0][i / 2][i % 2] = silu(as_out(y[0][i / 2][i % 2])) * as_out(y[1][i / 2][i % 2]);
        }
        finish(s, ends, y[0], p.tile, row, 2 * (p.rank * s.each + slot));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    linear_cluster(const __grid_constant__ TensorMap x_box, const __grid_constant__ TensorMap w_box, Out* out,
                   const float* x_scale, const float* w_scale, const OTHER* other, RESIDUAL* residual, const NORM* norm,
                   const float* squares, float* squares_out, int tokens, int rows, int depth, int scale_row, int steps, int share,
                   int stages, int each, long long out_row, long long other_row, long long residual_row, float factor, int parts,
                   float eps, int normed) {
    const Sizes s{tokens, rows, depth, scale_row, steps, share, stages, each};
    const Ends ends{out, other, residual, norm, squares, squares_out, out_row, other_row, residual_row, factor, eps, parts, normed};
    extern __shared__ __align__(1024) u8 memory[];
    Program p;
    p.rank = cluster_rank(), p.size = cluster_size(), p.tile = cluster_number();
    p.low = p.rank * share, p.span = min(share, steps - p.low);
    p.pairs = max(0, min(each, (tokens + 1) / 2 - p.rank * each));
    p.ring = shared_address(memory);
    p.there = p.ring + stages * STAGE_BYTES;
    p.empty = p.there + 8 * stages;
    p.received = p.empty + 8 * stages;
    p.sums = p.received + 16;
    p.scales = (float*)(memory + (p.sums - p.ring) + HALVES * p.size * each * PAIR_BYTES);
    p.norms = p.scales + (SCALED ? HALVES * share * TOKENS : 0);
    float* of_weights = p.norms + TOKENS;

    const bool asks = threadIdx.x == CONSUMERS;
    if (asks) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(p.there + 8 * i, 1);
            barrier_init(p.empty + 8 * i, WARPS);
        }
        barrier_init(p.received, 1);
        barriers_initialised();
        barrier_expect(p.received, HALVES * p.size * p.pairs * PAIR_BYTES);
    }
    if (PDL == 1) launch_dependents();
    __syncthreads();
    cluster_arrive();
    if (threadIdx.x >= CONSUMERS) {
        if (asks) ask(p, x_box, w_box, s);
        __syncwarp();
        cluster_wait();
        return;
    }
    if (SCALED) load_weight_scales(p, s, w_scale, of_weights);
    wait_for_inputs();
    if (SCALED) {
        named_barrier(1, CONSUMERS);
        load_token_scales(p, s, x_scale, of_weights);
    }
    if (parts) load_norms(p, s, ends);
    named_barrier(1, CONSUMERS);
    // All programs of the cluster have their barriers: sums may be sent.
    cluster_wait();
    float sums[HALVES][SUMS] = {};
    add_steps(p, s, sums);
    if (PDL == 2) launch_dependents();
    send(p, s, sums);
    if (p.pairs == 0) return;
    barrier_wait_for_cluster(p.received, 0);
    add_and_finish(p, s, ends, memory);
}
