// The grouped FP8 products of teacher/kernels/grouped_gemm.py for many rows: a warp loads, two groups of four multiply.
//
// A block's tile is 128 rows x 256 columns (SwiGLU: 128 of gate and the same 128 of up), in steps of 128 of K. Each
// multiplying group has 64 of the rows. Hopper's tensor cores add e4m3 products with 14 bits, so each 128 of K are
// added, scaled, on the ordinary cores; 128 registers a thread hold the sums, 64 the product that is next to be added.
// The groups take turns at issuing products, so that one adds while the tensor cores have the other's: left alone, both
// products are done in turns of an instruction, end together, and then the tensor cores wait for two additions.
//
// Two blocks of a cluster read one operand once from the L2, each loading half of it into both: the matrix where they
// multiply two row tiles (SHARE_MATRIX: 32 KB a step and block instead of 48), the rows where they multiply two column
// tiles (SHARE_ROWS: 40 KB). Where one of the two row tiles does not exist its block goes along on rows of zeros.
//
// Persistent: as many blocks as the chip holds; the loading warp finds its next tile from the experts' counts, so nothing
// is launched before, and tells the others with the tile's first operands. Sums go out by TMA. What is computed for rows
// that are no expert's is never written.

#include <cuda_runtime.h>

#include "gemm_load.cuh"
#include "gemm_product.cuh"
#include "gemm_ring.cuh"
#include "gemm_store.cuh"
#include "hopper.cuh"

namespace gemm {
namespace {

constexpr int THREADS = 384;
// The turn is given when so many instructions of a product of four are left; 0: no turns.
#ifndef GEMM_LEFT
#define GEMM_LEFT 1
#endif
constexpr int LEFT = GEMM_LEFT;

template <Kind KIND, Mode MODE>
__device__ void multiply(const CUtensorMap* out_map, const Arguments& a, Ring ring) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int local = threadIdx.x / 32 * 16 + lane / 4;  // and 8 below it: this thread's rows of the tile
    Output<KIND> output{out_map, static_cast<unsigned char*>(a.out), a.columns, a.by_tma, ring.staging(group),
                        1 + group};
    for (unsigned number = 0;; ++number) {
        hopper::barrier_wait(ring.full(), ring.phase());
        const Tile tile = ring.read_note(number);
        if (tile.expert < 0) break;
        float sums[2][64], part[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = part[i] = 0.0f;
#pragma unroll 1
        for (int k = 0; k < a.steps(); ++k, ring.next()) {
            hopper::barrier_wait(ring.full(), ring.phase());
            const uint32_t x = hopper::tile_descriptor(ring.x() + group * 64 * K_STEP);
            const uint32_t w = hopper::tile_descriptor(ring.w());
            float scale[2][2];  // of a half of the columns, of a row
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                hopper::hold(part);
                if (LEFT > 0) ring.wait_turn(group, half);
                hopper::product_fence();
#pragma unroll
                for (int i = 0; i < K_STEP / 32; ++i) {
                    if (LEFT > 0 && i == K_STEP / 32 - LEFT) hopper::product_commit();
                    product_64x128x32(part, x + i * 2, w + half * (W_BYTES / 2 >> 4) + i * 2, i > 0);
                }
                hopper::product_commit();
                if (half == 0) {
                    const float row = hopper::load_shared(ring.scales() + local * 4);
                    const float below = hopper::load_shared(ring.scales() + local * 4 + 32);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float columns = hopper::load_shared(ring.scales() + (ROWS + i) * 4);
                        scale[i][0] = row * columns, scale[i][1] = below * columns;
                    }
                }
                hopper::hold(part);
                if (LEFT > 0 && LEFT < K_STEP / 32) hopper::product_wait<1>();
                if (LEFT > 0) ring.give_turn(group);
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
        }

        const int rows = tile.rows - group * 64;
        const long row = static_cast<long>(tile.row) + group * 64;
        if (rows > 0) put_tile<KIND>(output, sums, tile, row, rows, local, a);
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
    const Ring ring(base);
    if (threadIdx.x == 0) {
        hopper::prefetch(&x_map);
        hopper::prefetch(&w_map);
        ring.begin(MODE);
    }
    if (MODE == ALONE)
        __syncthreads();
    else
        hopper::cluster_sync();
    const int warp = threadIdx.x / 32;
    if (warp >= 8) {
        hopper::fewer_registers<40>();
        if (warp == 8) load_operands<KIND, MODE>(&x_map, &w_map, a, ring);
        if (warp == 9) load_scales<KIND, MODE>(a, ring);
    } else {
        hopper::more_registers<232>();
        multiply<KIND, MODE>(&out_map, a, ring);
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
    config.dynamicSmemBytes = Ring::BYTES;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int& blocks = blocks_of[device % 64];
    if (blocks == 0) {
        cudaError_t status =
            cudaFuncSetAttribute(grouped<KIND, MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize, Ring::BYTES);
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

}  // namespace
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
