// Sizes of `mla_decode_cluster.cu`, and where things lie in a CTA's shared memory.
#pragma once
#include "hopper.cuh"

constexpr int PAGE = 64;
constexpr int LATENT = 512;
constexpr int ROPE = 64;
constexpr int ROW_TILE = 64;  // query rows of a CTA; a cluster has twice as many
constexpr int PANEL = 128;    // columns of the latent in one row of the 128-byte swizzle
constexpr int RECORD = 16;    // of plan.RECORD

constexpr int STAGES = 4;   // of pages
constexpr int BUFFERS = 2;  // of probabilities

// By how much, in log2 units, a logit may exceed its row's reference when that is chosen, and what sixteen keys' P may add up
// to before it must be chosen again: 2^14, twice in FP16, which holds 2^15.
constexpr float LAG = 8.0f;
constexpr u32 MOST_P = 0x74007400;

// A page's scores are twenty products, of which a softmax's end asks for some before it writes P, and for some more before the
// values get their turn.
constexpr int PRODUCTS = 20;
constexpr int ROTARY_PRODUCTS = 4;
constexpr int BEFORE_P = 6;
constexpr int BEFORE_TURN = 14;

constexpr int THREADS = 512;
constexpr int VALUE_WARPS = 8;
constexpr int SCORE_WARPS = 4;

// Shared memory, in bytes. What the 128-byte swizzle lies in starts at multiples of 1,024.
constexpr int PANEL_BYTES = PAGE * PANEL;
constexpr int CONTENT_BYTES = PAGE * LATENT;
constexpr int ROPE_BYTES = PAGE * ROPE * 2;
constexpr int SCALE_BYTES = PAGE * 4;
constexpr int PAGE_BYTES = CONTENT_BYTES + ROPE_BYTES + SCALE_BYTES;
constexpr int QUERY_BYTES = ROW_TILE * LATENT;
constexpr int P_ROW_BYTES = PAGE * 2;
constexpr int OWN_P_BYTES = ROW_TILE * P_ROW_BYTES;
constexpr int P_BYTES = 2 * OWN_P_BYTES;
constexpr int ALPHA_BYTES = ROW_TILE * 4 + SCORE_WARPS * 4;  // of one CTA's rows, and behind them whether one is less than 1

constexpr int CONTENT_AT = 0;
constexpr int ROPE_AT = CONTENT_AT + STAGES * CONTENT_BYTES;
constexpr int QUERY_AT = ROPE_AT + STAGES * ROPE_BYTES;
constexpr int P_AT = QUERY_AT + QUERY_BYTES;
constexpr int SCALE_AT = P_AT + BUFFERS * P_BYTES;
constexpr int ALPHA_AT = SCALE_AT + STAGES * SCALE_BYTES;
constexpr int INVERSE_AT = ALPHA_AT + BUFFERS * 2 * ALPHA_BYTES;
// Barriers.
constexpr int FULL_AT = INVERSE_AT + 2 * ROW_TILE * 4;  // a stage's page is there
constexpr int DONE_AT = FULL_AT + STAGES * 8;           // a step's page and probabilities are free again, in both CTAs
constexpr int WRITTEN_AT = DONE_AT + STAGES * 8;        // this CTA's probabilities are there
constexpr int P_FULL_AT = WRITTEN_AT + BUFFERS * 8;     // both CTAs' are, and the tensor cores may read them
constexpr int TURN_AT = P_FULL_AT + BUFFERS * 8;        // a step's values may use the tensor cores
constexpr int Q_FULL_AT = TURN_AT + BUFFERS * 8;
constexpr int Q_EMPTY_AT = Q_FULL_AT + 8;
constexpr int SUMS_FULL_AT = Q_EMPTY_AT + 8;
constexpr int SUMS_EMPTY_AT = SUMS_FULL_AT + 8;
constexpr int SHARED_BYTES = SUMS_EMPTY_AT + 8;
static_assert(SHARED_BYTES <= 227 * 1024, "more than a multiprocessor has");

// The phase that a step's turn of a ring is in says which parity it has: of a count, the last bit.
__device__ inline void wait_for(u32 barrier, u32 turn) { barrier_sleep(barrier, turn & 1); }
__device__ inline bool passed(u32 barrier, u32 turn) { return barrier_passed(barrier, turn & 1); }
