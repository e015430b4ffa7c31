// The casts whose result lies transposed, rows (tokens) last: as casts.cu, and without any exchange of values. A thread
// holds 16 rows of a few columns, and the conversion to e4m3, which takes its two values from any two registers, packs
// them along the rows. Maxima are exchanged so that at the end each lane has one scale to compute, every one another.
//
// A block of threads takes a tile of 128 x 128, whole rows at a time, into shared memory. What is written as it lies,
// too, is read from there once more, row by row, so that whole lines of 128 bytes are written either way.
//
// Taken: R a multiple of 16 and C of 8; x aligned to 16 bytes, row by row. R rows, C columns.

#include "casts_tiles.cuh"

namespace {

enum Form { COLUMNS, BLOCKS, BLOCKS_TWICE, BOTH_WAYS };  // scales of 128 x 1; of 128 x 128, as it lies too; 1 x 128 too

// A thread has 16 rows of COLS columns. After 16 rows in shared memory as many bytes are left out as 4 lanes read of a
// row, so that lanes that are served at once meet no bank twice.
template <typename T>
struct Tile {
    static constexpr int COLS = 4, WORDS = COLS * sizeof(T) / 4, THREADS = 1024 / COLS, WARPS = THREADS / 32;
    static constexpr int ACROSS = Lane<T>::COLS, LANES = 128 / ACROSS;  // 16 bytes of a row, and their lanes
    static constexpr int ROW = 128 * sizeof(T), GAP = 16 * WORDS, BYTES = 128 * ROW + 8 * GAP;
    static __device__ int at(int row) { return row * ROW + row / 16 * GAP; }
};

__device__ void words(uint32_t (&v)[4], const uint8_t* from) {
    const uint4 q = *reinterpret_cast<const uint4*>(from);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}
__device__ void words(uint32_t (&v)[2], const uint8_t* from) {
    const uint2 q = *reinterpret_cast<const uint2*>(from);
    v[0] = q.x, v[1] = q.y;
}

template <typename T>
__device__ void bring(
    uint8_t* slot, const T* x, int64_t matrix_stride, int64_t stride, const Place& at, const Order& order) {
    constexpr int LANES = Tile<T>::LANES, STEP = Tile<T>::THREADS / LANES;
    const int own = threadIdx.x % LANES, first = threadIdx.x / LANES, row = at.row * 128 + first;
    const int column = at.column * 128 + own * Tile<T>::ACROSS;
    const T* from = x + at.matrix * matrix_stride + row * stride + column;
    if (column >= order.C) return;
#pragma unroll
    for (int i = 0; i < 128 / STEP; ++i) {
        if (row + STEP * i < order.R) fetch(slot + Tile<T>::at(first + STEP * i) + own * 16, from);
        from += STEP * stride;
    }
}

template <typename T>
__device__ void write_columns(
    uint8_t* to, int R, const uint32_t (&v)[16][Tile<T>::WORDS], const Scale& mine, bool columns_alone, bool inside) {
    const int lane = threadIdx.x % 32;
    auto store = [&](auto lifted) {
#pragma unroll
        for (int j = 0; j < Tile<T>::COLS; ++j) {
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

// Tiles of 1 x 128: as rows_kernel of casts.cu, from shared memory. `to` and `scales` are the tile's first.
template <typename T>
__device__ void write_rows(
    uint8_t* to, float* scales, const uint8_t* slot, int rows, int columns, int C, bool power_of_two) {
    using L = Lane<T>;
    constexpr int LANES = Tile<T>::LANES, LOADS = 4, EACH = 128 / Tile<T>::WARPS, STEP = LOADS * 32 / LANES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane % LANES, column = own * L::COLS;
#pragma unroll 1
    for (int group = 0; group < EACH; group += STEP) {
        const int row = warp * EACH + group + lane / LANES * LOADS;
        const bool inside = column < columns && row < rows;
        uint32_t v[LOADS][4], m[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            words(v[i], slot + Tile<T>::at(row + i) + own * 16);
            m[i] = inside ? largest_of<L>(v[i]) : 0;
        }
        uint32_t largest = spread_max<LOADS, 0>(m, lane);
#pragma unroll
        for (int bit = LOADS; bit < LANES; bit *= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, bit));
        const Scale mine = scale_of<T>(largest, power_of_two);
        if (own < LOADS && row < rows) scales[row + own] = mine.scale;
        uint8_t* place = to + static_cast<int64_t>(row) * C + column;
        auto store = [&](auto lifted) {
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const float a = __shfl_sync(ALL, mine.a, i, LANES), b = __shfl_sync(ALL, mine.b, i, LANES);
                const float lift = lifted.value ? __shfl_sync(ALL, mine.lift, i, LANES) : 1.0f;
                uint32_t word[L::COLS / 4];
                encode<T, lifted.value>(word, v[i], a, b, lift);
                if (inside) put(place, word);
                place += C;
            }
        };
        if (__any_sync(ALL, mine.lift != 1.0f)) store(std::true_type{});
        else store(std::false_type{});
    }
    // What follows reads the values anew: kept, they would take many registers.
    asm volatile("" ::: "memory");
}

// The tile as it lies, by one scale.
template <typename T>
__device__ void write_block(uint8_t* to, const uint8_t* slot, int rows, int columns, int C, const Scale& s) {
    using L = Lane<T>;
    constexpr int LANES = Tile<T>::LANES, EACH = 128 / Tile<T>::WARPS, STEP = 32 / LANES;
    const int own = threadIdx.x % LANES, column = own * L::COLS;
    const int row = threadIdx.x / 32 * EACH + threadIdx.x % 32 / LANES;
    to += static_cast<int64_t>(row) * C + column;
    auto store = [&](auto lifted) {
#pragma unroll 4
        for (int i = 0; i < EACH; i += STEP) {
            uint32_t v[4], word[L::COLS / 4];
            words(v, slot + Tile<T>::at(row + i) + own * 16);
            encode<T, lifted.value>(word, v, s.a, s.b, s.lift);
            if (column < columns && row + i < rows) put(to, word);
            to += static_cast<int64_t>(STEP) * C;
        }
    };
    if (s.lift != 1.0f) store(std::true_type{});
    else store(std::false_type{});
}

template <typename T, Form FORM>
__global__ void __launch_bounds__(Tile<T>::THREADS, sizeof(T) == 4 ? 3 : 4) transposed_kernel(
    const T* x, int64_t matrix_stride, int64_t stride, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, const Order order, bool power_of_two) {
    constexpr int COLS = Tile<T>::COLS, WORDS = Tile<T>::WORDS;
    const int R = order.R, C = order.C, warp = threadIdx.x / 32, lane = threadIdx.x % 32, high = lane >> SHIFT;
    const int own = (warp * 4 + lane % 4) * COLS;
    extern __shared__ __align__(128) uint8_t slot[];
    const Place at = order.place(blockIdx.x);
    bring(slot, x, matrix_stride, stride, at, order);
    const int row = at.row * 128, column = at.column * 128, rows = R - row, columns = C - column;
    const bool inside = own < columns && high * 16 < rows;
    const int64_t first = static_cast<int64_t>(at.matrix) * R * C;
    uint8_t* to_t = values_t + first + static_cast<int64_t>(column + own) * R + row + high * 16;
    uint8_t* to = values + first + static_cast<int64_t>(row) * C + column;
    arrived();
    __syncthreads();
    if (FORM == BOTH_WAYS) {
        write_rows<T>(to, scales + at.column * scale_stride + row, slot, rows, columns, C, power_of_two);
    }
    uint32_t v[16][WORDS], a[WORDS] = {}, m[COLS];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        words(v[i], slot + Tile<T>::at(high * 16) + i * Tile<T>::ROW + own * static_cast<int>(sizeof(T)));
#pragma unroll
        for (int w = 0; w < WORDS; ++w) a[w] = Lane<T>::larger(a[w], v[i][w]);
    }
#pragma unroll
    for (int j = 0; j < COLS; ++j) m[j] = inside ? Lane<T>::bits(a, j) : 0;
    if (FORM == COLUMNS || FORM == BOTH_WAYS) {
        uint32_t largest = spread_max<COLS, SHIFT>(m, lane);
        largest = max(largest, __shfl_xor_sync(ALL, largest, COLS << SHIFT));
        const Scale mine = scale_of<T>(largest, power_of_two);
        const int mine_of = column + own + high;
        if (high < COLS && mine_of < C) scales_t[static_cast<int64_t>(at.row) * C + mine_of] = mine.scale;
        write_columns<T>(to_t, R, v, mine, true, inside);
    } else {
        const uint32_t most = max(max(m[0], m[1]), max(m[2], m[3]));
        const Scale s = scale_of<T>(block_max<Tile<T>::WARPS>(most), power_of_two);
        if (threadIdx.x == 0) {
            const int64_t matrix = static_cast<int64_t>(at.matrix) * order.down * order.across;
            scales_t[matrix + at.column * order.down + at.row] = s.scale;
            if (FORM == BLOCKS_TWICE) scales[matrix + at.row * order.across + at.column] = s.scale;
        }
        write_columns<T>(to_t, R, v, s, false, inside);
        if (FORM == BLOCKS_TWICE) write_block<T>(to, slot, rows, columns, C, s);
    }
}

template <typename T>
cudaError_t launch(
    const void* x, int64_t matrix_stride, int64_t stride, uint8_t* values_t, float* scales_t, uint8_t* values,
    float* scales, int64_t scale_stride, int E, int R, int C, int form, bool power_of_two,
    cudaStream_t stream) {
    // What is written transposed alone does best with rows of tiles side by side, what is written both ways with few.
    const Order order(E, R, C, form == COLUMNS || form == BLOCKS ? 128 : 2);
    auto run = [&](auto form) {
        constexpr int BYTES = Tile<T>::BYTES;
        auto kernel = transposed_kernel<T, static_cast<Form>(form.value)>;
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
        if (status != cudaSuccess) return status;
        kernel<<<order.tiles, Tile<T>::THREADS, BYTES, stream>>>(
            static_cast<const T*>(x), matrix_stride, stride, values_t, scales_t, values, scales, scale_stride, order,
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
