// MLA decode over FP8 rows for up to 16 queries of a sequence a CTA: bound by the bytes of the cache.
//
// A page of 64 rows of 656 bytes comes as it lies, by one bulk copy; nothing is converted but on its way from shared
// memory to an operand of mma.sync, whose contracted dimension may be permuted at will: so each thread reads 16 or 8
// bytes, and no scale is multiplied with a value.
//   Scores: warp (w % 4, w / 4) has 16 keys and two of the four tiles of 128 columns; a tile's part of a score takes
//   the key's scale. The two halves meet in shared memory.
//   Values: warp w has columns [64 w, 64 w + 64), all of one scale, which goes into its weights. The codes of two keys
//   are paired before they are converted.
// e4m3 is exact in fp16. Queries are brought into fp16's range by a power of two each, and weights by their reference,
// which counts the exponent of the scale in; so none can overflow, whatever the scales are.
// A row's pitch is 41 x 16 bytes, so that reads down the rows meet no bank twice.
#pragma once

#include "mla_arguments.cuh"
#include "mla_hopper.cuh"

namespace mla {

constexpr int kFew = 16, kStages = 5, kPitch = 72;  // queries; tiles in shared memory; floats a row of scores

struct SharedFew {
    uint8_t tile[kStages][kPage * kFp8Row];
    float score[2][2][kFew][kPitch];  // of a tile in turn, of half of the columns
    float unit[kFew];
    uint64_t full[kStages];
};

template <bool F16> __device__ __forceinline__ void product_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (F16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

__global__ void __launch_bounds__(256, 1) decode_fp8_16(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedFew& shared = *reinterpret_cast<SharedFew*>(memory);
    const int first_query = blockIdx.x * kFew, row = blockIdx.y, split = blockIdx.z, queries = a.tokens * a.heads;
    const Span span(a, row, split, first_query, min(first_query + kFew, queries) - 1);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int n = span.tiles();

    auto load = [&](int i) {
        const uint32_t full = shared_address(&shared.full[i % kStages]);
        barrier_expect(full, kPage * kFp8Row);
        load_bytes(shared_address(shared.tile[i % kStages]),
                   static_cast<const uint8_t*>(a.cache) + tile_row(a, row, span.low + i) * kFp8Row, kPage * kFp8Row, full);
    };
    if (thread == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(shared_address(&shared.full[i]), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < min(n, kStages - 1); i++) load(i);
    }

    // A power of two for each query.
    for (int m = 2 * warp; m < 2 * warp + 2; m++) {
        const __nv_bfloat16* from = query_at(a, row, first_query + m, false);
        float largest = 1e-30f;
        for (int c = lane; from && c < kRank; c += 32) largest = fmaxf(largest, fabsf(__bfloat162float(from[c])));
        for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, step));
        if (lane == 0) shared.unit[m] = __uint_as_float(__float_as_uint(largest) & 0x7F800000);
    }
    __syncthreads();

    // Queries g and g + 8 as the left operand: of two tiles of 128 columns, thread t has 32 columns each; and of the
    // rotary part 8.
    const int keys = warp % 4, half = warp / 4;
    uint32_t query[2][8][4], query_rope[2][4];
    float unit[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        unit[r] = shared.unit[g + 8 * r];
        const float inverse = 1.0f / unit[r];
        const __nv_bfloat16* from = query_at(a, row, first_query + g + 8 * r, false);
        const __nv_bfloat16* rope = query_at(a, row, first_query + g + 8 * r, true);
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int k = 0; k < 8; k++)
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    const int at = 128 * (2 * half + c) + 32 * t + 4 * k + 2 * pair;
                    const __half2 value =
                        from ? __floats2half2_rn(__bfloat162float(from[at]) * inverse, __bfloat162float(from[at + 1]) * inverse)
                             : __floats2half2_rn(0.0f, 0.0f);
                    query[c][k][r + 2 * pair] = reinterpret_cast<const uint32_t&>(value);
                }
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const int at = 8 * (2 * t + half) + 4 * k + 2 * pair;
                __nv_bfloat162 value = {__float2bfloat16(0.0f), __float2bfloat16(0.0f)};
                if (rope) value = {rope[at], rope[at + 1]};
                query_rope[k][r + 2 * pair] = reinterpret_cast<const uint32_t&>(value);
            }
    }
    int last[2];
    for (int r = 0; r < 2; r++) {
        const int m = min(first_query + g + 8 * r, queries - 1);
        last[r] = int(index_at(a.position, int64_t(row) * a.tokens + m / a.heads, a.wide & 2));
    }

    float sum[8][4] = {}, total[2] = {0.0f, 0.0f}, reference[2] = {-1e30f, -1e30f};
    for (int i = 0; i < n; i++) {
        uint8_t* tile = shared.tile[i % kStages];
        const int key0 = (span.low + i) * kPage;
        const bool ragged = span.ragged(span.low + i);
        barrier_wait(shared_address(&shared.full[i % kStages]), i / kStages & 1);
        if (ragged) {  // what nobody sees may be NaN, which 0 does not cancel
            for (int j = thread; j < kPage * (kFp8Row / 16); j += 256)
                if (!span.seen(key0 + j / (kFp8Row / 16))) reinterpret_cast<uint4*>(tile)[j] = {0, 0, 0, 0};
            fence_async();
            __syncthreads();
        }

        // Scores: 16 keys in two products of 8, a half of the columns.
        float part[2][2][4] = {}, score[2][4] = {};
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const uint8_t* key = tile + (16 * keys + 8 * b + g) * kFp8Row;
            const uint4 rope = *reinterpret_cast<const uint4*>(key + kRank + 16 + 16 * (2 * t + half));
            product_16<false>(score[b], query_rope[0], rope.x, rope.y);
            product_16<false>(score[b], query_rope[1], rope.z, rope.w);
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int k = 0; k < 8; k += 4) {
                    const uint4 codes = *reinterpret_cast<const uint4*>(key + 128 * (2 * half + c) + 32 * t + 4 * k);
                    const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        product_16<true>(part[b][c], query[c][k + j], from_e4m3(word[j], 0), from_e4m3(word[j], 1));
                }
        }
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float2 scale[2];
#pragma unroll
            for (int e = 0; e < 2; e++)
                scale[e] = *reinterpret_cast<const float2*>(tile + (16 * keys + 8 * b + 2 * t + e) * kFp8Row + kRank + 8 * half);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float2 both;
                both.x = score[b][2 * r] + unit[r] * (part[b][0][2 * r] * scale[0].x + part[b][1][2 * r] * scale[0].y);
                both.y = score[b][2 * r + 1] + unit[r] * (part[b][0][2 * r + 1] * scale[1].x + part[b][1][2 * r + 1] * scale[1].y);
                *reinterpret_cast<float2*>(&shared.score[i & 1][half][g + 8 * r][16 * keys + 8 * b + 2 * t]) = both;
            }
        }
        __syncthreads();
        if (thread == 0 && i + kStages - 1 < n) load(i + kStages - 1);  // where all are done with the tile before this

        // Weights of all 64 keys, each warp for its own columns' scale.
        float weight[4][2][2][2];  // 16 keys, of which 8, query, of two keys
        float power[4][2][2], factor[4][2][2];
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int b = 0; b < 2; b++) {
                float exponent[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float scale = *reinterpret_cast<const float*>(tile + (16 * s + 8 * b + 2 * t + e) * kFp8Row + kRank + 4 * (warp / 2));
                    uint32_t bits = __float_as_uint(scale) & 0x7F800000;
                    bits = bits == 0 ? 0x3F800000 : bits;
                    exponent[e] = float(int(bits >> 23) - 127);
                    power[s][b][e] = __uint_as_float(0x7F000000 - bits);  // of two: one over the scale's
                    factor[s][b][e] = scale * power[s][b][e];
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int at = 16 * s + 8 * b + 2 * t;
                    const float2 x = *reinterpret_cast<const float2*>(&shared.score[i & 1][0][g + 8 * r][at]);
                    const float2 y = *reinterpret_cast<const float2*>(&shared.score[i & 1][1][g + 8 * r][at]);
                    weight[s][b][r][0] = fmaf(x.x + y.x, a.scale, exponent[0]);
                    weight[s][b][r][1] = fmaf(x.y + y.y, a.scale, exponent[1]);
                    if (ragged) {
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (key0 + at + e < span.begin || key0 + at + e > last[r]) weight[s][b][r][e] = -INFINITY;
                    }
                    top[r] = fmaxf(top[r], fmaxf(weight[s][b][r][0], weight[s][b][r][1]));
                }
            }
        float to[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFF, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFF, top[r], 2));
            to[r] = top[r] - 6.0f > reference[r] + 8.0f ? top[r] - 6.0f : reference[r];
        }
        if (__any_sync(0xFFFFFFFF, to[0] != reference[0] || to[1] != reference[1])) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float fade = exp2_fast(reference[r] - to[r]);
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j][2 * r] *= fade, sum[j][2 * r + 1] *= fade;
                total[r] *= fade, reference[r] = to[r];
            }
        }
#pragma unroll
        for (int s = 0; s < 4; s++) {
            uint32_t left[4];
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float w[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        w[e] = exp2_fast(weight[s][b][r][e] - reference[r]);
                        total[r] = fmaf(w[e], power[s][b][e], total[r]);
                        w[e] *= factor[s][b][e];
                    }
                    const __half2 pair = __floats2half2_rn(w[0], w[1]);
                    left[r + 2 * b] = reinterpret_cast<const uint32_t&>(pair);
                }
            const uint8_t* key = tile + (16 * s + 2 * t) * kFp8Row + 64 * warp + 8 * g;
            uint2 codes[4];
#pragma unroll
            for (int j = 0; j < 4; j++) codes[j] = *reinterpret_cast<const uint2*>(key + (j / 2 * 8 + j % 2) * kFp8Row);
#pragma unroll
            for (int word = 0; word < 2; word++) {
                uint32_t c[4];
#pragma unroll
                for (int j = 0; j < 4; j++) c[j] = word ? codes[j].y : codes[j].x;
#pragma unroll
                for (int two = 0; two < 2; two++) {
                    const uint32_t low = __byte_perm(c[0], c[1], two ? 0x7362 : 0x5140);
                    const uint32_t high = __byte_perm(c[2], c[3], two ? 0x7362 : 0x5140);
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        product_16<true>(sum[4 * word + 2 * two + e], left, from_e4m3(low, e), from_e4m3(high, e));
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xFFFFFFFF, total[r], 1);
        total[r] += __shfl_xor_sync(0xFFFFFFFF, total[r], 2);
        const int m = first_query + g + 8 * r;
        if (m >= queries) continue;
        const int64_t at = (int64_t(row) * a.splits + split) * queries + m;
        if (a.splits > 1) {
            if (warp == 0 && t == 0) a.lse[at] = reference[r] + log2f(total[r]);
            if (n == 0) continue;  // the merge does not read it
        }
        const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
        const int64_t to = at * kRank + 64 * warp + 16 * t;
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                const float x[4] = {sum[j][2 * r + e] * inverse, sum[j + 1][2 * r + e] * inverse,
                                    sum[j + 2][2 * r + e] * inverse, sum[j + 3][2 * r + e] * inverse};
                if (a.out_float) {
                    *reinterpret_cast<float4*>(static_cast<float*>(a.out) + to + 8 * e + j) = make_float4(x[0], x[1], x[2], x[3]);
                } else {
                    const __nv_bfloat162 two[2] = {__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])};
                    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(a.out) + to + 8 * e + j) = reinterpret_cast<const uint2&>(two);
                }
            }
    }
}

}  // namespace mla
