// A warp group's 64 rows of results: through 8 KB of shared memory at a time, 64 rows of 128 bytes, swizzled as TMA
// wants them, and from there by TMA, or by plain stores where rows belong to others or TMA cannot address the output.
#pragma once

#include <cuda_bf16.h>

#include "hopper.cuh"

namespace gemm {

constexpr int PIECE = 64 * 128;  // bytes
enum Kind { BF16, FP32, SWIGLU };

// Where in a piece the 16 bytes `unit` (0 to 7) of a row lie.
__device__ __forceinline__ int place(int row, int unit) { return row * 128 + (unit ^ row % 8) * 16; }

// Value (bits) at `offset` as an FP8 code; q is the value divided by `scale`, correctly rounded (Markstein).
__device__ __forceinline__ float divided(float value, float scale, float reciprocal) {
    const float q = value * reciprocal;
    return __fmaf_rn(__fmaf_rn(-q, scale, value), reciprocal, q);
}

__device__ __forceinline__ uint16_t codes(float low, float high) {
    uint16_t both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
}

// The scale of a block whose largest magnitude has these bits; as teacher.kernels.quantize finds it.
__device__ __forceinline__ float block_scale(int bits) {
    const float largest = __int_as_float(bits);
    const float scale = __fdiv_rn(largest, 448.0f);
    return largest == 0.0f ? 1.0f : scale < 1.1754943508222875e-38f ? 1.1754943508222875e-38f : scale;  // NaN stays
}

template <Kind KIND>
struct Output {
    static constexpr int WIDTH = KIND == BF16 ? 64 : KIND == FP32 ? 32 : 128;  // columns of a piece
    static constexpr int BYTES = 128 / WIDTH;                                 // of a value

    const CUtensorMap* map;
    unsigned char* values;
    long columns;
    bool by_tma;       // the map is good
    uint32_t staging;  // two pieces
    int barrier;       // the warp group's own

    // Before a piece is written: its shared memory is free.
    __device__ uint32_t open(int piece) const {
        if (threadIdx.x % 128 == 0) hopper::stores_read<1>();
        hopper::named_sync(barrier, 128);
        return staging + piece % 2 * PIECE;
    }

    // After: out with it. `rows` of the 64 are real.
    __device__ void close(uint32_t from, long row, int rows, int column) const {
        const bool whole = by_tma && rows >= 64;
        if (whole) hopper::async_fence();
        hopper::named_sync(barrier, 128);
        const int thread = threadIdx.x % 128;
        if (whole) {
            if (thread == 0 && column < columns) hopper::store_tile(map, column, static_cast<int>(row), from);
            return;
        }
        const bool wide = columns * BYTES % 16 == 0 && reinterpret_cast<uint64_t>(values) % 16 == 0;
#pragma unroll 1
        for (int unit = thread; unit < rows * 8 && unit < 512; unit += 128) {
            const int local = unit / 8;
            const long first = column + unit % 8 * (16 / BYTES);
            if (first >= columns) continue;
            unsigned char* to = values + ((row + local) * columns + first) * BYTES;
            uint4 found;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                         : "r"(from + place(local, unit % 8)));
            if (wide) {  // then a row ends with a unit
                *reinterpret_cast<uint4*>(to) = found;
                continue;
            }
            const uint32_t words[4] = {found.x, found.y, found.z, found.w};
#pragma unroll
            for (int i = 0; i < 16 / BYTES; ++i) {
                if (first + i >= columns) break;
                const uint32_t word = words[i * BYTES / 4] >> i * BYTES % 4 * 8;
                if (BYTES == 4) reinterpret_cast<uint32_t*>(to)[i] = word;
                if (BYTES == 2) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(word);
                if (BYTES == 1) to[i] = static_cast<unsigned char>(word);
            }
        }
    }
};

// WIDTH columns of sums (as product_64x128x32 says where they lie), from column 8 * FIRST on.
template <int FIRST>
__device__ __forceinline__ void put_bf16(uint32_t to, const float (&sums)[64]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // 16 columns: four matrices of 8 x 8, a row of one for each lane
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = FIRST * 4 + pair * 8 + i * 2;
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed[i]) : "f"(sums[at + 1]), "f"(sums[at]));
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         to + place(row, pair * 2 + lane / 16)),
                     "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                     : "memory");
    }
}

template <int FIRST>
__device__ __forceinline__ void put_fp32(uint32_t to, const float (&sums)[64]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below)
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                             to + place(row + below * 8, j * 2 + lane % 4 / 2) + lane % 2 * 8),
                         "f"(sums[(FIRST + j) * 4 + below * 2]), "f"(sums[(FIRST + j) * 4 + below * 2 + 1])
                         : "memory");
}

// All 128 columns of hidden values as codes, and the scales of this thread's two rows.
__device__ __forceinline__ void put_codes(uint32_t to, const float (&hidden)[64], float (&scale)[2]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        int largest = 0;
#pragma unroll
        for (int j = 0; j < 16; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                largest = max(largest, __float_as_int(hidden[j * 4 + below * 2 + i]) & 0x7FFFFFFF);
        largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
        scale[below] = block_scale(largest);
        const float reciprocal = __frcp_rn(scale[below]);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const float *at = hidden + j * 4 + below * 2;
            const uint16_t both =
                codes(divided(at[0], scale[below], reciprocal), divided(at[1], scale[below], reciprocal));
            const int within = j % 2 * 8 + lane % 4 * 2;
            asm volatile("st.shared.b16 [%0], %1;" ::"r"(to + place(row + below * 8, j / 2) + within), "h"(both)
                         : "memory");
        }
    }
}

}  // namespace gemm
