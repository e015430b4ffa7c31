// What is in FP8, in tiles of 1 x 128, to tiles of 128 x 1, transposed: codes are multiplied by their rows' scales, and
// the products, rounded to fp32, are cast as casts_transposed.cu casts fp32. A block of threads takes a tile of 128 x
// 128 to shared memory, and of its columns one half after the other: a thread has 16 rows of 4 columns at a time.
//
// Taken: R and C multiples of 16; x contiguous. R rows, C columns.

#include "casts_tiles.cuh"

namespace {

// After 16 rows in shared memory 16 bytes are left out, so that a warp's words of 4 columns meet no bank twice.
constexpr int THREADS = 128, GROUP = 16 * 128 + 16, CODES = 8 * GROUP;

__device__ void bring(
    uint8_t* slot, float* by_row, const uint8_t* x, const float* x_scales, int64_t scale_row, int64_t scale_column,
    const Place& at, const Order& order) {
    constexpr int STEP = THREADS / 8;
    const int own = threadIdx.x % 8 * 16, first = threadIdx.x / 8, row = at.row * 128 + first;
    const int column = at.column * 128 + own;
    const uint8_t* from = x + static_cast<int64_t>(row) * order.C + column;
    if (column < order.C) {
#pragma unroll
        for (int i = 0; i < 128 / STEP; ++i) {
            const int local = first + STEP * i;
            if (row + STEP * i < order.R) fetch(slot + local * 128 + local / 16 * 16 + own, from);
            from += static_cast<int64_t>(STEP) * order.C;
        }
    }
    const int scaled = at.row * 128 + threadIdx.x;
    if (scaled < order.R) fetch(by_row + threadIdx.x, x_scales + scaled * scale_row + at.column * scale_column);
}

__global__ void __launch_bounds__(THREADS, 5) again_kernel(
    const uint8_t* x, const float* x_scales, int64_t scale_row, int64_t scale_column, uint8_t* values_t,
    float* scales_t, const Order order, bool power_of_two) {
    __shared__ __align__(128) uint8_t slot[CODES];
    __shared__ __align__(16) float by_row[128];
    const int R = order.R, C = order.C, lane = threadIdx.x % 32, high = lane >> SHIFT;
    const Place at = order.place(blockIdx.x);
    bring(slot, by_row, x, x_scales, scale_row, scale_column, at, order);
    arrived();
    __syncthreads();
    const int row = at.row * 128 + high * 16;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
        const int own = half * 64 + (threadIdx.x / 32 * 4 + lane % 4) * 4, column = at.column * 128 + own;
        const bool inside = column < C && row < R;
        const uint8_t* from = slot + high * GROUP + own;
        float f[16][4], most[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            const float4 q = *reinterpret_cast<const float4*>(&by_row[high * 16 + i]);
            const float by[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const uint32_t v = *reinterpret_cast<const uint32_t*>(from + (i + k) * 128);
                const float2 low = decode(&v, 0), up = decode(&v, 2);
                f[i + k][0] = low.x * by[k], f[i + k][1] = low.y * by[k];
                f[i + k][2] = up.x * by[k], f[i + k][3] = up.y * by[k];
#pragma unroll
                for (int j = 0; j < 4; ++j) most[j] = larger(most[j], f[i + k][j]);
            }
        }
        uint32_t m[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) m[j] = inside ? __float_as_uint(most[j]) : 0;
        uint32_t largest = spread_max<4, SHIFT>(m, lane);
        largest = max(largest, __shfl_xor_sync(ALL, largest, 4 << SHIFT));
        const Scale mine = scale_of<float>(largest, power_of_two);
        if (high < 4 && column + high < C) scales_t[static_cast<int64_t>(at.row) * C + column + high] = mine.scale;
        uint8_t* to = values_t + static_cast<int64_t>(column) * R + row;

        auto store = [&](auto lifted) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int other = lane & ~(7 << SHIFT) | j << SHIFT;
                const float a = __shfl_sync(ALL, mine.a, other), b = __shfl_sync(ALL, mine.b, other);
                const float lift = lifted.value ? __shfl_sync(ALL, mine.lift, other) : 1.0f;
                uint32_t word[4];
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    auto one = [&](int i) { return quotient<float, lifted.value>(f[4 * q + i][j], a, b, lift); };
                    word[q] = codes(one(0), one(1), one(2), one(3));
                }
                if (inside) put(to, word);
                to += R;
            }
        };
        if (__any_sync(ALL, mine.lift != 1.0f)) store(std::true_type{});
        else store(std::false_type{});
    }
}

}  // namespace

extern "C" cudaError_t casts_again(
    const uint8_t* x, const float* x_scales, int64_t scale_row, int64_t scale_column, uint8_t* values_t,
    float* scales_t, int R, int C, int power_of_two, cudaStream_t stream) {
    const Order order(1, R, C, 128);
    again_kernel<<<order.tiles, THREADS, 0, stream>>>(
        x, x_scales, scale_row, scale_column, values_t, scales_t, order, power_of_two);
    return cudaGetLastError();
}
