// The casts whose result lies transposed, rows (tokens) last: as casts.cu, and without any exchange of values. A thread
// holds 16 rows of a few columns, and the conversion to e4m3, which takes its two values from any two registers, packs
// them along the rows. Maxima are exchanged so that at the end each lane has one scale to compute and every lane another.
//
// A thread holds much, so few run at a time: each has its next tile on the way, through shared memory of its own, while
// it works on one.
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

template <typename T>
__device__ void write_columns(uint8_t* to, int R, uint32_t (&v)[16][4], const Scale& mine, bool columns_alone, bool inside) {
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
    uint8_t* to, float* scales, int first_row, int R, int C, uint32_t (&v)[16][4], bool power_of_two, bool inside) {
    using L = Lane<T>;
    constexpr int WARPS = 32 / L::COLS;
    __shared__ __align__(16) uint32_t row_max[WARPS][128];
    __shared__ float4 row_scale[128];
    const int lane = threadIdx.x % 32, high = lane >> SHIFT;
    uint32_t m[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) m[i] = largest_of<L>(v[i]);
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
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float4 by = row_scale[high * 16 + i];
            uint32_t word[L::COLS / 4];
            encode<T, lifted.value>(word, v[i], by.x, by.y, by.z);
            if (inside) put(to, word);
            to += C;
            // So that the columns are unpacked anew: kept, 128 values a thread would take its registers twice over.
#pragma unroll
            for (int w = 0; w < 4; ++w) asm volatile("" : "+r"(v[i][w]));
        }
    };
    if (any) store(std::true_type{});
    else store(std::false_type{});
}

template <typename T, Form FORM, int STAGES>
__global__ void __launch_bounds__(1024 / Lane<T>::COLS) transposed_kernel(
    const T* x, int64_t matrix_stride, int64_t stride, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, const Sizes sizes, bool power_of_two) {
    using L = Lane<T>;
    constexpr int THREADS = 1024 / L::COLS;
    const int R = sizes.R, C = sizes.C, lane = threadIdx.x % 32;
    extern __shared__ uint4 ring[];
    auto ask = [&](unsigned tile, int stage) {
        if (tile < sizes.tiles) {
            const Spot<L::COLS> at(tile, sizes);
            const T* from = x + at.matrix * matrix_stride + at.row * stride + at.column;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                fetch(&ring[(stage * 16 + i) * THREADS + threadIdx.x], from, at.inside);
                from += stride;
            }
        }
        fetched();
    };
    unsigned tile = blockIdx.x;
#pragma unroll
    for (int stage = 0; stage + 1 < STAGES; ++stage) ask(tile + stage * gridDim.x, stage);
    int stage = 0;
    for (int turn = 0; tile < sizes.tiles; turn ^= 1) {
        ask(tile + (STAGES - 1) * gridDim.x, (stage + STAGES - 1) % STAGES);
        arrived<STAGES - 1>();
        const Spot<L::COLS> at(tile, sizes);
        uint32_t v[16][4], a[4] = {0, 0, 0, 0}, m[L::COLS];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint4 q = ring[(stage * 16 + i) * THREADS + threadIdx.x];
            v[i][0] = q.x, v[i][1] = q.y, v[i][2] = q.z, v[i][3] = q.w;
#pragma unroll
            for (int w = 0; w < 4; ++w) a[w] = L::larger(a[w], v[i][w]);
        }
        uint8_t* to_t = values_t + (static_cast<int64_t>(at.matrix) * C + at.column) * R + at.row;
        uint8_t* to = values + (static_cast<int64_t>(at.matrix) * R + at.row) * C + at.column;
        if (FORM == BOTH_WAYS) {
            write_rows<T>(to, scales + at.tile_column * scale_stride, at.tile_row * 128, R, C, v, power_of_two, at.inside);
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
            const Scale s = scale_of<T>(block_max<32 / L::COLS>(m[0], turn), power_of_two);
            if (threadIdx.x == 0) {
                const int64_t matrix = static_cast<int64_t>(at.matrix) * sizes.down * sizes.across;
                scales_t[matrix + at.tile_column * sizes.down + at.tile_row] = s.scale;
                if (FORM == BLOCKS_TWICE) scales[matrix + at.tile_row * sizes.across + at.tile_column] = s.scale;
            }
            if (FORM == BLOCKS_TWICE) write_twice<T>(to_t, to, R, C, v, s, at.inside);
            else write_columns<T>(to_t, R, v, s, false, at.inside);
        }
        tile += gridDim.x;
        stage = (stage + 1) % STAGES;
    }
}

// Tiles of 1 x 128 to tiles of 128 x 1, transposed: a lane has 8 columns' codes, multiplied by their rows' scales anew
// where they are needed.
__global__ void __launch_bounds__(128) again_kernel(
    const uint8_t* x, const float* x_scales, int64_t scale_row, int64_t scale_column, uint8_t* values_t, float* scales_t,
    const Sizes sizes, bool power_of_two) {
    const int R = sizes.R, C = sizes.C, lane = threadIdx.x % 32;
    const Spot<8> at(blockIdx.x, sizes);
    uint32_t v[16][2], m[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    float by[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        v[i][0] = v[i][1] = 0;
        by[i] = 0.0f;
        if (at.inside) {
            const uint2 q = __ldcs(reinterpret_cast<const uint2*>(x + static_cast<int64_t>(at.row + i) * C + at.column));
            v[i][0] = q.x, v[i][1] = q.y;
            by[i] = x_scales[(at.row + i) * scale_row + at.tile_column * scale_column];
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float2 two = decode(v[i], j);
            m[j] = max(m[j], __float_as_uint(fabsf(two.x) * fabsf(by[i])));
            m[j + 1] = max(m[j + 1], __float_as_uint(fabsf(two.y) * fabsf(by[i])));
        }
    }
    const Scale mine = scale_of<float>(spread_max<8, SHIFT>(m, lane), power_of_two);
    if (at.column + at.high < C) scales_t[static_cast<int64_t>(at.tile_row) * C + at.column + at.high] = mine.scale;
    uint8_t* to = values_t + static_cast<int64_t>(at.column) * R + at.row;

    auto store = [&](auto lifted) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            float a[2], b[2], lift[2] = {1.0f, 1.0f};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int from = lane & ~(7 << SHIFT) | (j + k) << SHIFT;
                a[k] = __shfl_sync(ALL, mine.a, from);
                b[k] = __shfl_sync(ALL, mine.b, from);
                if (lifted.value) lift[k] = __shfl_sync(ALL, mine.lift, from);
            }
            uint32_t word[2][4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                float first[4], second[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 two = decode(v[4 * q + i], j);
                    first[i] = quotient<float, lifted.value>(two.x * by[4 * q + i], a[0], b[0], lift[0]);
                    second[i] = quotient<float, lifted.value>(two.y * by[4 * q + i], a[1], b[1], lift[1]);
                }
                word[0][q] = codes(first[0], first[1], first[2], first[3]);
                word[1][q] = codes(second[0], second[1], second[2], second[3]);
            }
            if (at.inside) {
                put(to, word[0]);
                put(to + R, word[1]);
            }
            to += 2 * static_cast<int64_t>(R);
        }
    };
    if (__any_sync(ALL, mine.lift != 1.0f)) store(std::true_type{});
    else store(std::false_type{});
}

Sizes sizes_of(int E, int R, int C, int group) {
    const unsigned down = (R + 127) / 128, across = (C + 127) / 128;
    return {R, C, down, across, static_cast<unsigned>(group), E * down * across};
}

template <typename T>
cudaError_t launch(
    const void* x, int64_t matrix_stride, int64_t stride, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, int E, int R, int C, int form, bool power_of_two, int variant,
    cudaStream_t stream) {
    const Sizes sizes = sizes_of(E, R, C, variant / 100 ? variant / 100 : 8);
    auto run = [&](auto form, auto stages) {
        constexpr int THREADS = 1024 / Lane<T>::COLS, BYTES = stages.value * 16 * THREADS * 16;
        auto kernel = transposed_kernel<T, static_cast<Form>(form.value), stages.value>;
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
        const unsigned resident = sizeof(T) == 4 ? 1 : stages.value == 2 ? 3 : 2;
        kernel<<<stages.value == 1 ? sizes.tiles : min(sizes.tiles, 132 * resident), THREADS, BYTES, stream>>>(
            static_cast<const T*>(x), matrix_stride, stride, values_t, scales_t, values, scales, scale_stride, sizes,
            power_of_two);
    };
    auto pick = [&](auto stages) {
        if (form == COLUMNS) run(std::integral_constant<int, COLUMNS>{}, stages);
        else if (form == BLOCKS) run(std::integral_constant<int, BLOCKS>{}, stages);
        else if (form == BLOCKS_TWICE) run(std::integral_constant<int, BLOCKS_TWICE>{}, stages);
        else run(std::integral_constant<int, BOTH_WAYS>{}, stages);
    };
    if (variant % 100 == 3) pick(std::integral_constant<int, 3>{});
    else if (variant % 100 == 1) pick(std::integral_constant<int, 1>{});
    else pick(std::integral_constant<int, 2>{});
    return cudaGetLastError();
}

}  // namespace

// `type`: 0 bf16, 1 fp16, 2 fp32; `form`: Form, whose COLUMNS and BLOCKS take no `values` and `scales`. Strides in values.
extern "C" cudaError_t casts_transposed(
    const void* x, int64_t matrix_stride, int64_t stride, int type, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, int E, int R, int C, int form, int power_of_two, int variant,
    cudaStream_t stream) {
    const auto run = type == 0 ? launch<__nv_bfloat16> : type == 1 ? launch<__half> : launch<float>;
    return run(
        x, matrix_stride, stride, values_t, scales_t, values, scales, scale_stride, E, R, C, form, power_of_two, variant,
        stream);
}

extern "C" cudaError_t casts_again(
    const uint8_t* x, const float* x_scales, int64_t scale_row, int64_t scale_column, uint8_t* values_t, float* scales_t,
    int R, int C, int power_of_two, int variant, cudaStream_t stream) {
    const Sizes sizes = sizes_of(1, R, C, variant ? variant : 8);
    again_kernel<<<sizes.tiles, 128, 0, stream>>>(
        x, x_scales, scale_row, scale_column, values_t, scales_t, sizes, power_of_two);
    return cudaGetLastError();
}
