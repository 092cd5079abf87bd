// Products of 64 rows of a matrix with 8, 16, 32 or 64 tokens, 32 bytes of each: of E4M3, BF16 or float16, by ELEMENT 0, 1, 2.
#pragma once
#include "hopper.cuh"

#if ELEMENT == 0
#define MMA_TYPES "k32.f32.e4m3.e4m3"
#define MMA_SIGNS "1, 1"
#elif ELEMENT == 1
#define MMA_TYPES "k16.f32.bf16.bf16"
#define MMA_SIGNS "1, 1, 0, 0"
#else
#define MMA_TYPES "k16.f32.f16.f16"
#define MMA_SIGNS "1, 1, 0, 0"
#endif

#define MMA(N, REGISTERS, A, B, P)                                              \
    "{\n.reg .pred p;\nsetp.ne.u32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N MMA_TYPES " {" REGISTERS "}, " A ", " B \
    ", p, " MMA_SIGNS ";\n}"
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])

// d [64, tokens] = (add ? d : 0) + 32 bytes of 64 rows times the same of the tokens
__device__ inline void mma(float (&d)[4], u64 a, u64 b, u32 add) {
    asm volatile(MMA("8", "%0, %1, %2, %3", "%4", "%5", "%6") : FOUR(d, 0) : "l"(a), "l"(b), "r"(add));
}
__device__ inline void mma(float (&d)[8], u64 a, u64 b, u32 add) {
    asm volatile(MMA("16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10")
                 : FOUR(d, 0), FOUR(d, 4) : "l"(a), "l"(b), "r"(add));
}
__device__ inline void mma(float (&d)[16], u64 a, u64 b, u32 add) {
    asm volatile(MMA("32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16", "%17", "%18")
                 : FOUR(d, 0), FOUR(d, 4), FOUR(d, 8), FOUR(d, 12) : "l"(a), "l"(b), "r"(add));
}
__device__ inline void mma(float (&d)[32], u64 a, u64 b, u32 add) {
    asm volatile(MMA("64",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
                     "%23, %24, %25, %26, %27, %28, %29, %30, %31",
                     "%32", "%33", "%34")
                 : FOUR(d, 0), FOUR(d, 4), FOUR(d, 8), FOUR(d, 12), FOUR(d, 16), FOUR(d, 20), FOUR(d, 24), FOUR(d, 28)
                 : "l"(a), "l"(b), "r"(add));
}
