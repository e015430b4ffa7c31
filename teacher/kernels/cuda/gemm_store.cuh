// A warp group's 64 rows of results: through 8 KB of shared memory at a time, 64 rows of 128 bytes, swizzled as TMA
// wants them, and from there by TMA, or by plain stores where rows belong to others or TMA cannot address the output.
#pragma once

#include <cuda_bf16.h>

#include "hopper.cuh"

namespace gemm {

constexpr int PIECE = 64 * 128;  // bytes
enum Kind { BF16, FP32 };

// Where in a piece the 16 bytes `unit` (0 to 7) of a row lie.
__device__ __forceinline__ int place(int row, int unit) { return row * 128 + (unit ^ row % 8) * 16; }

template <Kind KIND>
struct Output {
    static constexpr int BYTES = KIND == BF16 ? 2 : 4;  // of a value

    const CUtensorMap* map;
    unsigned char* values;
    long columns;
    bool by_tma;       // the map is good
    uint32_t staging;  // a piece
    int barrier;       // the warp group's own

    // Before a piece is written: the one before has been read.
    __device__ uint32_t open() const {
        if (threadIdx.x % 128 == 0) hopper::stores_read<0>();
        hopper::named_sync(barrier, 128);
        return staging;
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

// A thread's sums of a tile, on their way out; `row` is the group's first, of which `rows` are real.
template <Kind KIND>
__device__ __forceinline__ void put_tile(const Output<KIND>& output, const float (&sums)[64], long row, int rows,
                                         int column) {
    uint32_t piece;
    if constexpr (KIND == BF16) {
        put_bf16<0>(piece = output.open(), sums), output.close(piece, row, rows, column);
        put_bf16<8>(piece = output.open(), sums), output.close(piece, row, rows, column + 64);
    } else {
        put_fp32<0>(piece = output.open(), sums), output.close(piece, row, rows, column);
        put_fp32<4>(piece = output.open(), sums), output.close(piece, row, rows, column + 32);
        put_fp32<8>(piece = output.open(), sums), output.close(piece, row, rows, column + 64);
        put_fp32<12>(piece = output.open(), sums), output.close(piece, row, rows, column + 96);
    }
}

}  // namespace gemm
