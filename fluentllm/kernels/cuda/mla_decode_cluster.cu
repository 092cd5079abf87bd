// MLA decode over the FP8 cache on Hopper for more than 64 query rows: a cluster of two CTAs holds 128 of them.
//
// The two share every page. Each has the scores of its own 64 rows against all keys, and for all 128 rows the output columns
// [256 rank, 256 rank + 256). So a page leaves L2 once for 128 rows, V is converted once, and what crosses between the two
// multiprocessors is the probabilities. Four warpgroups a CTA:
//
//     loading   a warp: half of every page, into the shared memory of both CTAs; two threads: a piece's queries, and the
//               probabilities' way to the other CTA
//     scores    S = Q K^T: BF16 over the rotary part, FP8 over the latent; online softmax; P in FP16
//     values x2 O^T += V^T P^T for 128 columns each: V^T goes from the page to registers, E4M3 -> FP16, exactly
//
// Cache, plan, softmax and results are those of `hopper_fp8_many`. Both CTAs of a cluster walk the same pages in the same
// order; a "step" is a page, counted from the kernel's start, and says which stage, buffer and phase of a barrier is meant.
//
// The scores of a step and the values of the one before would share the tensor cores and end together, and the softmax that
// follows would leave them idle. So values wait for their turn: it comes when most of the next step's scores have been asked
// for, and they are computed during that step's softmax.


#include "mla_loading.cuh"
#include "mla_scores.cuh"
#include "mla_values.cuh"

__device__ __forceinline__ void init_barriers(u32 shared) {
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(shared + FULL_AT + 8 * i, 1);
        barrier_init(shared + DONE_AT + 8 * i, 2 * VALUE_WARPS);
    }
    for (int i = 0; i < BUFFERS; ++i) {
        barrier_init(shared + WRITTEN_AT + 8 * i, SCORE_WARPS);
        barrier_init(shared + P_FULL_AT + 8 * i, 1);
        barrier_init(shared + TURN_AT + 8 * i, SCORE_WARPS);
    }
    barrier_init(shared + Q_FULL_AT, 1);
    barrier_init(shared + Q_EMPTY_AT, SCORE_WARPS);
    barrier_init(shared + SUMS_FULL_AT, SCORE_WARPS);
    barrier_init(shared + SUMS_EMPTY_AT, 2 * VALUE_WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Grid: parts x groups, groups even; the groups of a part are side by side. rows: of a sequence. early: launched while the kernel
// in front still runs; release: let the next kernel be set up now.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    mla_decode_cluster(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap content,
                       const __grid_constant__ TensorMap rope, const __grid_constant__ TensorMap scales, const u32* q_rope,
                       const float* q_scale, void* out, float* partial, float* lse, const int* page_table, const int* lengths,
                       const int* starts, const int* records, long long table_width, float scale_log2, int heads, int rows, int groups,
                       int out_is_float, int early, int release) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = (u32)__cvta_generic_to_shared(memory);
    int group = blockIdx.x % groups;
    u32 rank = group % 2;
    u32 other = remote_address(shared, rank ^ 1);
    int first_row = group * ROW_TILE, cluster_row = (group - rank) * ROW_TILE;
    int role = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        init_barriers(shared);
        fetch_map(queries);
        fetch_map(content);
        fetch_map(rope);
        fetch_map(scales);
    }
    if (release) asm volatile("griddepcontrol.launch_dependents;");
    cluster_join();
    if (early) asm volatile("griddepcontrol.wait;" ::: "memory");
    Plan plan = {records, starts, lengths, page_table, table_width, groups};
    Results results = {out, partial, lse, out_is_float, rows};
    if (role == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 32) {
            load_pages(plan, content, rope, scales, shared, rank);
        } else if (threadIdx.x == 32) {
            load_queries(plan, queries, shared, first_row, rows);
        } else if (threadIdx.x == 64) {
            send_probabilities(plan, shared, other, rank);
        }
    } else if (role == 1) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 136;");
        keep_scores(plan, results, q_rope, q_scale, scale_log2, heads, shared, other, rank, first_row);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 176;");
        keep_values(plan, results, 2 * rank + role - 2, shared, other, cluster_row);
    }
    // Neither goes while the other may still write to it.
    __syncwarp();
    cluster_join();
}
