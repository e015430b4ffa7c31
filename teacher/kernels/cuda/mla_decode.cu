// MLA decode for Hopper: what mla_kernels.decode computes, for latents of 512 and rotary keys of 64 values. The
// launches; each returns a cudaError_t.

#include "mla_decode_16.cuh"
#include "mla_decode_64.cuh"

namespace mla {

constexpr int kMostSplits = 128, kColumns = kRank / 4, kGroups = 4;

// A CTA a query, a thread four columns of some splits: the splits' parts weighted by their shares of the softmax's sum.
// A split whose share is none has written no part.
__global__ void __launch_bounds__(kColumns* kGroups)
    merge(const float* parts, const float* lse, void* out, int queries, int splits, int out_float) {
    const int m = blockIdx.x, lane = threadIdx.x % 32;
    const int64_t first = int64_t(blockIdx.y) * splits * queries + m;
    wait_for_launch_before();
    float weight[kMostSplits / 32], top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int k = 0; k < kMostSplits / 32; k++) {
        weight[k] = lane + 32 * k < splits ? lse[first + int64_t(lane + 32 * k) * queries] : -INFINITY;
        top = fmaxf(top, weight[k]);
    }
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, step));
#pragma unroll
    for (int k = 0; k < kMostSplits / 32; k++) {
        weight[k] = top == -INFINITY ? 0.0f : exp2f(weight[k] - top);
        total += weight[k];
    }
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xFFFFFFFF, total, step);
    // A group of 128 threads has every GROUPS-th split; what a split without a share has left there may be NaN.
    const int groups = blockDim.x / kColumns, group = threadIdx.x / kColumns, column = threadIdx.x % kColumns * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int k = 0; k < kMostSplits / 32; k++)
#pragma unroll 8
        for (int j = group; j < min(32, splits - 32 * k); j += groups) {
            const float w = __shfl_sync(0xFFFFFFFF, weight[k], j);
            const float4 part =
                *reinterpret_cast<const float4*>(parts + (first + int64_t(32 * k + j) * queries) * kRank + column);
            sum.x += w == 0.0f ? 0.0f : w * part.x, sum.y += w == 0.0f ? 0.0f : w * part.y;
            sum.z += w == 0.0f ? 0.0f : w * part.z, sum.w += w == 0.0f ? 0.0f : w * part.w;
        }
    __shared__ float4 sums[kGroups - 1][kColumns];
    if (group > 0) sums[group - 1][threadIdx.x % kColumns] = sum;
    __syncthreads();
    if (group > 0) return;
    for (int i = 0; i < groups - 1; i++) {
        const float4 more = sums[i][threadIdx.x];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t to = (int64_t(blockIdx.y) * queries + m) * kRank + column;
    if (out_float) {
        *reinterpret_cast<float4*>(static_cast<float*>(out) + to) =
            make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
    } else {
        const __nv_bfloat162 two[2] = {__floats2bfloat162_rn(sum.x * inverse, sum.y * inverse),
                                       __floats2bfloat162_rn(sum.z * inverse, sum.w * inverse)};
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(out) + to) = reinterpret_cast<const uint2&>(two);
    }
}

}  // namespace mla

template <class SharedMemory, int QUERIES, class Kernel, class... More>
static cudaError_t launch(Kernel* kernel, int threads, const mla::Arguments& a, cudaStream_t stream,
                          const More&... more) {
    const int size = int(sizeof(SharedMemory));
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size);
    if (error != cudaSuccess) return error;
    const dim3 grid((a.tokens * a.heads + QUERIES - 1) / QUERIES, a.rows, a.splits);
    kernel<<<grid, threads, size, stream>>>(a, more...);
    return cudaGetLastError();
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Boxes of 64 rows x 64 values of a bf16 cache.
static cudaError_t boxes(CUtensorMap* map, const mla::Arguments& a) {
    static Encode encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        void* symbol = nullptr;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
        if (error != cudaSuccess || !symbol) return cudaErrorNotSupported;
        encode = reinterpret_cast<Encode>(symbol);
    }
    const cuuint64_t sizes[2] = {mla::kRank + mla::kRope, cuuint64_t(a.cache_rows)}, pitch[1] = {sizes[0] * 2};
    const cuuint32_t box[2] = {64, mla::kPage}, steps[2] = {1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(a.cache), sizes, pitch,
                                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

extern "C" int mla_decode_bf16_64(const mla::Arguments* a, cudaStream_t stream) {
    CUtensorMap map;
    if (const cudaError_t error = boxes(&map, *a)) return error;
    return launch<mla::Shared, mla::kQueries>(mla::decode_64<false>, 384, *a, stream, map);
}

extern "C" int mla_decode_fp8_64(const mla::Arguments* a, cudaStream_t stream) {
    return launch<mla::Shared, mla::kQueries>(mla::decode_64<true>, 384, *a, stream, CUtensorMap{});
}

extern "C" int mla_decode_fp8_16(const mla::Arguments* a, cudaStream_t stream) {
    return launch<mla::SharedFew, mla::kFew>(mla::decode_16, 256, *a, stream);
}

// Merges what a launch above it on the same stream has written as `a->out` and `a->lse`.
extern "C" int mla_merge(const mla::Arguments* a, void* out, int out_float, cudaStream_t stream) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(a->tokens * a->heads, a->rows);
    config.blockDim = dim3(mla::kColumns * (a->splits < mla::kGroups ? a->splits : mla::kGroups));
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, mla::merge, static_cast<const float*>(a->out), static_cast<const float*>(a->lse),
                              out, a->tokens * a->heads, a->splits, out_float);
}
