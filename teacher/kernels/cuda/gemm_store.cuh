// A warp group's 64 rows of results: through 8 KB of shared memory at a time, 64 rows of 128 bytes, swizzled as TMA
// wants them, and from there by TMA, or by plain stores where rows belong to others or TMA cannot address the output.
#pragma once

#include <cuda_bf16.h>

#include "gemm_schedule.cuh"
#include "hopper.cuh"

namespace gemm {

constexpr int PIECE = 64 * 128;  // bytes
enum Kind { BF16, FP32, SWIGLU };

// Where in a piece the 16 bytes `unit` (0 to 7) of a row lie.
__device__ __forceinline__ int place(int row, int unit) { return row * 128 + (unit ^ row % 8) * 16; }

// value / scale, correctly rounded (Markstein), as teacher.kernels.quantize divides.
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
    static constexpr int BYTES = KIND == BF16 ? 2 : KIND == FP32 ? 4 : 1;  // of a value

    const CUtensorMap* map;
    unsigned char* values;
    long columns;
    bool by_tma;       // the map is good
    uint32_t staging;  // two pieces, in turn
    int barrier;       // the warp group's own
    unsigned pieces = 0;

    // Before a piece is written: its shared memory is free, as only the piece before may still be read.
    __device__ uint32_t open() {
        if (threadIdx.x % 128 == 0) hopper::stores_read<1>();
        hopper::named_sync(barrier, 128);
        return staging + pieces++ % 2 * PIECE;
    }

    // After: out with it. `rows` of the 64 are real.
    __device__ void close(uint32_t from, long row, int rows, int column) const {
        const bool whole = by_tma && rows >= 64;
        if (whole) hopper::async_fence();
        hopper::named_sync(barrier, 128);
        const int thread = threadIdx.x % 128;
        if (thread == 0) {
            if (whole && column < columns) hopper::store_tile(map, column, static_cast<int>(row), from);
            hopper::stores_commit();  // a group for every piece, be it empty: `open` counts them
        }
        if (whole) return;
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

// This thread's sums of a tile, on their way; `local` is its row in the tile, `row` the group's first, in all.
template <Kind KIND, typename Arguments>
__device__ __forceinline__ void put_tile(Output<KIND>& output, float (&sums)[2][64], const Tile& tile, long row,
                                         int rows, int local, const Arguments& a) {
    uint32_t piece;
    if constexpr (KIND == SWIGLU) {
        const int column = tile.column * 128, lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const bool inside = column + i / 4 * 8 + lane % 4 * 2 + i % 2 < a.columns;
            const float gate = sums[0][i];
            sums[0][i] = inside ? __fdividef(gate, 1.0f + __expf(-gate)) * sums[1][i] : 0.0f;
        }
        float scale[2];
        put_codes(piece = output.open(), sums[0], scale), output.close(piece, row, rows, column);
        if (lane % 4 == 0 && column < a.columns) {
            float* at = a.out_scales + tile.column * a.out_scale_stride + tile.row + local;
            if (local < tile.rows) at[0] = scale[0];
            if (local + 8 < tile.rows) at[8] = scale[1];
        }
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = tile.column * 256 + half * 128;
            if constexpr (KIND == BF16) {
                put_bf16<0>(piece = output.open(), sums[half]), output.close(piece, row, rows, column);
                put_bf16<8>(piece = output.open(), sums[half]), output.close(piece, row, rows, column + 64);
            } else {
                put_fp32<0>(piece = output.open(), sums[half]), output.close(piece, row, rows, column);
                put_fp32<4>(piece = output.open(), sums[half]), output.close(piece, row, rows, column + 32);
                put_fp32<8>(piece = output.open(), sums[half]), output.close(piece, row, rows, column + 64);
                put_fp32<12>(piece = output.open(), sums[half]), output.close(piece, row, rows, column + 96);
            }
        }
    }
}

}  // namespace gemm
