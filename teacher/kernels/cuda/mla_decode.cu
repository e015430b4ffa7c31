// MLA decode for Hopper: what mla_kernels.decode computes, for latents of 512 and rotary keys of 64 values. The launches;
// each returns a cudaError_t.

#include "mla_decode_16.cuh"
#include "mla_decode_16b.cuh"
#include "mla_decode_64.cuh"

template <class SharedMemory, int QUERIES, class Kernel, class... More>
static cudaError_t launch(Kernel* kernel, int threads, const mla::Arguments& a, cudaStream_t stream, const More&... more) {
    const int size = int(sizeof(SharedMemory));
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size);
    if (error != cudaSuccess) return error;
    const dim3 grid((a.tokens * a.heads + QUERIES - 1) / QUERIES, a.rows, a.splits);
    kernel<<<grid, threads, size, stream>>>(a, more...);
    return cudaGetLastError();
}

extern "C" int mla_decode_bf16_64(const mla::Arguments* a, cudaStream_t stream) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        void* symbol = nullptr;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
        if (error != cudaSuccess || !symbol) return cudaErrorNotSupported;
        encode = reinterpret_cast<Encode>(symbol);
    }
    CUtensorMap map;
    const cuuint64_t sizes[2] = {mla::kRank + mla::kRope, cuuint64_t(a->cache_rows)}, pitch[1] = {sizes[0] * 2};
    const cuuint32_t box[2] = {64, mla::kPage}, steps[2] = {1, 1};
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(a->cache), sizes, pitch, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        return cudaErrorInvalidValue;
    return launch<mla::Shared, mla::kQueries>(mla::decode_64<false>, 384, *a, stream, map);
}

extern "C" int mla_decode_fp8_64(const mla::Arguments* a, cudaStream_t stream) {
    return launch<mla::Shared, mla::kQueries>(mla::decode_64<true>, 384, *a, stream, CUtensorMap{});
}

extern "C" int mla_decode_fp8_16(const mla::Arguments* a, cudaStream_t stream) {
    return launch<mla::SharedFew, mla::kFew>(mla::decode_fp8_16, 256, *a, stream);
}

extern "C" int mla_decode_fp8_16b(const mla::Arguments* a, cudaStream_t stream) {
    return launch<mla::SharedFewB, mla::kFew>(mla::decode_fp8_16b, 256, *a, stream);
}
