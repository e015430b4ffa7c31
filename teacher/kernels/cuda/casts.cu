// The FP8 casts of teacher/kernels/quantize.py, which says what is computed and why it is exact; bytes are all that
// should count. A value is read once, 16 bytes a thread and all of a thread's loads under way at a time, and stays in
// its own type until its block's scale is known. Transposed forms: casts_transposed.cu.
//
// Taken: C a multiple of 8; x aligned to 16 bytes, row by row. R rows, C columns.

#include "casts_values.cuh"

namespace {

// Tiles of 1 x 128: a warp takes LOADS rows of 512 bytes, half a warp a tile of 16-bit values. Two warps' rows follow
// each other, four warps' columns.
template <typename T, int LOADS, bool GATHER>
__global__ void __launch_bounds__(256) rows_kernel(
    const T* x, int64_t stride, const int* source, uint8_t* values, float* scales, int64_t scale_stride, int R, int C,
    unsigned across, bool power_of_two) {
    using L = Lane<T>;
    constexpr int LANES = 128 / L::COLS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane % LANES;
    const unsigned tile = blockIdx.x * 4 + warp / 2, group = tile / across;
    const int row = (group * 2 + warp % 2) * LOADS, column = ((tile - group * across) * 32 + lane) * L::COLS;
    if (row >= R) return;
    uint32_t v[LOADS][4], m[LOADS];
    const T* from = x + (GATHER ? 0 : row * stride) + column;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const bool inside = column < C && row + i < R;
        if (GATHER) from = x + (inside ? source[row + i] : 0) * stride + column;
        load(v[i], from, inside);
        from += stride;
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) m[i] = largest_of<L>(v[i]);
    uint32_t largest = spread_max<LOADS, 0>(m, lane);
#pragma unroll
    for (int bit = LOADS; bit < LANES; bit *= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, bit));
    const Scale mine = scale_of<T>(largest, power_of_two);
    const int block = column / 128;
    if (own < LOADS && row + own < R && block * 128 < C) scales[block * scale_stride + row + own] = mine.scale;
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

// Blocks of 128 x 128 as they lie: half a warp takes 128 columns of a row (a warp, of fp32).
template <typename T, int LOADS>
__global__ void __launch_bounds__(16384 / Lane<T>::COLS / LOADS) blocks_kernel(
    const T* x, int64_t matrix_stride, int64_t stride, uint8_t* values, float* scales, int R, int C,
    bool power_of_two) {
    using L = Lane<T>;
    constexpr int LANES = 128 / L::COLS, STEP = 128 / LOADS, THREADS = STEP * LANES;
    const int row = blockIdx.y * 128 + threadIdx.x / LANES, column = blockIdx.x * 128 + threadIdx.x % LANES * L::COLS;
    const T* from = x + blockIdx.z * matrix_stride + row * stride + column;
    uint32_t v[LOADS][4], largest = 0;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        load(v[i], from, column < C && row + i * STEP < R);
        from += STEP * stride;
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) largest = max(largest, largest_of<L>(v[i]));
    const Scale s = scale_of<T>(block_max<THREADS / 32>(largest), power_of_two);
    if (threadIdx.x == 0) {
        scales[(static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = s.scale;
    }
    uint8_t* to = values + (static_cast<int64_t>(blockIdx.z) * R + row) * C + column;

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
    const void* x, int64_t stride, const int* source, uint8_t* values, float* scales, int64_t scale_stride, int R,
    int C, bool power_of_two, cudaStream_t stream) {
    const unsigned across = (C + 32 * Lane<T>::COLS - 1) / (32 * Lane<T>::COLS);
    auto run = [&](auto loads, auto gather) {
        const unsigned tiles = (R + 2 * loads.value - 1) / (2 * loads.value) * across;
        rows_kernel<T, loads.value, gather.value><<<(tiles + 3) / 4, 256, 0, stream>>>(
            static_cast<const T*>(x), stride, source, values, scales, scale_stride, R, C, across, power_of_two);
    };
    auto pick = [&](auto loads) {
        if (source != nullptr) run(loads, std::true_type{});
        else run(loads, std::false_type{});
    };
    if (R < 512) pick(std::integral_constant<int, 1>{});
    else pick(std::integral_constant<int, 4>{});
    return cudaGetLastError();
}

template <typename T>
cudaError_t blocks_launch(
    const void* x, int64_t matrix_stride, int64_t stride, uint8_t* values, float* scales, int E, int R, int C,
    bool power_of_two, cudaStream_t stream) {
    constexpr int LOADS = sizeof(T) == 4 ? 8 : 4;
    const dim3 tiles((C + 127) / 128, (R + 127) / 128, E);
    blocks_kernel<T, LOADS><<<tiles, 16384 / Lane<T>::COLS / LOADS, 0, stream>>>(
        static_cast<const T*>(x), matrix_stride, stride, values, scales, R, C, power_of_two);
    return cudaGetLastError();
}

}  // namespace

// `type`: 0 bf16, 1 fp16, 2 fp32. Strides in values.
extern "C" cudaError_t casts_rows(
    const void* x, int64_t stride, int type, const int* source, uint8_t* values, float* scales, int64_t scale_stride,
    int R, int C, int power_of_two, cudaStream_t stream) {
    const auto launch = type == 0 ? rows_launch<__nv_bfloat16> : type == 1 ? rows_launch<__half> : rows_launch<float>;
    return launch(x, stride, source, values, scales, scale_stride, R, C, power_of_two, stream);
}

extern "C" cudaError_t casts_blocks(
    const void* x, int64_t matrix_stride, int64_t stride, int type, uint8_t* values, float* scales, int E, int R, int C,
    int power_of_two, cudaStream_t stream) {
    const auto launch =
        type == 0 ? blocks_launch<__nv_bfloat16> : type == 1 ? blocks_launch<__half> : blocks_launch<float>;
    return launch(x, matrix_stride, stride, values, scales, E, R, C, power_of_two, stream);
}
