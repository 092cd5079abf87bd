// The loading warpgroup of `mla_decode_cluster.cu`: pages and queries in, probabilities to the other CTA.
#pragma once
#include "mla_plan.cuh"

// One warp: this CTA's half of every page, for both CTAs.
__device__ __forceinline__ void load_pages(const Plan& plan, const TensorMap& content, const TensorMap& rope,
                                           const TensorMap& scales, u32 shared, u32 rank) {
    int lane = threadIdx.x % 32;
    int step = 0;
    for_each_piece(plan, [&](const Piece& piece) {
        const int *table = plan.page_table + piece.sequence * plan.table_width;
        int ids = 0;
#pragma unroll 1
        for (int index = piece.first; index < piece.last; ++index, ++step) {
            int ahead = (index - piece.first) % 32;
            if (ahead == 0) ids = index + lane < piece.last ? table[index + lane] : 0;
            int page = __shfl_sync(~0u, ids, ahead);
            u32 stage = step % STAGES;
            wait_for(shared + DONE_AT + 8 * stage, step / STAGES + 1);
            if (lane == 0) {
                u32 full = shared + FULL_AT + 8 * stage;
                barrier_expect(full, PAGE_BYTES);
                u32 panels = shared + CONTENT_AT + stage * CONTENT_BYTES + rank * (CONTENT_BYTES / 2);
                u32 keys = rank * (PAGE / 2);
                async_load_for_both(rope, 0, keys, page, shared + ROPE_AT + stage * ROPE_BYTES + keys * ROPE * 2, full);
                async_load_for_both(content, rank * 2 * PANEL, 0, page, panels, full);
                async_load_for_both(content, rank * 2 * PANEL + PANEL, 0, page, panels + PANEL_BYTES, full);
                async_load_for_both(scales, keys, page, shared + SCALE_AT + stage * SCALE_BYTES + keys * 4, full);
            }
        }
    });
}

// One thread: the latent part of each piece's queries.
__device__ __forceinline__ void load_queries(const Plan& plan, const TensorMap& queries, u32 shared, int first_row, int rows) {
    for_each_piece(plan, [&](const Piece& piece) {
        wait_for(shared + Q_EMPTY_AT, piece.number + 1);
        u32 full = shared + Q_FULL_AT;
        barrier_expect(full, QUERY_BYTES);
#pragma unroll 1
        for (int panel = 0; panel < LATENT / PANEL; ++panel) {
            u32 to = shared + QUERY_AT + panel * ROW_TILE * PANEL;
            async_load(queries, panel * PANEL, piece.sequence * rows + first_row, to, full);
        }
    });
}

// One thread: this CTA's probabilities to the other. The fence is here because it takes 200 cycles, which the warps that write
// them do not have.
__device__ __forceinline__ void send_probabilities(const Plan& plan, u32 shared, u32 other, u32 rank) {
    u32 step = 0;
    for_each_piece(plan, [&](const Piece& piece) {
#pragma unroll 1
        for (int index = piece.first; index < piece.last; ++index, ++step) {
            u32 buffer = step % BUFFERS;
            u32 p = P_AT + buffer * P_BYTES + rank * OWN_P_BYTES;
            u32 alphas = ALPHA_AT + (buffer * 2 + rank) * ALPHA_BYTES;
            u32 full = P_FULL_AT + 8 * buffer;
            wait_for(shared + WRITTEN_AT + 8 * buffer, step / BUFFERS);
            written_for_copies();
            async_send(other + p, shared + p, OWN_P_BYTES, other + full);
            async_send(other + alphas, shared + alphas, ALPHA_BYTES, other + full);
            barrier_expect(shared + full, OWN_P_BYTES + ALPHA_BYTES);
        }
    });
}
