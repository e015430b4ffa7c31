// MLA decode for Hopper, 64 queries of one sequence and one split of its keys a CTA: what mla_kernels.decode computes.
//
// FlashMLA's way (https://github.com/deepseek-ai/FlashMLA, "A deep dive into the new kernel"): the output of 64 queries
// is 64 x 512 in fp32, half of an SM's registers, so two warp groups share one program. Each keeps 256 of its columns.
// They take the tiles of 64 keys in turn: the owner of a tile multiplies it with the queries, computes the weights, hands
// them over in shared memory, and both multiply them with their own half of the tile as values. While one group computes
// weights the other one's products run. A third group loads.
//
// Shared memory, 216 KB: queries 64 x 576 and two tiles of 64 x 576. A tile's weights take the place of its rotary keys,
// which only the scores need.
//
// The reference that weights are relative to moves only when a maximum exceeds it by 2^kSlack, so that the sums are
// hardly ever scaled; weights are then at most 2^kSlack, which bf16 and fp32 hold as well as 1.

#include "mla_arguments.cuh"
#include "mla_decode_16.cuh"
#include "mla_hopper.cuh"

namespace mla {

constexpr int kQueries = 64, kTiles = 9;  // queries of a program, tiles of 64 columns of a row
constexpr float kNothing = -1e30f, kSlack = 8.0f;

struct Shared {
    uint8_t query[kTiles][kTileBytes];
    uint8_t key[2][kTiles][kTileBytes];
    float reference[2][kQueries], sum[2][kQueries];
    uint64_t full[2][kTiles], empty[2][2];  // of a buffer: its tiles; its owner's half, and the other half with the rope
};

// The order in which a buffer's tiles are loaded and multiplied: the owner's half is free first.
__device__ __forceinline__ int tile_at(int owner, int i) { return i == 8 ? 8 : (i + 4 * owner) % 8; }

__device__ __forceinline__ uint4 load_chunk(const __nv_bfloat16* from, bool aligned) {
    if (aligned) return *reinterpret_cast<const uint4*>(from);
    uint16_t v[8];
    for (int i = 0; i < 8; i++) v[i] = reinterpret_cast<const uint16_t*>(from)[i];
    return *reinterpret_cast<uint4*>(v);
}

__device__ void load_queries(const Arguments& a, Shared& shared, int row, int first_query) {
    const int chunks = (kRank + kRope) / 8;
    for (int i = threadIdx.x; i < kQueries * chunks; i += blockDim.x) {
        const int m = i / chunks, chunk = i % chunks, query = first_query + m;
        uint4 value = {0, 0, 0, 0};
        if (query < a.tokens * a.heads) {
            const int64_t token = query / a.heads, head = query % a.heads;
            const __nv_bfloat16* from =
                chunk < kRank / 8 ? static_cast<const __nv_bfloat16*>(a.latent) + row * a.latent_b +
                                        token * a.latent_t + head * a.latent_h + chunk * 8
                                  : static_cast<const __nv_bfloat16*>(a.rope) + row * a.rope_b + token * a.rope_t +
                                        head * a.rope_h + (chunk - kRank / 8) * 8;
            value = load_chunk(from, a.aligned);
        }
        *reinterpret_cast<uint4*>(shared.query[chunk / 8] + swizzled(m, chunk % 8)) = value;
    }
    fence_async();
}

// One thread: the tiles of a split, into the two buffers in turn.
__device__ void load_keys(const Arguments& a, Shared& shared, const CUtensorMap* map, const Span& span, int row) {
    for (int i = 0; i < span.tiles(); i++) {
        const int owner = i & 1, use = i >> 1;
        const int at = int(tile_row(a, row, span.low + i));
        for (int j = 0; j < kTiles; j++) {
            if (j % 4 == 0 && j < 8) barrier_wait(shared_address(&shared.empty[owner][j / 4]), (use & 1) ^ 1);
            const int tile = tile_at(owner, j);
            const uint32_t full = shared_address(&shared.full[owner][tile]);
            barrier_expect(full, kTileBytes);
            load_box(shared_address(shared.key[owner][tile]), map, tile * 64, at, full);
        }
    }
}

// The sum and its rows' total brought from one reference to another.
__device__ __forceinline__ void refer(float (&sum)[128], float (&total)[2], float (&reference)[2], float to0, float to1) {
    if (__any_sync(0xFFFFFFFF, to0 != reference[0] || to1 != reference[1])) {
        const float fade[2] = {exp2_fast(reference[0] - to0), exp2_fast(reference[1] - to1)};
#pragma unroll
        for (int i = 0; i < 128; i++) sum[i] *= fade[i / 2 % 2];
        total[0] *= fade[0], total[1] *= fade[1];
        reference[0] = to0, reference[1] = to1;
    }
}

// Threads of group `me`: lane (g, t) of warp w has queries 16 w + g and 8 more of each product's rows, and columns
// 8 j + 2 t and the next.
__device__ void attend(const Arguments& a, Shared& shared, const Span& span, int me, int row, int split, int first_query) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, t = lane % 4;
    const int m[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    const int n = __shfl_sync(0xFFFFFFFF, span.tiles(), 0), queries = a.tokens * a.heads;
    int last[2];  // position of each of the two queries
    for (int i = 0; i < 2; i++) {
        const int query = min(first_query + m[i], queries - 1);
        last[i] = int(index_at(a.position, int64_t(row) * a.tokens + query / a.heads, a.wide & 2));
    }
    float sum[128], total[2] = {0.0f, 0.0f}, reference[2] = {kNothing, kNothing};
#pragma unroll
    for (int i = 0; i < 128; i++) sum[i] = 0.0f;

    const int other = me ^ 1;
    for (int i = me;; i += 2) {
        const bool mine = i < n, theirs = i > 0 && i - 1 < n;
        float score[32];
        if (mine) {
            products_begin();
#pragma unroll
            for (int j = 0; j < kTiles; j++) {
                const int tile = tile_at(me, j);
                barrier_wait(shared_address(&shared.full[me][tile]), i >> 1 & 1);
                const uint64_t query = along_rows(shared_address(shared.query[tile]));
                const uint64_t key = along_rows(shared_address(shared.key[me][tile]));
#pragma unroll
                for (int k = 0; k < 4; k++) score_product<false>(score, query + 2 * k, key + 2 * k, j + k > 0);
            }
            products_commit();
            products_wait<0>(score);
        }
        if (theirs) {
            named_sync(1 + other, 256);  // the other tile's weights are there, and all of mine has been multiplied
            refer(sum, total, reference, shared.reference[other][m[0]], shared.reference[other][m[1]]);
            products_begin();
            const uint64_t weight = along_rows(shared_address(shared.key[other][8]));
            const uint64_t value = down_rows(shared_address(shared.key[other][4 * me]));
#pragma unroll
            for (int k = 0; k < 4; k++) value_product<false>(sum, weight + 2 * k, value + 128 * k);
            products_commit();
        } else if (mine) {
            named_sync(3 + me, 128);
        }
        uint32_t weight[16];
        float to[2] = {reference[0], reference[1]}, more[2] = {0.0f, 0.0f};
        if (mine) {
            const bool ragged = __shfl_sync(0xFFFFFFFF, int(span.ragged(span.low + i)), 0);
            if (ragged) {
                const int key = (span.low + i) * kPage + 2 * t;
#pragma unroll
                for (int j = 0; j < 32; j++) {
                    const int at = key + j / 4 * 8 + j % 2;
                    if (at < span.begin || at > last[j / 2 % 2]) score[j] = -INFINITY;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float top = score[2 * r];
#pragma unroll
                for (int j = 0; j < 32; j++)
                    if (j / 2 % 2 == r) top = fmaxf(top, score[j]);
                top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2)) * a.scale;
                if (top > to[r] + kSlack) to[r] = top;
                if (t == 0) shared.reference[me][m[r]] = to[r];
            }
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const int r = j % 2;
                const float p0 = exp2_fast(fmaf(score[2 * j], a.scale, -to[r]));
                const float p1 = exp2_fast(fmaf(score[2 * j + 1], a.scale, -to[r]));
                more[r] += p0 + p1;
                const __nv_bfloat162 pair = __floats2bfloat162_rn(p0, p1);
                weight[j] = reinterpret_cast<const uint32_t&>(pair);
                *reinterpret_cast<uint32_t*>(shared.key[me][8] + swizzled(m[r], j / 2) + 4 * t) = weight[j];
            }
            if (ragged) {  // what nobody sees may be NaN, which 0 does not cancel
                for (int j = thread; j < kPage * kRank / 8; j += 128) {
                    const int key = j / (kRank / 8), chunk = j % (kRank / 8);
                    if (!span.seen((span.low + i) * kPage + key))
                        *reinterpret_cast<uint4*>(shared.key[me][chunk / 8] + key * 128 + chunk % 8 * 16) = {0, 0, 0, 0};
                }
            }
            fence_async();
            if (ragged) named_sync(3 + me, 128);
            named_arrive(1 + me, 256);
        }
        if (theirs) {
            products_wait<0>(sum);
            if (lane == 0) barrier_arrive(shared_address(&shared.empty[other][1]));
        }
        if (!mine) break;
        refer(sum, total, reference, to[0], to[1]);
        total[0] += more[0], total[1] += more[1];
        products_begin();
        const uint64_t value = down_rows(shared_address(shared.key[me][4 * me]));
#pragma unroll
        for (int k = 0; k < 4; k++) value_product<false>(sum, weight + 4 * k, value + 128 * k);
        products_commit();
        products_wait<0>(sum);
        if (lane == 0) barrier_arrive(shared_address(&shared.empty[me][0]));
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xFFFFFFFF, total[r], 1);
        total[r] += __shfl_xor_sync(0xFFFFFFFF, total[r], 2);
        if (t == 0) shared.sum[me][m[r]] = total[r];
    }
    named_sync(5, 256);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += shared.sum[other][m[r]];
        const int query = first_query + m[r];
        if (query >= queries) continue;
        const int64_t part = (int64_t(row) * a.splits + split) * queries + query;
        if (a.splits > 1) {
            if (me == 0 && t == 0) a.lse[part] = reference[r] + log2f(total[r]);
            if (n == 0) continue;  // the merge does not read it
        }
        const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
        const int64_t to = part * kRank + 256 * me + 2 * t;
#pragma unroll
        for (int j = 0; j < 32; j++) {
            const float x = sum[4 * j + 2 * r] * inverse, y = sum[4 * j + 2 * r + 1] * inverse;
            if (a.out_float) {
                *reinterpret_cast<float2*>(static_cast<float*>(a.out) + to + 8 * j) = make_float2(x, y);
            } else {
                *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(a.out) + to + 8 * j) =
                    __floats2bfloat162_rn(x, y);
            }
        }
    }
}

__global__ void __launch_bounds__(384, 1)
    decode_64(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int first_query = blockIdx.x * kQueries, row = blockIdx.y, split = blockIdx.z;
    const Span span(a, row, split, first_query, min(first_query + kQueries, a.tokens * a.heads) - 1);
    if (threadIdx.x == 0) {
        for (int buffer = 0; buffer < 2; buffer++) {
            for (int i = 0; i < kTiles; i++) barrier_init(shared_address(&shared.full[buffer][i]), 1);
            for (int i = 0; i < 2; i++) barrier_init(shared_address(&shared.empty[buffer][i]), 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    load_queries(a, shared, row, first_query);
    __syncthreads();
    const int group = __shfl_sync(0xFFFFFFFF, int(threadIdx.x / 128), 0);  // the compiler sees that warps do not part
    if (group == 2) {
        registers_shrink<24>();
        if (threadIdx.x == 256) load_keys(a, shared, &map, span, row);
    } else {
        registers_grow<240>();
        attend(a, shared, span, group, row, split, first_query);
    }
}

}  // namespace mla

// Returns a cudaError_t.
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
    cudaError_t error =
        cudaFuncSetAttribute(mla::decode_64, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(mla::Shared)));
    if (error != cudaSuccess) return error;
    const dim3 grid((a->tokens * a->heads + mla::kQueries - 1) / mla::kQueries, a->rows, a->splits);
    mla::decode_64<<<grid, 384, sizeof(mla::Shared), stream>>>(*a, map);
    return cudaGetLastError();
}

extern "C" int mla_decode_fp8_16(const mla::Arguments* a, cudaStream_t stream) {
    const int size = int(sizeof(mla::SharedFew));
    const cudaError_t error = cudaFuncSetAttribute(mla::decode_fp8_16, cudaFuncAttributeMaxDynamicSharedMemorySize, size);
    if (error != cudaSuccess) return error;
    const dim3 grid((a->tokens * a->heads + mla::kFew - 1) / mla::kFew, a->rows, a->splits);
    mla::decode_fp8_16<<<grid, 256, size, stream>>>(*a);
    return cudaGetLastError();
}
