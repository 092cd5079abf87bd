// What a CTA of `mla_decode_cluster.cu` has to do: pieces of sequences, as `mla_decode/plan.py` cuts them, and where results go.
#pragma once
#include "mla_memory.cuh"

struct Plan {
    const int* records;
    const int* starts;
    const int* lengths;
    const int* page_table;
    long long table_width;
    int groups;  // CTAs of a part
};

struct Results {
    void* out;       // [N, rows, 512], BF16 or float32
    float* partial;  // [2 parts, rows, 512]
    float* lse;      // [2 parts, rows]
    int out_is_float;
    int rows;
};

// A part's run of pages of one sequence.
struct Piece {
    int part;
    int sequence;
    int first;
    int last;    // page behind the last
    int keys;    // of the whole sequence
    int number;  // among the part's

    __device__ bool whole() const { return last - first == (keys + PAGE - 1) / PAGE; }
    __device__ int slot() const { return 2 * part + (first == 0); }
};

// All pieces of this CTA's part, in order.
template <class Visit>
__device__ __forceinline__ void for_each_piece(const Plan& plan, Visit visit) {
    int part = blockIdx.x / plan.groups;
    const int *record = plan.records + part * RECORD;
    int begin = record[0], end = record[1], high = record[2], first = record[3], last = record[4], keys = record[5];
    int number = 0;
    for (int sequence = begin; sequence < end; ++sequence) {
        // Asked for before the piece's work, which hides how long that takes.
        int following = min(sequence + 1, end - 1);
        int next_keys = plan.lengths[following];
        int next_last = min((next_keys + PAGE - 1) / PAGE, high - plan.starts[following]);
        if (first < last) visit(Piece{part, sequence, first, last, keys, number++});
        first = 0;
        last = next_last;
        keys = next_keys;
    }
}
