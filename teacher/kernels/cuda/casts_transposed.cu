// The casts whose result lies transposed, rows (tokens) last: as casts.cu, and without any exchange of values. A thread
// holds 16 rows of a few columns, and the conversion to e4m3, which takes its two values from any two registers, packs
// them along the rows. Maxima are exchanged so that at the end each lane has one scale to compute, every one another.
//
// Its values come through shared memory of its own, which 5 blocks of threads fit in beside each other, where registers
// for what is under way leave room for 4.
//
// Taken: R a multiple of 16 and C of 8; x aligned to 16 bytes, row by row. R rows, C columns.

#include "casts_values.cuh"

namespace {

enum Form { COLUMNS, BLOCKS, BLOCKS_TWICE, BOTH_WAYS };  // scales of 128 x 1; of 128 x 128, as it lies too; 1 x 128 too

struct Sizes {
    int R, C;
    unsigned down, across, group, tiles;
};

// Where a thread's 16 rows and COLS columns of a tile of 128 x 128 begin: lanes of 4 columns' worth beside each other,
// 8 groups of rows.
template <int COLS>
struct Spot {
    int matrix, tile_row, tile_column, high, row, column;
    bool inside;
    __device__ Spot(unsigned tile, const Sizes& s) {
        const Place at = place_of(tile, s.down, s.across, s.group);
        const int lane = threadIdx.x % 32;
        matrix = at.matrix, tile_row = at.row, tile_column = at.column, high = lane / 4;
        row = at.row * 128 + high * 16, column = at.column * 128 + (threadIdx.x / 32 * 4 + lane % 4) * COLS;
        inside = column < s.C && row < s.R;
    }
};

constexpr int SHIFT = 2;  // of a lane, to its group of rows

__device__ void words(uint32_t (&v)[4], uint4 q) { v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w; }

template <typename T>
__device__ void write_columns(
    uint8_t* to, int R, uint32_t (&v)[16][4], const Scale& mine, bool columns_alone, bool inside) {
    const int lane = threadIdx.x % 32;
    auto store = [&](auto lifted) {
#pragma unroll
        for (int j = 0; j < Lane<T>::COLS; ++j) {
            float a = mine.a, b = mine.b, lift = mine.lift;
            if (columns_alone) {
                const int from = lane & ~(7 << SHIFT) | j << SHIFT;
                a = __shfl_sync(ALL, mine.a, from);
                b = __shfl_sync(ALL, mine.b, from);
                if (lifted.value) lift = __shfl_sync(ALL, mine.lift, from);
            }
            uint32_t word[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) word[q] = encode_down<T, lifted.value>(&v[4 * q], j, a, b, lift);
            if (inside) put(to, word);
            to += R;
        }
    };
    if (__any_sync(ALL, mine.lift != 1.0f)) store(std::true_type{});
    else store(std::false_type{});
}

template <typename T>
__device__ void write_twice(
    uint8_t* to_t, uint8_t* to, int R, int C, uint32_t (&v)[16][4], const Scale& s, bool inside) {
    constexpr int COLS = Lane<T>::COLS;
    auto store = [&](auto lifted) {
        uint32_t word[COLS][4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            uint32_t across[4][COLS / 4];
#pragma unroll
            for (int j = 0; j < COLS; ++j) word[j][q] = encode_down<T, lifted.value>(&v[4 * q], j, s.a, s.b, s.lift);
#pragma unroll
            for (int j = 0; j < COLS; j += 4) {
                uint32_t turned[4];
                turn(turned, word[j][q], word[j + 1][q], word[j + 2][q], word[j + 3][q]);
#pragma unroll
                for (int i = 0; i < 4; ++i) across[i][j / 4] = turned[i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (inside) put(to, across[i]);
                to += C;
            }
        }
#pragma unroll
        for (int j = 0; j < COLS; ++j) {
            if (inside) put(to_t, word[j]);
            to_t += R;
        }
    };
    if (s.lift != 1.0f) store(std::true_type{});
    else store(std::false_type{});
}

// Tiles of 1 x 128 of the block of threads' 128 x 128: maxima of the lanes of a row, then of the warps.
template <typename T>
__device__ void write_rows(
    uint8_t* to, float* scales, int first_row, int R, int C, const uint4* found, bool power_of_two, bool inside) {
    using L = Lane<T>;
    constexpr int WARPS = 32 / L::COLS;
    __shared__ __align__(16) uint32_t row_max[WARPS][128];
    __shared__ float4 row_scale[128];
    const int lane = threadIdx.x % 32, high = lane >> SHIFT;
    uint32_t m[16], v[4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        words(v, found[i * WARPS * 32]);
        m[i] = largest_of<L>(v);
    }
    halve_max<8, 2>(m, lane);  // each lane is left with 4 rows
    halve_max<4, 1>(m, lane);
    *reinterpret_cast<uint4*>(&row_max[threadIdx.x / 32][lane * 4]) = make_uint4(m[0], m[1], m[2], m[3]);
    __syncthreads();
    bool any = false;
    if (threadIdx.x < 128) {
        uint32_t largest = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) largest = max(largest, row_max[w][threadIdx.x]);
        const Scale s = scale_of<T>(largest, power_of_two);
        row_scale[threadIdx.x] = make_float4(s.a, s.b, s.lift, 0.0f);
        const int row = first_row + threadIdx.x;
        if (row < R) scales[row] = s.scale;
        any = s.lift != 1.0f;
    }
    any = __syncthreads_or(any);

    auto store = [&](auto lifted) {
#pragma unroll 4
        for (int i = 0; i < 16; ++i) {
            const float4 by = row_scale[high * 16 + i];
            uint32_t word[L::COLS / 4];
            words(v, found[i * WARPS * 32]);
            encode<T, lifted.value>(word, v, by.x, by.y, by.z);
            if (inside) put(to, word);
            to += C;
        }
    };
    if (any) store(std::true_type{});
    else store(std::false_type{});
    // What follows reads the values anew: kept, they would take the registers of two blocks of threads.
    asm volatile("" ::: "memory");
}

template <typename T, Form FORM>
__global__ void __launch_bounds__(1024 / Lane<T>::COLS, sizeof(T) == 4 ? 2 : 5) transposed_kernel(
    const T* x, int64_t matrix_stride, int64_t stride, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, const Sizes sizes, bool power_of_two) {
    using L = Lane<T>;
    constexpr int THREADS = 1024 / L::COLS;
    const int R = sizes.R, C = sizes.C, lane = threadIdx.x % 32;
    extern __shared__ uint4 under_way[];
    const Spot<L::COLS> at(blockIdx.x, sizes);
    const T* from = x + at.matrix * matrix_stride + at.row * stride + at.column;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        fetch(&under_way[i * THREADS + threadIdx.x], from, at.inside);
        from += stride;
    }
    arrived();
    uint8_t* to_t = values_t + (static_cast<int64_t>(at.matrix) * C + at.column) * R + at.row;
    uint8_t* to = values + (static_cast<int64_t>(at.matrix) * R + at.row) * C + at.column;
    if (FORM == BOTH_WAYS) {
        float* column = scales + at.tile_column * scale_stride;
        write_rows<T>(to, column, at.tile_row * 128, R, C, &under_way[threadIdx.x], power_of_two, at.inside);
    }
    uint32_t v[16][4], a[4] = {0, 0, 0, 0}, m[L::COLS];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        words(v[i], under_way[i * THREADS + threadIdx.x]);
#pragma unroll
        for (int w = 0; w < 4; ++w) a[w] = L::larger(a[w], v[i][w]);
    }
#pragma unroll
    for (int j = 0; j < L::COLS; ++j) m[j] = L::bits(a, j);
    if (FORM == COLUMNS || FORM == BOTH_WAYS) {
        uint32_t largest = spread_max<L::COLS, SHIFT>(m, lane);
        if (L::COLS == 4) largest = max(largest, __shfl_xor_sync(ALL, largest, 4 << SHIFT));
        const Scale mine = scale_of<T>(largest, power_of_two);
        if (at.high < L::COLS && at.column + at.high < C) {
            scales_t[static_cast<int64_t>(at.tile_row) * C + at.column + at.high] = mine.scale;
        }
        write_columns<T>(to_t, R, v, mine, true, at.inside);
    } else {
#pragma unroll
        for (int j = 1; j < L::COLS; ++j) m[0] = max(m[0], m[j]);
        const Scale s = scale_of<T>(block_max<32 / L::COLS>(m[0]), power_of_two);
        if (threadIdx.x == 0) {
            const int64_t matrix = static_cast<int64_t>(at.matrix) * sizes.down * sizes.across;
            scales_t[matrix + at.tile_column * sizes.down + at.tile_row] = s.scale;
            if (FORM == BLOCKS_TWICE) scales[matrix + at.tile_row * sizes.across + at.tile_column] = s.scale;
        }
        if (FORM == BLOCKS_TWICE) write_twice<T>(to_t, to, R, C, v, s, at.inside);
        else write_columns<T>(to_t, R, v, s, false, at.inside);
    }
}

// Tiles of 1 x 128 to tiles of 128 x 1, transposed: a lane has 8 columns' codes, of which 4 at a time are multiplied by
// their rows' scales.
__global__ void __launch_bounds__(128, 4) again_kernel(
    const uint8_t* x, const float* x_scales, int64_t scale_row, int64_t scale_column, uint8_t* values_t,
    float* scales_t, const Sizes sizes, bool power_of_two) {
    __shared__ __align__(16) float of_row[128];
    const int R = sizes.R, C = sizes.C, lane = threadIdx.x % 32;
    const Spot<8> at(blockIdx.x, sizes);
    const uint8_t* from = x + static_cast<int64_t>(at.row) * C + at.column;
    uint32_t v[16][2];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        load(v[i], from, at.inside);
        from += C;
    }
    const int row = at.tile_row * 128 + threadIdx.x;
    of_row[threadIdx.x] = row < R ? x_scales[row * scale_row + at.tile_column * scale_column] : 0.0f;
    __syncthreads();
    float4 by[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) by[q] = *reinterpret_cast<const float4*>(&of_row[at.high * 16 + q * 4]);
    uint8_t* to = values_t + static_cast<int64_t>(at.column) * R + at.row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float f[16][4];
        uint32_t m[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float4 q = by[i / 4];
            const float scale = i % 4 == 0 ? q.x : i % 4 == 1 ? q.y : i % 4 == 2 ? q.z : q.w;
            const float2 low = decode(v[i], half * 4), high = decode(v[i], half * 4 + 2);
            f[i][0] = low.x * scale, f[i][1] = low.y * scale, f[i][2] = high.x * scale, f[i][3] = high.y * scale;
#pragma unroll
            for (int j = 0; j < 4; ++j) m[j] = max(m[j], __float_as_uint(fabsf(f[i][j])));
        }
        uint32_t largest = spread_max<4, SHIFT>(m, lane);
        largest = max(largest, __shfl_xor_sync(ALL, largest, 4 << SHIFT));
        const Scale mine = scale_of<float>(largest, power_of_two);
        const int column = at.column + half * 4 + at.high;
        if (at.high < 4 && column < C) scales_t[static_cast<int64_t>(at.tile_row) * C + column] = mine.scale;

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
                if (at.inside) put(to, word);
                to += R;
            }
        };
        if (__any_sync(ALL, mine.lift != 1.0f)) store(std::true_type{});
        else store(std::false_type{});
    }
}

Sizes sizes_of(int E, int R, int C, int group) {
    const unsigned down = (R + 127) / 128, across = (C + 127) / 128;
    return {R, C, down, across, static_cast<unsigned>(group), E * down * across};
}

template <typename T>
cudaError_t launch(
    const void* x, int64_t matrix_stride, int64_t stride, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, int E, int R, int C, int form, bool power_of_two,
    cudaStream_t stream) {
    // What is written transposed alone does best with rows of tiles side by side, what is written both ways with few.
    const Sizes sizes = sizes_of(E, R, C, form == COLUMNS || form == BLOCKS ? 128 : 8);
    auto run = [&](auto form) {
        constexpr int THREADS = 1024 / Lane<T>::COLS, BYTES = 16 * THREADS * 16;
        auto kernel = transposed_kernel<T, static_cast<Form>(form.value)>;
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
        if (status != cudaSuccess) return status;
        kernel<<<sizes.tiles, THREADS, BYTES, stream>>>(
            static_cast<const T*>(x), matrix_stride, stride, values_t, scales_t, values, scales, scale_stride, sizes,
            power_of_two);
        return cudaGetLastError();
    };
    if (form == COLUMNS) return run(std::integral_constant<int, COLUMNS>{});
    if (form == BLOCKS) return run(std::integral_constant<int, BLOCKS>{});
    if (form == BLOCKS_TWICE) return run(std::integral_constant<int, BLOCKS_TWICE>{});
    return run(std::integral_constant<int, BOTH_WAYS>{});
}

}  // namespace

// `type`: 0 bf16, 1 fp16, 2 fp32; `form`: Form, whose COLUMNS and BLOCKS take no `values` and `scales`. Strides are
// counted in values.
extern "C" cudaError_t casts_transposed(
    const void* x, int64_t matrix_stride, int64_t stride, int type, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, int E, int R, int C, int form, int power_of_two,
    cudaStream_t stream) {
    const auto run = type == 0 ? launch<__nv_bfloat16> : type == 1 ? launch<__half> : launch<float>;
    return run(
        x, matrix_stride, stride, values_t, scales_t, values, scales, scale_stride, E, R, C, form, power_of_two,
        stream);
}

extern "C" cudaError_t casts_again(
    const uint8_t* x, const float* x_scales, int64_t scale_row, int64_t scale_column, uint8_t* values_t,
    float* scales_t, int R, int C, int power_of_two, cudaStream_t stream) {
    const Sizes sizes = sizes_of(1, R, C, 128);
    again_kernel<<<sizes.tiles, 128, 0, stream>>>(
        x, x_scales, scale_row, scale_column, values_t, scales_t, sizes, power_of_two);
    return cudaGetLastError();
}
