// MLA decode over FP8 rows for up to 16 queries of a sequence a CTA: bound by the bytes of the cache.
//
// A page of 64 rows of 656 bytes comes as it lies, by one bulk copy; nothing is converted but on its way from shared
// memory to an operand of mma.sync, whose contracted dimension may be permuted at will: so each thread reads 16 bytes,
// and no scale is multiplied with a value.
//   Four warps compute scores and weights, each of 16 keys; a scale is multiplied with its 128 columns' part of a
//   score. Four warps multiply weights and values, each 128 columns of one scale, which goes into its weights. The
//   codes of two keys are paired before they are converted.
// e4m3 is exact in fp16. Queries are brought into fp16's range by a power of two each, and weights by their reference,
// which counts the exponent of the token's largest scale in; so none can overflow, whatever the scales are.
// A row's pitch is 41 x 16 bytes, so that reads down the rows meet no bank twice.
#pragma once

#include "mla_softmax.cuh"

namespace mla {

constexpr int kFew = 16, kStages = 5;  // queries of a program, tiles in shared memory

struct SharedFew {
    uint8_t tile[kStages][kPage * kFp8Row];
    uint4 weight[2][4][32];    // of a tile in turn, of 16 keys: a lane's operand
    uint2 factor[2][4][4][4];  // of a tile in turn, of 16 keys, by tile of columns and t: scales over the token's
    uint4 rope[4][32];         // of the queries: a lane's operand
    float fade[2][kFew];       // what the sums so far are to be multiplied with
    float top[2][4][kFew], total[4][kFew], reference[kFew], unit[kFew];
    uint64_t full[kStages], empty[kStages], weighed[2], taken[2];
};

// Warps 0 to 3: scores of 16 keys each, and their weights.
__device__ __forceinline__ void weigh_few(const Arguments& a, SharedFew& shared, const Span& span, int row,
                                          int first_query) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n = span.tiles(), queries = a.tokens * a.heads;
    // Queries g and g + 8 as the left operand; of each tile of 128 columns a thread has 32, of the rotary part 16.
    uint32_t query[4][8][4];
    float unit[2];
    int last[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int m = first_query + g + 8 * r;
        last[r] = int(index_at(a.position, int64_t(row) * a.tokens + min(m, queries - 1) / a.heads, a.wide & 2));
        unit[r] = shared.unit[g + 8 * r];
        const float inverse = __uint_as_float(0x7F000000 - __float_as_uint(unit[r]));
        unit[r] *= a.scale;
        const __nv_bfloat16* latent = query_at(a, row, m, false);
        const __nv_bfloat16* rope = query_at(a, row, m, true);
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int k = 0; k < 8; k += 2) {
                const uint4 chunk = scaled_chunk<true>(
                    load_chunk(latent ? latent + 128 * c + 32 * t + 4 * k : nullptr, a.aligned), inverse);
                query[c][k][r] = chunk.x, query[c][k][r + 2] = chunk.y;
                query[c][k + 1][r] = chunk.z, query[c][k + 1][r + 2] = chunk.w;
            }
        if (warp == 0) {
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const uint4 chunk = load_chunk(rope ? rope + 8 * (2 * t + k / 2) : nullptr, a.aligned);
                uint32_t* to = reinterpret_cast<uint32_t*>(&shared.rope[k][lane]) + r;
                to[0] = chunk.x, to[2] = chunk.y, to[128] = chunk.z, to[130] = chunk.w;
            }
        }
    }
    named_sync(1, 128);
    float total[2] = {0.0f, 0.0f}, reference[2] = {kNothing, kNothing};
    for (int i = 0; i < n; i++) {
        uint8_t* tile = shared.tile[i % kStages] + 16 * warp * kFp8Row;
        const int key0 = (span.low + i) * kPage + 16 * warp, turn = i & 1;
        const bool ragged = span.ragged(span.low + i);
        barrier_wait(shared_address(&shared.full[i % kStages]), i / kStages & 1);
        if (ragged) {  // what nobody sees may be NaN, which 0 does not cancel
            for (int j = lane; j < 16 * (kFp8Row / 16); j += 32)
                if (!span.seen(key0 + j / (kFp8Row / 16))) reinterpret_cast<uint4*>(tile)[j] = {0, 0, 0, 0};
            fence_async();
            __syncwarp();
        }
        float score[2][4];
        float4 scale[2][2];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const uint8_t* key = tile + (8 * b + g) * kFp8Row;
            float part[4] = {}, other[4] = {};
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const uint4 rope = *reinterpret_cast<const uint4*>(key + kRank + 16 + 16 * (2 * t + k));
                product_16<false>(part, reinterpret_cast<const uint32_t (&)[4]>(shared.rope[2 * k][lane]), rope.x,
                                  rope.y);
                product_16<false>(other, reinterpret_cast<const uint32_t (&)[4]>(shared.rope[2 * k + 1][lane]), rope.z,
                                  rope.w);
            }
#pragma unroll
            for (int e = 0; e < 2; e++)
                scale[b][e] = *reinterpret_cast<const float4*>(tile + (8 * b + 2 * t + e) * kFp8Row + kRank);
#pragma unroll
            for (int j = 0; j < 4; j++) score[b][j] = (part[j] + other[j]) * a.scale;
        }
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const uint8_t* key = tile + (8 * b + g) * kFp8Row + 128 * c + 32 * t;
                float part[4] = {}, other[4] = {};
#pragma unroll
                for (int k = 0; k < 8; k += 4) {
                    const uint4 codes = *reinterpret_cast<const uint4*>(key + 4 * k);
                    product_16<true>(part, query[c][k], low_e4m3(codes.x), high_e4m3(codes.x));
                    product_16<true>(other, query[c][k + 1], low_e4m3(codes.y), high_e4m3(codes.y));
                    product_16<true>(part, query[c][k + 2], low_e4m3(codes.z), high_e4m3(codes.z));
                    product_16<true>(other, query[c][k + 3], low_e4m3(codes.w), high_e4m3(codes.w));
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4& s = scale[b][j % 2];
                    score[b][j] = fmaf((part[j] + other[j]) * unit[j / 2],
                                       c == 0   ? s.x
                                       : c == 1 ? s.y
                                       : c == 2 ? s.z
                                                : s.w,
                                       score[b][j]);
                }
            }
        // The exponent of each token's largest scale goes into its weights, and the rest of each scale to the values.
        float inverse[2][2];  // of the power of two
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float4& s = scale[b][e];
                uint32_t bits = __float_as_uint(fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w))) & 0x7F800000;
                bits = bits == 0 ? 0x3F800000 : bits;
                inverse[b][e] = __uint_as_float(0x7F000000 - bits);
                const float exponent = float(int(bits >> 23) - 127);
                score[b][e] += exponent, score[b][2 + e] += exponent;
            }
        if (ragged) {
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int key = key0 + 8 * b + 2 * t + j % 2;
                    if (key < span.begin || key > last[j / 2]) score[b][j] = -INFINITY;
                }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = fmaxf(fmaxf(score[0][2 * r], score[0][2 * r + 1]), fmaxf(score[1][2 * r], score[1][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2));
            if (t == 0) shared.top[turn][warp][g + 8 * r] = top;
        }
        named_sync(1, 128);
        barrier_wait(shared_address(&shared.taken[turn]), (i >> 1 & 1) ^ 1);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float top = fmaxf(fmaxf(shared.top[turn][0][g + 8 * r], shared.top[turn][1][g + 8 * r]),
                                    fmaxf(shared.top[turn][2][g + 8 * r], shared.top[turn][3][g + 8 * r])) -
                              kRoom<true>;
            const float to = top > reference[r] + kSlack ? top : reference[r];
            const float fade = exp2_fast(reference[r] - to);
            total[r] *= fade, reference[r] = to;
            if (warp == 0 && t == 0) shared.fade[turn][g + 8 * r] = fade;
        }
        uint32_t left[4];
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float w[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    w[e] = exp2_fast(score[b][2 * r + e] - reference[r]);
                    total[r] = fmaf(w[e], inverse[b][e], total[r]);
                }
                const __half2 pair = __floats2half2_rn(w[0], w[1]);
                left[r + 2 * b] = reinterpret_cast<const uint32_t&>(pair);
            }
        shared.weight[turn][warp][lane] = {left[0], left[1], left[2], left[3]};
        if (g < 4) {
            uint2 factors;
#pragma unroll
            for (int b = 0; b < 2; b++) {
                float f[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float4& s = scale[b][e];
                    f[e] = (g & 2 ? (g & 1 ? s.w : s.z) : (g & 1 ? s.y : s.x)) * inverse[b][e];
                }
                const __half2 pair = __floats2half2_rn(f[0], f[1]);
                (b ? factors.y : factors.x) = reinterpret_cast<const uint32_t&>(pair);
            }
            shared.factor[turn][warp][g][t] = factors;
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.weighed[turn]));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xFFFFFFFF, total[r], 1);
        total[r] += __shfl_xor_sync(0xFFFFFFFF, total[r], 2);
        if (t == 0) shared.total[warp][g + 8 * r] = total[r];
        if (warp == 0 && t == 0) shared.reference[g + 8 * r] = reference[r];
    }
    dependents_may_start();
    named_arrive(2, 256);
}

// Warps 4 to 7: 128 columns of the output each, and the loading of tiles after the first.
template <class Load>
__device__ __forceinline__ void sum_values(const Arguments& a, SharedFew& shared, int n, int row, int split,
                                           int first_query, Load load) {
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sum[16][4] = {};
    for (int i = 0; i < n; i++) {
        const int turn = i & 1, before = (i + kStages - 1) % kStages;
        if (warp == 0 && i > 0 && i + kStages - 1 < n) {
            if (lane == 0) {
                barrier_wait(shared_address(&shared.empty[before]), (i - 1) / kStages & 1);
                load(i + kStages - 1);
            }
            __syncwarp();
        }
        barrier_wait(shared_address(&shared.full[i % kStages]), i / kStages & 1);
        barrier_wait(shared_address(&shared.weighed[turn]), i >> 1 & 1);
        const float fade[2] = {shared.fade[turn][g], shared.fade[turn][g + 8]};
        if (__any_sync(0xFFFFFFFF, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) sum[j][k] *= fade[k / 2];
        }
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 weight = shared.weight[turn][s][lane];
            const uint2 factor = shared.factor[turn][s][warp][t];
            uint32_t left[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(left[j]),
                                               reinterpret_cast<const __half2&>(j < 2 ? factor.x : factor.y));
                left[j] = reinterpret_cast<const uint32_t&>(scaled);
            }
            const uint8_t* key = shared.tile[i % kStages] + (16 * s + 2 * t) * kFp8Row + 128 * warp + 16 * g;
            uint4 codes[4];
#pragma unroll
            for (int j = 0; j < 4; j++) codes[j] = *reinterpret_cast<const uint4*>(key + (j / 2 * 8 + j % 2) * kFp8Row);
#pragma unroll
            for (int word = 0; word < 4; word++) {
                uint32_t c[4];
#pragma unroll
                for (int j = 0; j < 4; j++) c[j] = reinterpret_cast<const uint32_t*>(&codes[j])[word];
#pragma unroll
                for (int two = 0; two < 2; two++) {
                    const uint32_t low = __byte_perm(c[0], c[1], two ? 0x7362 : 0x5140);
                    const uint32_t high = __byte_perm(c[2], c[3], two ? 0x7362 : 0x5140);
                    product_16<true>(sum[4 * word + 2 * two], left, low_e4m3(low), low_e4m3(high));
                    product_16<true>(sum[4 * word + 2 * two + 1], left, high_e4m3(low), high_e4m3(high));
                }
            }
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(shared_address(&shared.taken[turn]));
            barrier_arrive(shared_address(&shared.empty[i % kStages]));
        }
    }
    dependents_may_start();
    named_sync(2, 256);
    const int queries = a.tokens * a.heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int m = g + 8 * r;
        if (first_query + m >= queries) continue;
        const float total = shared.total[0][m] + shared.total[1][m] + shared.total[2][m] + shared.total[3][m];
        const int64_t at = (int64_t(row) * a.splits + split) * queries + first_query + m;
        if (a.splits > 1) {
            if (warp == 0 && t == 0) a.lse[at] = shared.reference[m] + log2f(total);
            if (n == 0) continue;  // the merge does not read it
        }
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const int64_t to = at * kRank + 128 * warp + 32 * t;
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int j = 0; j < 16; j += 4) {
                float x[4];
#pragma unroll
                for (int k = 0; k < 4; k++) x[k] = sum[j + k][2 * r + e] * inverse;
                if (a.out_float) {
                    *reinterpret_cast<float4*>(static_cast<float*>(a.out) + to + 16 * e + j) =
                        make_float4(x[0], x[1], x[2], x[3]);
                } else {
                    const __nv_bfloat162 two[2] = {__floats2bfloat162_rn(x[0], x[1]),
                                                   __floats2bfloat162_rn(x[2], x[3])};
                    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(a.out) + to + 16 * e + j) =
                        reinterpret_cast<const uint2&>(two);
                }
            }
    }
}

__global__ void __launch_bounds__(256, 1) decode_16(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedFew& shared = *reinterpret_cast<SharedFew*>(memory);
    const int first_query = blockIdx.x * kFew, row = blockIdx.y, split = blockIdx.z;
    const Span span(a, row, split, first_query, min(first_query + kFew, a.tokens * a.heads) - 1);
    const int n = span.tiles();
    auto load = [&](int i) {
        const uint32_t full = shared_address(&shared.full[i % kStages]);
        barrier_expect(full, kPage * kFp8Row);
        load_bytes(shared_address(shared.tile[i % kStages]),
                   static_cast<const uint8_t*>(a.cache) + tile_row(a, row, span.low + i) * kFp8Row, kPage * kFp8Row,
                   full);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), 4);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&shared.weighed[i]), 4);
            barrier_init(shared_address(&shared.taken[i]), 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < min(n, kStages); i++) load(i);
    }
    const int lane = threadIdx.x % 32;
    for (int m = threadIdx.x / 32; m < kFew; m += 8) {
        const __nv_bfloat16* from = query_at(a, row, first_query + m, false);
        const float most = fmaxf(largest(load_chunk(from ? from + 8 * lane : nullptr, a.aligned)),
                                 largest(load_chunk(from ? from + 8 * lane + 256 : nullptr, a.aligned)));
        if (lane == 0) shared.unit[m] = power_of_two(most);
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        weigh_few(a, shared, span, row, first_query);
    } else {
        sum_values(a, shared, n, row, split, first_query, load);
    }
}

}  // namespace mla
