// A values warpgroup of `mla_decode_cluster.cu`: 128 columns of the output of the cluster's 128 rows.
#pragma once
#include "mla_plan.cuh"
#include "mla_products.cuh"

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Where this thread reads V in a panel of 64 keys x 128 columns: columns 32 warp + 4 g ... + 3 of keys 2 t and 2 t + 1. Eight
// lanes read 32 contiguous bytes of each of four keys, which do not meet in a bank of the 128-byte swizzle.
struct Reading {
    u32 even, odd;
};

__device__ __forceinline__ Reading place_in_panel() {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    u32 g = lane / 4, t = lane % 4;
    u32 chunk = 2 * warp + g / 4;
    u32 even = 2 * t, odd = 2 * t + 1;
    return {even * PANEL + ((chunk ^ even) << 4) + g % 4 * 4, odd * PANEL + ((chunk ^ odd) << 4) + g % 4 * 4};
}

__device__ __forceinline__ void widen(u32 pairs, u32& low, u32& high) {
    asm("{\n"
        ".reg .b16 a, b;\n"
        "mov.b32 {a, b}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, a;\n"
        "cvt.rn.f16x2.e4m3x2 %1, b;\n"
        "}"
        : "=r"(low), "=r"(high)
        : "r"(pairs));
}

// Of 16 keys, from FROM on: what this thread reads.
template <int FROM>
__device__ __forceinline__ void load_columns(u32 (&words)[4], u32 panel, const Reading& place) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = load_shared(panel + (FROM + i / 2 * 8) * PANEL + (i % 2 ? place.odd : place.even));
}

// V^T of these keys and a panel's 128 columns, as the first operand of two products. Which columns a product's rows stand for is
// ours to choose, so that what a thread has read is what it must hold: of its columns 4 g + j, j = 2 tile + half belongs to row
// g + 8 half of the tile's sixteen.
__device__ __forceinline__ void convert(u32 (&v)[8], const u32 (&words)[4]) {
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
        u32 even = words[2 * eight], odd = words[2 * eight + 1];
        widen(__byte_perm(even, odd, 0x5140), v[2 * eight], v[2 * eight + 1]);
        widen(__byte_perm(even, odd, 0x7362), v[4 + 2 * eight], v[4 + 2 * eight + 1]);
    }
}

// If the reference of a row has moved, what was summed before it must follow. Rare: see LAG.
__device__ __forceinline__ void follow_references(float (&left)[64], float (&right)[64], u32 shared, u32 buffer) {
    u32 lane = threadIdx.x % 32;
    u32 alphas = shared + ALPHA_AT + buffer * 2 * ALPHA_BYTES;
    u32 moved = load_shared(alphas + lane / 4 % 2 * ALPHA_BYTES + (ROW_TILE + lane % 4) * 4);
    if (__any_sync(~0u, moved)) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            uint2 alpha = load_shared_pair(alphas + i / 8 * ALPHA_BYTES + (i % 8 * 8 + lane % 4 * 2) * 4);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                left[4 * i + 2 * half] *= __uint_as_float(alpha.x);
                left[4 * i + 2 * half + 1] *= __uint_as_float(alpha.y);
                right[4 * i + 2 * half] *= __uint_as_float(alpha.x);
                right[4 * i + 2 * half + 1] *= __uint_as_float(alpha.y);
            }
        }
    }
}

__device__ __forceinline__ void store_four(float* target, float a, float b, float c, float d) {
    *(float4 *)target = float4{a, b, c, d};
}

__device__ __forceinline__ void store_four(u16* target, float a, float b, float c, float d) {
    *(uint2 *)target = uint2{pack_bf16(a, b), pack_bf16(c, d)};
}

// Normalised; `inverse`: where the reciprocal sums of this thread's rows begin, `count`: of its rows up to the last.
template <class T>
__device__ __forceinline__ void store_rows(const float (&left)[64], const float (&right)[64], T* target, int count, u32 inverse) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        int row = i / 2 * 8 + i % 2, at = i / 2 * 4 + i % 2;
        float by = __uint_as_float(load_shared(inverse + row * 4));
        if (row < count) {
            store_four(target + row * LATENT, left[at] * by, left[at + 2] * by, right[at] * by, right[at + 2] * by);
        }
    }
}

// End of a piece: to the output, or to the piece's slot. A thread has four neighbouring columns of a row.
__device__ __forceinline__ void write_columns(const float (&left)[64], const float (&right)[64], const Piece& piece,
                                              const Results& results, int row, int column, u32 shared, u32 other) {
    u32 lane = threadIdx.x % 32;
    int own = row + lane % 4 * 2;
    int count = results.rows - own;
    u32 inverse = shared + INVERSE_AT + lane % 4 * 8;
    bool whole = piece.whole();
    long long place = ((long long)(whole ? piece.sequence : piece.slot()) * results.rows + own) * LATENT + column;
    wait_for(shared + SUMS_FULL_AT, piece.number);
    if (whole && !results.out_is_float) {
        store_rows(left, right, (u16 *)results.out + place, count, inverse);
    } else {
        store_rows(left, right, (whole ? (float *)results.out : results.partial) + place, count, inverse);
    }
    __syncwarp();
    if (lane == 0) {
        barrier_arrive(shared + SUMS_EMPTY_AT);
        cluster_barrier_arrive(other + SUMS_EMPTY_AT);
    }
}

// O^T += V^T P^T of 16 keys.
__device__ __forceinline__ void multiply_block(float (&left)[64], float (&right)[64], const u32 (&v)[8], u64 p) {
    products_begin();
    multiply_f16(left, v, p);
    multiply_f16(right, v + 4, p);
    products_commit();
}

// One warpgroup: the output's columns [128 panel, 128 panel + 128) of the cluster's 128 rows.
__device__ __forceinline__ void keep_values(const Plan& plan, const Results& results, u32 panel, u32 shared, u32 other,
                                            int first_row) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Reading place = place_in_panel();
    int step = 0;
    for_each_piece(plan, [&](const Piece& piece) {
        float left[64], right[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) left[i] = right[i] = 0.0f;
        u32 words[4], v[2][8];
        wait_for(shared + FULL_AT + 8 * (step % STAGES), step / STAGES);
        load_columns<0>(words, shared + CONTENT_AT + step % STAGES * CONTENT_BYTES + panel * PANEL_BYTES, place);
        convert(v[0], words);
        for (int index = piece.first; index < piece.last; ++index, ++step) {
            u32 stage = step % STAGES, buffer = step % BUFFERS;
            u32 source = shared + CONTENT_AT + stage * CONTENT_BYTES + panel * PANEL_BYTES;
            u64 p = matrix_descriptor(shared + P_AT + buffer * P_BYTES);
            wait_for(shared + P_FULL_AT + 8 * buffer, step / BUFFERS);
            if (index > piece.first) follow_references(left, right, shared, buffer);
            wait_for(shared + TURN_AT + 8 * buffer, step / BUFFERS);
            // A block's columns are read and converted while the products of the one before run.
            multiply_block(left, right, v[0], p);
            load_columns<16>(words, source, place);
            convert(v[1], words);
            multiply_block(left, right, v[1], p + STEP);
            load_columns<32>(words, source, place);
            products_wait<1>();
            convert(v[0], words);
            multiply_block(left, right, v[0], p + 2 * STEP);
            load_columns<48>(words, source, place);
            products_wait<1>();
            convert(v[1], words);
            multiply_block(left, right, v[1], p + 3 * STEP);
            if (index + 1 < piece.last) {
                u32 next = (step + 1) % STAGES;
                wait_for(shared + FULL_AT + 8 * next, (step + 1) / STAGES);
                load_columns<0>(words, shared + CONTENT_AT + next * CONTENT_BYTES + panel * PANEL_BYTES, place);
                products_wait<1>();
                convert(v[0], words);
            }
            products_wait<0>();
            if (lane == 0) {
                barrier_arrive(shared + DONE_AT + 8 * stage);
                cluster_barrier_arrive(other + DONE_AT + 8 * stage);
            }
        }
        write_columns(left, right, piece, results, first_row, panel * PANEL + warp * 32 + lane / 4 * 4, shared, other);
    });
}
