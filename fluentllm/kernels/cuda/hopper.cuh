// What the kernels here share of Hopper: barriers in shared memory, bulk copies, warpgroup products, clusters.
// Compiled by NVRTC, which has no headers: the few types that are needed are defined here.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap {
    u64 words[16];
};

// 16-bit floats, of which only loads, stores and conversions are needed.
struct Bf16 {
    u16 bits;
};
struct Half {
    u16 bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ inline float to_float(Half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

template <typename To>
__device__ To rounded(float x);
template <>
__device__ inline float rounded<float>(float x) {
    return x;
}
template <>
__device__ inline Bf16 rounded<Bf16>(float x) {
    Bf16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
}
template <>
__device__ inline Half rounded<Half>(float x) {
    Half narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
}

// ---- programmatic dependent launch

__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- shared memory and barriers; addresses are those of the shared window

__device__ inline u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

__device__ inline u32 load_shared(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}
__device__ inline uint2 load_shared_pair(u32 address) {
    uint2 value;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address));
    return value;
}
__device__ inline void store_shared(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
// Four 8 x 8 matrices of 16 bits; lane 8 i + j has the address of row j of matrix i.
__device__ inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
// What threads have written is there for the tensor cores and the copy engine.
__device__ inline void written_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Initialised barriers are seen by bulk copies, and by the other programs of a cluster.
__device__ inline void barriers_initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive, and let the phase last until so many bytes have come.
__device__ inline void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

#define BARRIER_WAIT(SCOPE, LIMIT)                                                                   \
    asm volatile(                                                                                    \
        "{\n"                                                                                        \
        ".reg .pred done;\n"                                                                         \
        "again:\n"                                                                                   \
        "mbarrier.try_wait.parity" SCOPE ".shared::cta.b64 done, [%0], %1" LIMIT ";\n"               \
        "@done bra there;\n"                                                                         \
        "bra again;\n"                                                                               \
        "there:\n"                                                                                   \
        "}" ::"r"(barrier),                                                                          \
        "r"(parity), "n"(10000000)                                                                   \
        : "memory")
// Until the phase of this parity has ended.
__device__ inline void barrier_wait(u32 barrier, u32 parity) { BARRIER_WAIT("", ""); }
// The same, asleep for up to 10 ms at a time; what is waited for wakes.
__device__ inline void barrier_sleep(u32 barrier, u32 parity) { BARRIER_WAIT("", ", %2"); }
// The same, and what other programs of the cluster wrote is seen. Each such wait empties the first-level cache.
__device__ inline void barrier_wait_for_cluster(u32 barrier, u32 parity) { BARRIER_WAIT(".acquire.cluster", ""); }
// Has it ended?
__device__ inline bool barrier_passed(u32 barrier, u32 parity) {
    u32 there;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 there, [%1], %2;\n"
        "selp.u32 %0, 1, 0, there;\n"
        "}"
        : "=r"(there)
        : "r"(barrier), "r"(parity)
        : "memory");
    return there;
}
// Among `threads` threads of a program; `number` 1 to 15.
__device__ inline void named_barrier(u32 number, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- clusters

__device__ inline u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline u32 cluster_number() {
    u32 number;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
    return number;
}
__device__ inline u32 cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// Orders nothing but barriers that were initialised before.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// By all threads of whole warps; what any of the cluster wrote before is seen after it.
__device__ inline void cluster_join() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where what lies at `address` of this program's shared memory lies in that of program `rank` of the cluster.
__device__ inline u32 remote_address(u32 address, u32 rank) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}
// `barrier` may lie in another program.
__device__ inline void cluster_barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// To a program of the cluster, counted by a barrier of that program.
__device__ inline void remote_store(u32 address, u32 value, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(value),
                 "r"(barrier)
                 : "memory");
}
__device__ inline void remote_store(u32 address, float a, float b, float c, float d, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
                 "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}
// The same by the copy engine, out of this program's shared memory, which must stay until it has been counted.
__device__ inline void async_send(u32 to, u32 from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "r"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// ---- the copy engine

__device__ inline void fetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// The box at (column, row) of a matrix; places outside of it give zeros.
__device__ inline void async_load(const TensorMap& map, int column, int row, u32 to, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

constexpr u16 BOTH = 3;  // programs of a cluster of two

// To both, at the same place in each; the barrier at the same place counts the bytes.
__device__ inline void async_load_for_both(const TensorMap& map, int column, int row, u32 to, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
        "[%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(BOTH)
        : "memory");
}
__device__ inline void async_load_for_both(const TensorMap& map, int column, int row, int page, u32 to, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, "
        "%4}], [%5], %6;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(page), "r"(barrier), "h"(BOTH)
        : "memory");
}

// ---- warpgroup products

// Of rows of 128 bytes, swizzled by TMA, in groups of eight: 1,024 bytes a group; `address` on a multiple of 1,024.
__device__ inline u64 matrix_descriptor(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left>
__device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
// Registers that products in flight write may not be touched before this: it keeps the compiler from moving uses ahead.
template <int Count>
__device__ inline void products_there(float (&sums)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
