// The grouped FP8 product of teacher/kernels/grouped_gemm.py for many rows: two warps load, two groups of four multiply.
//
// A block's tile is 128 rows x 128 columns, 64 of the rows for each group, in steps of 128 of K. Hopper's tensor cores
// add e4m3 products with 14 bits, so each step's product is added, scaled, on the ordinary cores. A group issues the next
// step's product before it waits for this one's, so that the tensor cores have one while it adds: 64 registers a thread
// hold the sums, twice 64 the two products. What then binds is shared memory, 128 bytes a cycle: a product of 64 x 128 x 32
// takes 64 cycles and reads 6 KB, and TMA writes 32 KB for 512 cycles of products, together 160 bytes a cycle at full
// rate (products of 64 columns, two under way over a tile of 256, as in Gluon: 176).
//
// Two blocks of a cluster read one operand once from the L2, each loading half of it into both: the matrix where they
// multiply two row tiles (SHARE_MATRIX), the rows where they multiply two column tiles (SHARE_ROWS): 24 KB a step and
// block instead of 32. Where one of the two row tiles does not exist its block goes along on rows of zeros.
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

// A step's product under way: its registers, the scales of this thread's two rows, and what to tell when it is done.
struct Product {
    float part[64], scale[2];
    uint32_t empty;
};

template <Kind KIND, Mode MODE>
__device__ void multiply(const CUtensorMap* out_map, const Arguments& a, Ring ring) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int local = threadIdx.x / 32 * 16 + lane / 4;  // and 8 below it: this thread's rows of the tile
    const Output<KIND> output{out_map, static_cast<unsigned char*>(a.out), a.columns, a.by_tma, ring.staging(group),
                              1 + group};
    float sums[64];
    const auto issue = [&](Product& product) {
        hopper::barrier_wait(ring.full(), ring.phase());
        const uint32_t x = hopper::tile_descriptor(ring.x() + group * 64 * K_STEP);
        const uint32_t w = hopper::tile_descriptor(ring.w());
        hopper::hold(product.part);
        hopper::product_fence();
#pragma unroll
        for (int i = 0; i < K_STEP / 32; ++i) product_64x128x32(product.part, x + i * 2, w + i * 2, i > 0);
        hopper::product_commit();
        hopper::hold(product.part);
        const float columns = hopper::load_shared(ring.scales() + ROWS * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            product.scale[i] = hopper::load_shared(ring.scales() + local * 4 + i * 32) * columns;
        product.empty = ring.empty();
        ring.next();
    };
    const auto add = [&](Product& product) {  // when it is done
        hopper::hold(product.part);
        if (MODE == ALONE) {
            if (lane == 0) hopper::barrier_arrive(product.empty);
        } else if (lane < 2) {
            hopper::barrier_arrive_at(product.empty, lane);
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i] = __fmaf_rn(product.part[i], product.scale[i / 2 % 2], sums[i]);
    };
    for (unsigned number = 0;; ++number) {
        hopper::barrier_wait(ring.full(), ring.phase());
        const Tile tile = ring.read_note(number);
        if (tile.expert < 0) break;
        Product even, odd;
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i] = even.part[i] = odd.part[i] = 0.0f;
        issue(even);
        int left = a.steps() - 1;
#pragma unroll 1
        for (; left >= 2; left -= 2) {
            issue(odd);
            hopper::product_wait<1>();
            add(even);
            issue(even);
            hopper::product_wait<1>();
            add(odd);
        }
        if (left > 0) {
            issue(odd);
            hopper::product_wait<1>();
            add(even);
            hopper::product_wait<0>();
            add(odd);
        } else {
            hopper::product_wait<0>();
            add(even);
        }
        const int rows = tile.rows - group * 64;
        if (rows > 0) put_tile<KIND>(output, sums, static_cast<long>(tile.row) + group * 64, rows, tile.column * COLUMNS);
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
        if (warp == 8) load_operands<MODE>(&x_map, &w_map, a, ring);
        if (warp == 9) load_scales<MODE>(a, ring);
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

// x (rows, k) and w (experts, columns, k) in e4m3, out (rows, columns) in bf16, or fp32 if `fp32`. Scales of rows lie
// column by column. mode: what two blocks of a cluster share, 0 nothing, 1 the matrix, 2 the rows. Launches on `stream`,
// a stream of `device`; waits for nothing.
extern "C" int grouped_gemm(const void* x, const float* x_scales, long x_scale_stride, const void* w,
                            const float* w_scales, void* out, const int* start, const int* count, int experts,
                            int rows, int columns, int k, int fp32, int mode, int group, int device,
                            cudaStream_t stream) {
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
    const int bytes = fp32 ? 4 : 2;
    const auto type = fp32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const auto code = CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const long w_rows = static_cast<long>(experts) * columns;
    const bool by_tma = static_cast<long>(columns) * bytes % 16 == 0 && reinterpret_cast<uint64_t>(out) % 16 == 0;
    CUtensorMap maps[3];
    if (!describe(encode, &maps[0], code, 1, x, rows, k, mode == SHARE_ROWS ? ROWS / 2 : ROWS) ||
        !describe(encode, &maps[1], code, 1, w, w_rows, k, mode == SHARE_MATRIX ? COLUMNS / 2 : COLUMNS))
        return cudaErrorInvalidValue;
    maps[2] = maps[0];
    if (by_tma && !describe(encode, &maps[2], type, bytes, out, rows, columns, 64)) return cudaErrorInvalidValue;
    const Arguments arguments{x_scales, w_scales, x_scale_stride,          out,
                              {start, count, experts}, rows, columns, k, group, by_tma};
    int current = 0;
    cudaError_t status = cudaGetDevice(&current);
    if (status == cudaSuccess && current != device) status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    const Mode chosen = static_cast<Mode>(mode);
    status = fp32 ? launch<FP32>(chosen, maps, arguments, device, stream)
                  : launch<BF16>(chosen, maps, arguments, device, stream);
    if (current != device) cudaSetDevice(current);
    return status;
}
