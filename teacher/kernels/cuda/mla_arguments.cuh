// What a launch of MLA decode is told; teacher/kernels/mla_hopper.py fills it in, field by field in this order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace mla {

constexpr int kRank = 512, kRope = 64, kPage = 64;  // keys of a tile; a page is a multiple of it
constexpr int kFp8Row = kRank + 16 + 2 * kRope;     // bytes: codes, four scales of fp32, the rotary key in bf16

struct Arguments {
    const void *latent, *rope;             // queries: bf16
    const void* cache;                     // [pages, page, 576] of bf16, or rows of 656 bytes
    const void *table, *position, *first;  // int32 or int64, see `wide`; first may be null
    void* out;                             // [B, T * H, 512], or [B, splits, T * H, 512] of fp32
    float* lse;                            // [B, splits, T * H], base 2; unused for one split
    int64_t latent_b, latent_t, latent_h, rope_b, rope_t, rope_h, table_b;  // strides in values
    int64_t cache_rows;                                                     // tokens in the cache
    float scale;                                                            // of scores, times log2(e)
    int rows, tokens, heads, splits;
    int page_tiles;  // tiles of 64 keys a page
    int wide;        // bits: 1 table, 2 position, 4 first are int64
    int aligned;     // queries' rows lie at 16 bytes
    int out_float;   // fp32 in place of bf16
};

__device__ __forceinline__ int64_t index_at(const void* indices, int64_t i, bool wide) {
    return wide ? static_cast<const int64_t*>(indices)[i] : int64_t(static_cast<const int32_t*>(indices)[i]);
}

// Where query m (of the program) and column c of its latent or rotary part lie; null beyond the last query.
__device__ __forceinline__ const __nv_bfloat16* query_at(const Arguments& a, int row, int query, bool rope) {
    if (query >= a.tokens * a.heads) return nullptr;
    const int64_t token = query / a.heads, head = query % a.heads;
    return rope ? static_cast<const __nv_bfloat16*>(a.rope) + row * a.rope_b + token * a.rope_t + head * a.rope_h
                : static_cast<const __nv_bfloat16*>(a.latent) + row * a.latent_b + token * a.latent_t +
                      head * a.latent_h;
}

// Eight values of a query in bf16, times `factor`, in fp16 or bf16.
template <bool F16>
__device__ __forceinline__ uint4 scaled_chunk(uint4 chunk, float factor) {
    uint32_t* words = reinterpret_cast<uint32_t*>(&chunk);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words[i]));
        if constexpr (F16) {
            const __half2 pair = __floats2half2_rn(two.x * factor, two.y * factor);
            words[i] = reinterpret_cast<const uint32_t&>(pair);
        } else {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(two.x * factor, two.y * factor);
            words[i] = reinterpret_cast<const uint32_t&>(pair);
        }
    }
    return chunk;
}

__device__ __forceinline__ uint4 load_chunk(const __nv_bfloat16* from, bool aligned) {
    if (!from) return {0, 0, 0, 0};
    if (aligned) return *reinterpret_cast<const uint4*>(from);
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint16_t* two = reinterpret_cast<const uint16_t*>(from) + 2 * i;
        v[i] = two[0] | uint32_t(two[1]) << 16;
    }
    return {v[0], v[1], v[2], v[3]};
}

// The largest size of a warp's chunks' values.
__device__ __forceinline__ float largest(const uint4& chunk) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(&chunk)[i]);
        most = fmaxf(most, fmaxf(fabsf(two.x), fabsf(two.y)));
    }
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, step));
    return most;
}
// The power of two at or below, not too small for its inverse.
__device__ __forceinline__ float power_of_two(float x) {
    return __uint_as_float(__float_as_uint(fmaxf(x, 1e-30f)) & 0x7F800000);
}

// The keys of one program: positions [begin, end) are seen by some query of it, of which its split has tiles
// [low, high). Up to `alike` every query of the program sees every key from `begin` on.
struct Span {
    int begin, end, alike, low, high;

    __device__ __forceinline__ Span(const Arguments& a, int row, int split, int first_query, int last_query) {
        end = 0, alike = 1 << 30;
        for (int token = first_query / a.heads; token <= last_query / a.heads; token++) {
            const int seen = int(index_at(a.position, int64_t(row) * a.tokens + token, a.wide & 2)) + 1;
            end = max(end, seen), alike = min(alike, seen);
        }
        begin = a.first ? int(index_at(a.first, row, a.wide & 4)) : 0;
        const int from = begin / kPage, tiles = max((end + kPage - 1) / kPage - from, 0);
        const int share = (tiles + a.splits - 1) / a.splits;
        low = from + split * share;
        high = min(low + share, from + tiles);
    }
    __device__ __forceinline__ int tiles() const { return max(high - low, 0); }
    // Some query does not see all of the tile's keys.
    __device__ __forceinline__ bool ragged(int tile) const {
        return tile * kPage < begin || (tile + 1) * kPage > alike;
    }
    __device__ __forceinline__ bool seen(int key) const { return key >= begin && key < end; }
};

// The cache's row (in tokens) at which a tile of a sequence starts.
__device__ __forceinline__ int64_t tile_row(const Arguments& a, int row, int tile) {
    const int64_t page = index_at(a.table, row * a.table_b + tile / a.page_tiles, a.wide & 1);
    return (page * a.page_tiles + tile % a.page_tiles) * kPage;
}

}  // namespace mla
