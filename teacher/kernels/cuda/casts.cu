// The FP8 casts of teacher/kernels/quantize.py, which says what is computed and why it is exact; bytes are all that
// should count. A value is read once, 16 bytes a thread and all of a thread's loads under way at a time, and stays in
// its own type until its block's scale is known. Transposed forms: casts_transposed.cu.
//
// Taken: C a multiple of 8; x aligned to 16 bytes, row by row. R rows, C columns.

#include "casts_values.cuh"

namespace {

// Tiles of 1 x 128: a warp takes 128 columns of LOADS rows, or twice as many where a row takes half of it.
template <typename T, int LOADS>
struct Rows {
    using L = Lane<T>;
    static constexpr int LANES = 128 / L::COLS, ROWS = LOADS * 32 / LANES;
};

template <typename T, int LOADS>
__device__ void cast_rows(
    const uint32_t (&v)[LOADS][4], uint8_t* values, float* scales, int row, int column, int R, int C, bool power_of_two) {
    using L = Lane<T>;
    constexpr int LANES = Rows<T, LOADS>::LANES;
    const int lane = threadIdx.x % 32, own = lane % LANES;
    uint32_t m[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) m[i] = largest_of<L>(v[i]);
    uint32_t largest = spread_max<LOADS, 0>(m, lane);
#pragma unroll
    for (int bit = LOADS; bit < LANES; bit *= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, bit));
    const Scale mine = scale_of<T>(largest, power_of_two);
    if (own < LOADS && row + own < R) scales[row + own] = mine.scale;
    uint8_t* to = values + static_cast<int64_t>(row) * C + column;

    auto store = [&](auto lifted) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const float a = __shfl_sync(ALL, mine.a, i, LANES), b = __shfl_sync(ALL, mine.b, i, LANES);
            const float lift = lifted.value ? __shfl_sync(ALL, mine.lift, i, LANES) : 1.0f;
            uint32_t word[L::COLS / 4];
            encode<T, lifted.value>(word, v[i], a, b, lift);
            if (column < C && row + i < R) put(to, word);
            to += C;
        }
    };
    if (__any_sync(ALL, mine.lift != 1.0f)) store(std::true_type{});
    else store(std::false_type{});
}

template <typename T, int LOADS, bool GATHER>
__global__ void __launch_bounds__(256) rows_kernel(
    const T* x, int64_t stride, const int* source, uint8_t* values, float* scales, int64_t scale_stride, int R, int C,
    unsigned across, bool power_of_two) {
    using L = Lane<T>;
    constexpr int LANES = Rows<T, LOADS>::LANES, ROWS = Rows<T, LOADS>::ROWS;
    const unsigned tile = blockIdx.x * 8 + threadIdx.x / 32, group = tile / across, block = tile - group * across;
    const int lane = threadIdx.x % 32, row = group * ROWS + lane / LANES * LOADS;
    const int column = block * 128 + lane % LANES * L::COLS;
    if (static_cast<int>(group * ROWS) >= R) return;
    uint32_t v[LOADS][4];
    const T* from = x + (GATHER ? 0 : row * stride) + column;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const bool inside = column < C && row + i < R;
        if (GATHER) from = x + (inside ? source[row + i] : 0) * stride + column;
        load(v[i], from, inside);
        from += stride;
    }
    cast_rows<T, LOADS>(v, values, scales + block * scale_stride, row, column, R, C, power_of_two);
}

// The same by as many threads as fit, each with its next tile on the way while it works on one.
template <typename T, int LOADS, bool GATHER>
__global__ void __launch_bounds__(256) rows_ring_kernel(
    const T* x, int64_t stride, const int* source, uint8_t* values, float* scales, int64_t scale_stride, int R, int C,
    unsigned across, unsigned tiles, bool power_of_two) {
    using L = Lane<T>;
    constexpr int LANES = Rows<T, LOADS>::LANES, ROWS = Rows<T, LOADS>::ROWS;
    extern __shared__ uint4 ring[];
    const int lane = threadIdx.x % 32;
    auto ask = [&](unsigned tile, int stage) {
        if (tile < tiles) {
            const unsigned group = tile / across, block = tile - group * across;
            const int row = group * ROWS + lane / LANES * LOADS, column = block * 128 + lane % LANES * L::COLS;
            const T* from = x + (GATHER ? 0 : row * stride) + column;
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const bool inside = column < C && row + i < R;
                if (GATHER) from = x + (inside ? source[row + i] : 0) * stride + column;
                fetch(&ring[(stage * LOADS + i) * 256 + threadIdx.x], from, inside);
                from += stride;
            }
        }
        fetched();
    };
    unsigned tile = blockIdx.x * 8 + threadIdx.x / 32;
    ask(tile, 0);
    for (int stage = 0; tile < tiles; stage ^= 1) {
        const unsigned next = tile + gridDim.x * 8;
        ask(next, stage ^ 1);
        arrived<1>();
        uint32_t v[LOADS][4];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const uint4 q = ring[(stage * LOADS + i) * 256 + threadIdx.x];
            v[i][0] = q.x, v[i][1] = q.y, v[i][2] = q.z, v[i][3] = q.w;
        }
        const unsigned group = tile / across, block = tile - group * across;
        const int row = group * ROWS + lane / LANES * LOADS, column = block * 128 + lane % LANES * L::COLS;
        cast_rows<T, LOADS>(v, values, scales + block * scale_stride, row, column, R, C, power_of_two);
        tile = next;
    }
}

// Blocks of 128 x 128 as they lie: half a warp takes 128 columns of a row (a warp, of fp32).
template <typename T, int LOADS>
__global__ void __launch_bounds__(16384 / Lane<T>::COLS / LOADS) blocks_kernel(
    const T* x, int64_t matrix_stride, int64_t stride, uint8_t* values, float* scales, int R, int C, unsigned down,
    unsigned across, bool power_of_two) {
    using L = Lane<T>;
    constexpr int LANES = 128 / L::COLS, STEP = 128 / LOADS, THREADS = STEP * LANES;
    const Place at = place_of(blockIdx.x, down, across, 1);
    const int row = at.row * 128 + threadIdx.x / LANES, column = at.column * 128 + threadIdx.x % LANES * L::COLS;
    const T* from = x + at.matrix * matrix_stride + row * stride + column;
    uint32_t v[LOADS][4], largest = 0;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        load(v[i], from, column < C && row + i * STEP < R);
        from += STEP * stride;
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) largest = max(largest, largest_of<L>(v[i]));
    const Scale s = scale_of<T>(block_max<THREADS / 32>(largest, 0), power_of_two);
    if (threadIdx.x == 0) scales[(static_cast<int64_t>(at.matrix) * down + at.row) * across + at.column] = s.scale;
    uint8_t* to = values + (static_cast<int64_t>(at.matrix) * R + row) * C + column;

    auto store = [&](auto lifted) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            uint32_t word[L::COLS / 4];
            encode<T, lifted.value>(word, v[i], s.a, s.b, s.lift);
            if (column < C && row + i * STEP < R) put(to, word);
            to += static_cast<int64_t>(STEP) * C;
        }
    };
    if (s.lift != 1.0f) store(std::true_type{});
    else store(std::false_type{});
}

template <typename T>
cudaError_t rows_launch(
    const void* x, int64_t stride, const int* source, uint8_t* values, float* scales, int64_t scale_stride, int R, int C,
    bool power_of_two, int variant, cudaStream_t stream) {
    const unsigned across = (C + 127) / 128;
    auto run = [&](auto loads, auto gather) {
        constexpr int ROWS = Rows<T, loads.value>::ROWS;
        const unsigned tiles = (R + ROWS - 1) / ROWS * across;
        if (variant < 100) {
            rows_kernel<T, loads.value, gather.value><<<(tiles + 7) / 8, 256, 0, stream>>>(
                static_cast<const T*>(x), stride, source, values, scales, scale_stride, R, C, across, power_of_two);
        } else {
            const int bytes = 2 * loads.value * 256 * 16;
            auto kernel = rows_ring_kernel<T, loads.value, gather.value>;
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
            kernel<<<min((tiles + 7) / 8, 132u * (variant / 100)), 256, bytes, stream>>>(
                static_cast<const T*>(x), stride, source, values, scales, scale_stride, R, C, across, tiles,
                power_of_two);
        }
    };
    auto pick = [&](auto gather) {
        if (R < 512) run(std::integral_constant<int, 1>{}, gather);
        else if (variant % 100 == 2) run(std::integral_constant<int, 2>{}, gather);
        else if (variant % 100 == 8) run(std::integral_constant<int, 8>{}, gather);
        else run(std::integral_constant<int, 4>{}, gather);
    };
    if (source != nullptr) pick(std::true_type{});
    else pick(std::false_type{});
    return cudaGetLastError();
}

template <typename T>
cudaError_t blocks_launch(
    const void* x, int64_t matrix_stride, int64_t stride, uint8_t* values, float* scales, int E, int R, int C,
    bool power_of_two, int variant, cudaStream_t stream) {
    const unsigned down = (R + 127) / 128, across = (C + 127) / 128, tiles = E * down * across;
    auto run = [&](auto loads) {
        blocks_kernel<T, loads.value><<<tiles, 16384 / Lane<T>::COLS / loads.value, 0, stream>>>(
            static_cast<const T*>(x), matrix_stride, stride, values, scales, R, C, down, across, power_of_two);
    };
    if (variant == 8 || sizeof(T) == 4) run(std::integral_constant<int, 8>{});
    else if (variant == 2) run(std::integral_constant<int, sizeof(T) == 4 ? 8 : 2>{});
    else run(std::integral_constant<int, sizeof(T) == 4 ? 8 : 4>{});
    return cudaGetLastError();
}

}  // namespace

// `type`: 0 bf16, 1 fp16, 2 fp32. Strides in values.
extern "C" cudaError_t casts_rows(
    const void* x, int64_t stride, int type, const int* source, uint8_t* values, float* scales, int64_t scale_stride,
    int R, int C, int power_of_two, int variant, cudaStream_t stream) {
    const auto launch = type == 0 ? rows_launch<__nv_bfloat16> : type == 1 ? rows_launch<__half> : rows_launch<float>;
    return launch(x, stride, source, values, scales, scale_stride, R, C, power_of_two, variant, stream);
}

extern "C" cudaError_t casts_blocks(
    const void* x, int64_t matrix_stride, int64_t stride, int type, uint8_t* values, float* scales, int E, int R, int C,
    int power_of_two, int variant, cudaStream_t stream) {
    const auto launch =
        type == 0 ? blocks_launch<__nv_bfloat16> : type == 1 ? blocks_launch<__half> : blocks_launch<float>;
    return launch(x, matrix_stride, stride, values, scales, E, R, C, power_of_two, variant, stream);
}
