// The softmax between the two products, of a warp group with 64 queries: lane (g, t) of warp w has queries 16 w + g and
// 8 more of each product's rows, and columns 8 j + 2 t and the next.
//
// The reference that weights are relative to moves only when a maximum exceeds it by 2^kSlack, so that the sums are
// hardly ever scaled; weights are then at most 2^kSlack, which bf16 and fp32 hold as well as 1.
//
// FP8: a token's 2^e (see mla_rows.cuh) goes into its scores and weights, so its values stay in fp16's range.
#pragma once

#include "mla_rows.cuh"

namespace mla {

constexpr int kQueries = 64;
constexpr float kNothing = -1e30f, kSlack = 8.0f;  // weights are up to 2^(kRoom + kSlack), which fp16 holds
template <bool FP8>
constexpr float kRoom = FP8 ? 6.0f : 0.0f;

// A thread's scores of a tile to its weights, relative to `to`, which moves where a maximum asks for it; their sum to
// `more`. `first` is the first of its two queries, 8 apart.
template <bool FP8>
__device__ __forceinline__ void weigh(const Arguments& a, const Span& span, int tile, bool ragged, const Tokens& tokens,
                                      const float (&scale)[2], int row, int first, float (&score)[32], float (&to)[2],
                                      float (&more)[2], uint32_t (&weight)[16]) {
    const int t = threadIdx.x % 4;
    if constexpr (FP8) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 power = *reinterpret_cast<const float2*>(&tokens[j][0][2 * t]);
            const float2 exponent = *reinterpret_cast<const float2*>(&tokens[j][1][2 * t]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                score[4 * j + 2 * r] = fmaf(score[4 * j + 2 * r] * scale[r], power.x, exponent.x);
                score[4 * j + 2 * r + 1] = fmaf(score[4 * j + 2 * r + 1] * scale[r], power.y, exponent.y);
            }
        }
    }
    if (ragged) {
        int last[2];  // position of each of the two queries
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int query = min(first + 8 * r, a.tokens * a.heads - 1);
            last[r] = int(index_at(a.position, int64_t(row) * a.tokens + query / a.heads, a.wide & 2));
        }
#pragma unroll
        for (int j = 0; j < 32; j++) {
            const int key = tile * kPage + 2 * t + j / 4 * 8 + j % 2;
            if (key < span.begin || key > last[j / 2 % 2]) score[j] = -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = score[2 * r];
#pragma unroll
        for (int j = 0; j < 32; j++)
            if (j / 2 % 2 == r) top = fmaxf(top, score[j]);
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2)) * (FP8 ? 1.0f : a.scale) - kRoom<FP8>;
        if (top > to[r] + kSlack) to[r] = top;
    }
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const int r = j % 2;
        float p[2];
        if constexpr (FP8) {
            const uint2 power = *reinterpret_cast<const uint2*>(&tokens[j / 2][0][2 * t]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                p[e] = exp2_fast(score[2 * j + e] - to[r]);
                more[r] = fmaf(p[e], __uint_as_float(0x7F000000 - (e ? power.y : power.x)), more[r]);
            }
            const __half2 pair = __floats2half2_rn(p[0], p[1]);
            weight[j] = reinterpret_cast<const uint32_t&>(pair);
        } else {
#pragma unroll
            for (int e = 0; e < 2; e++) p[e] = exp2_fast(fmaf(score[2 * j + e], a.scale, -to[r]));
            more[r] += p[0] + p[1];
            const __nv_bfloat162 pair = __floats2bfloat162_rn(p[0], p[1]);
            weight[j] = reinterpret_cast<const uint32_t&>(pair);
        }
    }
}

// Keys of a tile that nobody sees, in the first COLUMNS columns: they may be NaN, which a weight of 0 does not cancel.
template <int COLUMNS>
__device__ __forceinline__ void clear_unseen(const Span& span, int tile, uint8_t (*tiles)[kTileBytes]) {
    for (int j = threadIdx.x % 128; j < kPage * COLUMNS / 8; j += 128) {
        const int key = j / (COLUMNS / 8), chunk = j % (COLUMNS / 8);
        if (!span.seen(tile * kPage + key))
            *reinterpret_cast<uint4*>(tiles[chunk / 8] + key * 128 + chunk % 8 * 16) = {0, 0, 0, 0};
    }
}

// The sum and its rows' total brought from one reference to another.
__device__ __forceinline__ void refer(float (&sum)[128], float (&total)[2], float (&reference)[2], float to0,
                                      float to1) {
    if (__any_sync(0xFFFFFFFF, to0 != reference[0] || to1 != reference[1])) {
        const float fade[2] = {exp2_fast(reference[0] - to0), exp2_fast(reference[1] - to1)};
#pragma unroll
        for (int i = 0; i < 128; i++) sum[i] *= fade[i / 2 % 2];
        total[0] *= fade[0], total[1] *= fade[1];
        reference[0] = to0, reference[1] = to1;
    }
}

// The 256 columns of one of a thread's two queries.
__device__ __forceinline__ void store_row(const Arguments& a, const float (&sum)[128], int r, float total, int64_t to) {
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
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

}  // namespace mla
