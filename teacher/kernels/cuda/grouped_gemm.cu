// The grouped FP8 products of teacher/kernels/grouped_gemm.py for many rows: a warp loads, two groups of four multiply.
//
// A block's tile is 128 rows x 256 columns (SwiGLU: 128 of gate and the same 128 of up), in steps of 128 of K. Each
// multiplying group has 64 of the rows and goes its own way, so that one's additions in fp32 (Hopper's tensor cores
// add e4m3 products with 14 bits, so each 128 of K are added, scaled, on the ordinary cores) fall into the other's
// product. 128 registers a thread hold the sums, 64 the product that is next to be added.
//
// Two blocks of a cluster read one operand once from the L2, each loading half of it into both: the matrix where they
// multiply two row tiles (SHARE_MATRIX: 32 KB a step and block instead of 48), the rows where they multiply two column
// tiles (SHARE_ROWS: 40 KB). Where one of the two row tiles does not exist its block goes along on rows of zeros.
//
// Persistent: as many blocks as the chip holds; the loading warp finds its next tile from the experts' counts, so nothing
// is launched before, and tells the others with the tile's first operands. Sums go out by TMA. What is computed for rows
// that are no expert's is never written.

#include <cuda_runtime.h>

#include "gemm_product.cuh"
#include "gemm_schedule.cuh"
#include "gemm_store.cuh"
#include "hopper.cuh"

namespace gemm {

constexpr int ROWS = 128, K_STEP = 128, STAGES = 4;
constexpr int X_BYTES = ROWS * K_STEP, W_BYTES = 256 * K_STEP, STAGE = X_BYTES + W_BYTES;
constexpr int THREADS = 384;
constexpr int TILES = 8;  // that blocks' warps are told ahead: more than STAGES, so that none is overwritten unread
constexpr int SHARED_BYTES = STAGES * STAGE + 4 * PIECE + TILES * 16 + 2 * STAGES * 8;

enum Mode { ALONE, SHARE_MATRIX, SHARE_ROWS };

struct Arguments {
    const float *x_scales, *w_scales;
    long x_scale_stride;
    void* out;
    float* out_scales;
    long out_scale_stride;
    Groups groups;
    int rows, columns, k;  // columns of the output: a SwiGLU's matrix has twice as many rows
    int group;
    bool by_tma;
};

template <Kind KIND, Mode MODE>
struct Ring {
    uint32_t base;
    unsigned step = 0;

    __device__ explicit Ring(uint32_t base) : base(base) {}
    __device__ int stage() const { return step % STAGES; }
    __device__ int phase() const { return step / STAGES % 2; }
    __device__ uint32_t x() const { return base + stage() * STAGE; }
    __device__ uint32_t w() const { return x() + X_BYTES; }
    __device__ uint32_t staging(int group) const { return base + STAGES * STAGE + group * 2 * PIECE; }
    __device__ uint32_t told(unsigned tile) const { return base + STAGES * STAGE + 4 * PIECE + tile % TILES * 16; }
    __device__ uint32_t full() const { return told(0) + TILES * 16 + stage() * 8; }
    __device__ uint32_t empty() const { return full() + STAGES * 8; }
};

template <Kind KIND, Mode MODE>
__device__ Walk walk(const Arguments& a) {
    constexpr int wide = KIND == SWIGLU ? 128 : 256;
    return {a.groups, MODE == SHARE_MATRIX ? 2 * ROWS : ROWS,
            MODE == SHARE_ROWS ? (a.columns + 2 * wide - 1) / (2 * wide) : (a.columns + wide - 1) / wide, a.group};
}

__device__ void tell(uint32_t at, const Tile& tile) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(tile.expert), "r"(tile.row), "r"(tile.rows),
                 "r"(tile.column)
                 : "memory");
}
__device__ void hear(uint32_t at, Tile& tile) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.expert), "=r"(tile.row), "=r"(tile.rows), "=r"(tile.column)
                 : "r"(at)
                 : "memory");
}

// From a cluster's tile to the block's own.
template <Mode MODE>
__device__ void own(Tile& tile, int rank) {
    if (MODE == SHARE_MATRIX) tile.row += rank * ROWS, tile.rows -= rank * ROWS;
    if (MODE == SHARE_ROWS) tile.column = tile.column * 2 + rank;
}

template <Kind KIND, Mode MODE>
__device__ void load(const CUtensorMap* x_map, const CUtensorMap* w_map, const Arguments& a, uint32_t base) {
    const int rank = MODE == ALONE ? 0 : hopper::cluster_rank();
    const int clusters = gridDim.x / (MODE == ALONE ? 1 : 2);
    const int k_steps = (a.k + K_STEP - 1) / K_STEP;
    Ring<KIND, MODE> ring(base);
    Walk find = walk<KIND, MODE>(a);
    Tile tile;
    unsigned number = 0;
    for (int index = blockIdx.x / (MODE == ALONE ? 1 : 2); find.find(index, tile); index += clusters) {
        own<MODE>(tile, rank);
        if (threadIdx.x % 32 == 0) tell(ring.told(number++), tile);
        const int row = tile.rows > 0 ? tile.row : a.rows;  // beyond the last: TMA gives zeros
        const int first = KIND == SWIGLU ? tile.expert * a.columns * 2 + tile.column * 128
                                         : tile.expert * a.columns + tile.column * 256;
        const int second = first + (KIND == SWIGLU ? a.columns : 128);
        if (threadIdx.x % 32 == 0)
#pragma unroll 1
            for (int k = 0; k < k_steps; ++k, ++ring.step) {
                const int at = k * K_STEP;
                const uint32_t full = ring.full(), x = ring.x(), w = ring.w();
                hopper::barrier_wait(ring.empty(), ring.phase() ^ 1);
                hopper::barrier_expect(full, STAGE);
                if (MODE == SHARE_ROWS)
                    hopper::load_tile_both(x + rank * X_BYTES / 2, x_map, at, row + rank * ROWS / 2, full);
                else
                    hopper::load_tile(x, x_map, at, row, full);
                if (MODE == SHARE_MATRIX) {
                    hopper::load_tile_both(w + rank * W_BYTES / 2, w_map, at, rank == 0 ? first : second, full);
                } else {
                    hopper::load_tile(w, w_map, at, first, full);
                    hopper::load_tile(w + W_BYTES / 2, w_map, at, second, full);
                }
            }
        __syncwarp();
    }
    if (threadIdx.x % 32 == 0) {
        hopper::barrier_wait(ring.empty(), ring.phase() ^ 1);
        tile.expert = -1;
        tell(ring.told(number), tile);
        hopper::barrier_arrive(ring.full());
    }
}

struct Scales {  // of a step: of the two halves of the columns, of this thread's two rows
    float w[2], x[2];
};

template <Kind KIND, Mode MODE>
__device__ void multiply(const CUtensorMap* out_map, const Arguments& a, uint32_t base) {
    const int k_steps = (a.k + K_STEP - 1) / K_STEP;
    const int scale_rows = (a.columns + 127) / 128 * (KIND == SWIGLU ? 2 : 1);
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int local = threadIdx.x / 32 * 16 + lane / 4;  // and 8 below it: this thread's rows of the tile
    Ring<KIND, MODE> ring(base);
    const Output<KIND> output{out_map, static_cast<unsigned char*>(a.out), a.columns, a.by_tma, ring.staging(group),
                              1 + group};
    for (unsigned number = 0;; ++number) {
        Tile tile;
        hopper::barrier_wait(ring.full(), ring.phase());  // with its first operands comes which tile it is
        hear(ring.told(number), tile);
        if (tile.expert < 0) break;
        const int last = scale_rows / (KIND == SWIGLU ? 2 : 1) - 1;  // the second of two column tiles may not exist
        const int block = min(KIND == SWIGLU ? tile.column : tile.column * 2, last);
        const int other = KIND == SWIGLU ? block + last + 1 : min(block + 1, last);
        const float* w_at = a.w_scales + (tile.expert * static_cast<long>(scale_rows) + block) * k_steps;
        const int apart = (other - block) * k_steps;
        const float* x_at = a.x_scales + tile.row + local;
        const bool real = local < tile.rows, below = local + 8 < tile.rows;
        float sums[2][64], part[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = part[i] = 0.0f;
        int loaded = 0;  // scales of so many steps, two ahead of what is multiplied
        const auto next = [&](Scales& scales) {
            scales.w[0] = hopper::load_here(w_at), scales.w[1] = hopper::load_here(w_at + apart);
            scales.x[0] = hopper::load_here(x_at, real), scales.x[1] = hopper::load_here(x_at + 8, below);
            if (++loaded < k_steps) ++w_at, x_at += a.x_scale_stride;
        };
        const auto step = [&](Scales& scales) {
            hopper::barrier_wait(ring.full(), ring.phase());
            const uint32_t x = hopper::tile_descriptor(ring.x() + group * 64 * K_STEP);
            const uint32_t w = hopper::tile_descriptor(ring.w());
            float scale[2][2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                hopper::hold(part);
                hopper::product_fence();
#pragma unroll
                for (int i = 0; i < K_STEP / 32; ++i)
                    product_64x128x32(part, x + i * 2, w + half * (W_BYTES / 2 >> 4) + i * 2, i > 0);
                hopper::product_commit();
                if (half == 0) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) scale[i / 2][i % 2] = scales.w[i / 2] * scales.x[i % 2];
                    next(scales);
                }
                hopper::hold(part);
                hopper::product_wait<0>();
                hopper::hold(part);
                if (half == 1) {
                    if (MODE == ALONE) {
                        if (lane == 0) hopper::barrier_arrive(ring.empty());
                    } else if (lane < 2) {
                        hopper::barrier_arrive_at(ring.empty(), lane);
                    }
                }
#pragma unroll
                for (int i = 0; i < 64; ++i) sums[half][i] = __fmaf_rn(part[i], scale[half][i / 2 % 2], sums[half][i]);
            }
            ++ring.step;
        };
        Scales even, odd;
        next(even);
        next(odd);
#pragma unroll 1
        for (int k = 0; k < k_steps; k += 2) {
            step(even);
            if (k + 1 < k_steps) step(odd);
        }

        const int rows = tile.rows - group * 64;
        const long row = static_cast<long>(tile.row) + group * 64;
        if (rows <= 0) continue;
        if constexpr (KIND == SWIGLU) {
            const int column = tile.column * 128;
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                const bool inside = column + i / 4 * 8 + lane % 4 * 2 + i % 2 < a.columns;
                const float gate = sums[0][i];
                sums[0][i] = inside ? __fdividef(gate, 1.0f + __expf(-gate)) * sums[1][i] : 0.0f;
            }
            float scale[2];
            const uint32_t piece = output.open(0);
            put_codes(piece, sums[0], scale);
            output.close(piece, row, rows, column);
            if (lane % 4 == 0 && column < a.columns) {
                float* at = a.out_scales + tile.column * a.out_scale_stride + tile.row + local;
                if (real) at[0] = scale[0];
                if (below) at[8] = scale[1];
            }
        } else if constexpr (KIND == BF16) {
            const int column = tile.column * 256;
            uint32_t piece;
            put_bf16<0>(piece = output.open(0), sums[0]), output.close(piece, row, rows, column);
            put_bf16<8>(piece = output.open(1), sums[0]), output.close(piece, row, rows, column + 64);
            put_bf16<0>(piece = output.open(2), sums[1]), output.close(piece, row, rows, column + 128);
            put_bf16<8>(piece = output.open(3), sums[1]), output.close(piece, row, rows, column + 192);
        } else {
            const int column = tile.column * 256;
            uint32_t piece;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = column + half * 128;
                put_fp32<0>(piece = output.open(0), sums[half]), output.close(piece, row, rows, at);
                put_fp32<4>(piece = output.open(1), sums[half]), output.close(piece, row, rows, at + 32);
                put_fp32<8>(piece = output.open(2), sums[half]), output.close(piece, row, rows, at + 64);
                put_fp32<12>(piece = output.open(3), sums[half]), output.close(piece, row, rows, at + 96);
            }
        }
    }
    if (threadIdx.x % 128 == 0) hopper::stores_done();
}

template <Kind KIND, Mode MODE>
__global__ void __launch_bounds__(THREADS, 1)
    grouped(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
            const __grid_constant__ CUtensorMap out_map, const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    uint32_t base = hopper::shared(memory);
    asm volatile("" : "+r"(base));  // not found anew at every use
    if (threadIdx.x == 0) {
        hopper::prefetch(&x_map);
        hopper::prefetch(&w_map);
        const uint32_t barriers = Ring<KIND, MODE>(base).full();
        for (int i = 0; i < STAGES; ++i) {
            hopper::barrier_init(barriers + i * 8, 1);
            hopper::barrier_init(barriers + (STAGES + i) * 8, MODE == ALONE ? 8 : 16);  // warps that multiply
        }
        hopper::barrier_init_fence();
    }
    if (MODE == ALONE)
        __syncthreads();
    else
        hopper::cluster_sync();
    if (threadIdx.x >= 256) {
        hopper::fewer_registers<40>();
        if (threadIdx.x < 288) load<KIND, MODE>(&x_map, &w_map, a, base);
    } else {
        hopper::more_registers<232>();
        multiply<KIND, MODE>(&out_map, a, base);
    }
    if (MODE != ALONE) hopper::cluster_sync();  // until then the other block writes to this one's memory
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// A matrix of `rows` x `columns` values, read or written in boxes of 128 bytes of a row.
bool describe(Encode encode, CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* at, long rows,
              long columns, int box_rows) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(columns) * bytes};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t every[2] = {1, 1};
    return encode(map, type, 2, const_cast<void*>(at), sizes, pitch, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <Kind KIND, Mode MODE>
cudaError_t launch(const CUtensorMap* maps, const Arguments& a, int device, cudaStream_t stream) {
    constexpr int size = MODE == ALONE ? 1 : 2;
    static int blocks_of[64];  // by device, found at the first launch there
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = size;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.blockDim = THREADS;
    config.dynamicSmemBytes = SHARED_BYTES;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int& blocks = blocks_of[device % 64];
    if (blocks == 0) {
        cudaError_t status =
            cudaFuncSetAttribute(grouped<KIND, MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
        if (status != cudaSuccess) return status;
        config.gridDim = size;
        int clusters = 0;
        status = cudaOccupancyMaxActiveClusters(&clusters, grouped<KIND, MODE>, &config);
        if (status != cudaSuccess) return status;
        blocks = clusters * size;
    }
    config.gridDim = blocks;
    return cudaLaunchKernelEx(&config, grouped<KIND, MODE>, maps[0], maps[1], maps[2], a);
}

template <Kind KIND>
cudaError_t launch(Mode mode, const CUtensorMap* maps, const Arguments& a, int device, cudaStream_t stream) {
    if (mode == SHARE_MATRIX) return launch<KIND, SHARE_MATRIX>(maps, a, device, stream);
    if (mode == SHARE_ROWS) return launch<KIND, SHARE_ROWS>(maps, a, device, stream);
    return launch<KIND, ALONE>(maps, a, device, stream);
}

}  // namespace gemm

// x (rows, k) and w (experts, columns or twice as many, k) in e4m3, out (rows, columns): kind 0 bf16, 1 fp32, 2 e4m3
// with SwiGLU. Scales of rows lie column by column. mode: what two blocks of a cluster share, 0 nothing, 1 the matrix,
// 2 the rows. Launches on `stream`, a stream of `device`; waits for nothing.
extern "C" int grouped_gemm(const void* x, const float* x_scales, long x_scale_stride, const void* w,
                            const float* w_scales, void* out, float* out_scales, long out_scale_stride,
                            const int* start, const int* count, int experts, int rows, int columns, int k, int kind,
                            int mode, int group, int device, cudaStream_t stream) {
    using namespace gemm;
    static Encode encode = nullptr;
    if (encode == nullptr) {
        cudaDriverEntryPointQueryResult found;
        void* entry = nullptr;
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        if (status != cudaSuccess) return status;
        if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
        encode = reinterpret_cast<Encode>(entry);
    }
    const int bytes = kind == BF16 ? 2 : kind == FP32 ? 4 : 1;
    const CUtensorMapDataType type = kind == BF16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : kind == FP32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                    : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const long matrix_rows = static_cast<long>(experts) * columns * (kind == SWIGLU ? 2 : 1);
    const bool by_tma = static_cast<long>(columns) * bytes % 16 == 0 && reinterpret_cast<uint64_t>(out) % 16 == 0;
    CUtensorMap maps[3];
    if (!describe(encode, &maps[0], CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, x, rows, k, mode == SHARE_ROWS ? 64 : 128) ||
        !describe(encode, &maps[1], CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w, matrix_rows, k, 128))
        return cudaErrorInvalidValue;
    maps[2] = maps[0];
    if (by_tma && !describe(encode, &maps[2], type, bytes, out, rows, columns, 64)) return cudaErrorInvalidValue;
    const Arguments arguments{x_scales, w_scales, x_scale_stride, out,     out_scales, out_scale_stride,
                              {start, count, experts}, rows,      columns, k,          group, by_tma};
    int current = 0;
    cudaError_t status = cudaGetDevice(&current);
    if (status == cudaSuccess && current != device) status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    const Mode chosen = static_cast<Mode>(mode);
    status = kind == BF16   ? launch<BF16>(chosen, maps, arguments, device, stream)
             : kind == FP32 ? launch<FP32>(chosen, maps, arguments, device, stream)
                            : launch<SWIGLU>(chosen, maps, arguments, device, stream);
    if (current != device) cudaSetDevice(current);
    return status;
}
