// MLA decode for Hopper, 64 queries of one sequence and one split of its keys a CTA: bound by the tensor cores.
//
// FlashMLA's way (https://github.com/deepseek-ai/FlashMLA, "A deep dive into the new kernel"): the output of 64 queries
// is 64 x 512 in fp32, half of an SM's registers, so two warp groups share one program. Each keeps 256 of its columns.
// They take the tiles of 64 keys in turn: the owner of a tile multiplies it with the queries, computes the weights, hands
// them over in shared memory, and both multiply them with their own half of the tile as values. While one group computes
// weights the other one's products run. A third group loads: bf16 by TMA, FP8 through its registers, as fp16.
//
// Shared memory, 216 KB: queries 64 x 576 and two tiles of 64 x 576. A tile's weights take the place of its rotary keys,
// which only the scores need.
//
// The reference that weights are relative to moves only when a maximum exceeds it by 2^kSlack, so that the sums are
// hardly ever scaled; weights are then at most 2^kSlack, which bf16 and fp32 hold as well as 1.
//
// FP8: a token is 2^e (the exponent of its largest scale) times values that fp16 holds to 2^-12, rotary ones (bf16) too.
// 2^e goes into its scores and weights. Queries are brought into fp16's range by a power of two each.
#pragma once

#include "mla_arguments.cuh"
#include "mla_hopper.cuh"

namespace mla {

constexpr int kQueries = 64, kTiles = 9;  // queries of a program, tiles of 64 columns of a row
constexpr float kNothing = -1e30f, kSlack = 8.0f;  // weights are up to 2^(kRoom + kSlack), which fp16 holds
template <bool FP8> constexpr float kRoom = FP8 ? 6.0f : 0.0f;

struct Shared {
    uint8_t query[kTiles][kTileBytes];
    uint8_t key[2][kTiles][kTileBytes];
    float reference[2][kQueries], sum[2][kQueries];
    float unit[kQueries];                                        // FP8: of queries
    alignas(16) float token[2][kPage / 8][2][8];                 // of keys, eight by eight: 2^e and e
    uint64_t full[2][kTiles], empty[2][2];  // of a buffer: its tiles; its owner's half, and the other half with the rope
};

// The order in which a buffer's tiles are loaded and multiplied: the owner's half is free first.
__device__ __forceinline__ int tile_at(int owner, int i) { return i == 8 ? 8 : (i + 4 * owner) % 8; }

// Eight warps, one a query, a lane chunks `lane` and `lane + 32` of its latent; the first eight lanes its rotary part.
template <bool FP8> __device__ void load_queries(const Arguments& a, Shared& shared, int row, int first_query) {
    const int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int m = threadIdx.x / 32; m < kQueries; m += 8) {
        const __nv_bfloat16* latent = query_at(a, row, first_query + m, false);
        const __nv_bfloat16* rope = query_at(a, row, first_query + m, true);
        uint4 chunk[3];
#pragma unroll
        for (int i = 0; i < 2; i++) chunk[i] = load_chunk(latent ? latent + (lane + 32 * i) * 8 : nullptr, a.aligned);
        chunk[2] = load_chunk(rope && lane < 8 ? rope + lane * 8 : nullptr, a.aligned);
        if constexpr (FP8) {
            float largest = 1e-30f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float2 two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(chunk)[i]);
                largest = fmaxf(largest, fmaxf(fabsf(two.x), fabsf(two.y)));
            }
            for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, step));
            const uint32_t bits = __float_as_uint(largest) & 0x7F800000;
            const float inverse = __uint_as_float(0x7F000000 - bits);
            if (lane == 0) shared.unit[m] = __uint_as_float(bits);
            chunk[0] = scaled_chunk<true>(chunk[0], inverse);
            chunk[1] = scaled_chunk<true>(chunk[1], inverse);
            chunk[2] = scaled_chunk<false>(chunk[2], inverse);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            *reinterpret_cast<uint4*>(shared.query[lane / 8 + 4 * i] + swizzled(m, lane % 8)) = chunk[i];
        if (lane < 8) *reinterpret_cast<uint4*>(shared.query[8] + swizzled(m, lane)) = chunk[2];
    }
    fence_async();
}

#ifdef MLA_TRACE
__device__ unsigned long long trace[2][8];
#define MLA_START unsigned spent[8] = {}, then = clock();
#define MLA_SPENT(k) { const unsigned now = clock(); spent[k] += now - then, then = now; }
#else
#define MLA_START
#define MLA_SPENT(k)
#endif
#ifndef MLA_AHEAD
#define MLA_AHEAD 2
#endif

// One thread: the tiles of a split, into the two buffers in turn. In a PAIR each CTA loads every other box for both.
template <bool PAIR>
__device__ void load_keys(const Arguments& a, Shared& shared, const CUtensorMap* map, const Span& span, int row) {
    const int rank = PAIR ? cluster_rank() : 0;
    for (int i = 0; i < span.tiles(); i++) {
        const int owner = i & 1, use = i >> 1;
        const int at = int(tile_row(a, row, span.low + i));
        if (MLA_AHEAD && (!PAIR || (i & 1) == rank) && i + MLA_AHEAD < span.tiles())  // so that the loads meet the L2's latency alone
            fetch_bytes(static_cast<const __nv_bfloat16*>(a.cache) + tile_row(a, row, span.low + i + MLA_AHEAD) * (kRank + kRope),
                        kPage * (kRank + kRope) * 2);
        for (int j = 0; j < kTiles; j++) {
            if (j % 4 == 0 && j < 8) barrier_wait(shared_address(&shared.empty[owner][j / 4]), (use & 1) ^ 1);
            const int tile = tile_at(owner, j);
            const uint32_t full = shared_address(&shared.full[owner][tile]);
            barrier_expect(full, kTileBytes);
            if (!PAIR || (j & 1) == rank) load_box<PAIR>(shared_address(shared.key[owner][tile]), map, tile * 64, at, full);
        }
    }
}

// A warp has read a part of a buffer for the last time.
template <bool PAIR> __device__ __forceinline__ void release(uint64_t& empty) {
    const int lane = threadIdx.x % 32;
    if (PAIR && lane < 2) barrier_arrive_at(shared_address(&empty), lane);
    if (!PAIR && lane == 0) barrier_arrive(shared_address(&empty));
}

// Sixteen codes times `ratio`, as two chunks of fp16.
__device__ __forceinline__ void store_codes(uint8_t* tile, int row, int chunk, const uint4& codes, __half2 ratio) {
    const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t value[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t pair = from_e4m3(word[i / 2], i % 2);
        const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(pair), ratio);
        value[i] = reinterpret_cast<const uint32_t&>(scaled);
    }
    *reinterpret_cast<uint4*>(tile + swizzled(row, chunk)) = {value[0], value[1], value[2], value[3]};
    *reinterpret_cast<uint4*>(tile + swizzled(row, chunk + 1)) = {value[4], value[5], value[6], value[7]};
}

// A warp group: FP8 rows on their way to the buffers, some tiles of 64 columns ahead in registers. Lane (r, q) of a warp
// has rows 16 w + r and 8 more, and of each tile 16 columns. In a PAIR each CTA converts half of the rows, a row a lane,
// and copies them into the other's shared memory.
template <bool PAIR> __device__ void convert_keys(const Arguments& a, Shared& shared, const Span& span, int row) {
    constexpr int ROWS = PAIR ? 1 : 2, AHEAD = PAIR ? 8 : 4;
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, q = lane % 4, rank = PAIR ? cluster_rank() : 0;
    const int n = __shfl_sync(0xFFFFFFFF, span.tiles(), 0);
    if (n == 0) return;
    const int key0 = (PAIR ? 32 * rank + 8 * warp : 16 * warp) + lane / 4;
    uint4 codes[AHEAD][ROWS], rope[ROWS][2], scale[ROWS];
    const uint8_t* from = nullptr;  // the first row of the tile to be loaded next, and whether somebody sees each
    bool there[ROWS] = {};
    auto at = [&](int r, int offset) {
        return there[r] ? *reinterpret_cast<const uint4*>(from + 8 * r * kFp8Row + offset) : uint4{0, 0, 0, 0};
    };
    int next = int(tile_row(a, row, span.low));  // where the tile to be found next lies
    auto find = [&](int i) {
        from = static_cast<const uint8_t*>(a.cache) + int64_t(next + key0) * kFp8Row;
#pragma unroll
        for (int r = 0; r < ROWS; r++) there[r] = span.seen((span.low + i) * kPage + key0 + 8 * r);
        if (i + 1 == n) return;
        next = int(tile_row(a, row, span.low + i + 1));
        if (threadIdx.x % 128 == 0 && (!PAIR || (i & 1) == rank))
            fetch_bytes(static_cast<const uint8_t*>(a.cache) + int64_t(next) * kFp8Row, kPage * kFp8Row);
    };
    auto load = [&](int half, int u, int to) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) codes[to][r] = at(r, 256 * half + 64 * u + 16 * q);
    };
    auto load_scales = [&]() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) scale[r] = at(r, kRank);
    };
    auto load_rope = [&]() {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < 2; j++) rope[r][j] = at(r, kRank + 16 + 32 * q + 16 * j);
    };
    // A warp's rows of a tile of a buffer are there.
    auto deliver = [&](int owner, int tile) {
        fence_async();
        __syncwarp();
        if (lane != 0) return;
        const uint32_t full = shared_address(&shared.full[owner][tile]);
        if constexpr (PAIR) {
            barrier_expect(full, tile == 8 ? 1024 + 64 : 1024);  // as much as comes from the other
            send_bytes(shared_address(shared.key[owner][tile] + key0 * 128), 1024, full, rank ^ 1);
            if (tile == 8) send_bytes(shared_address(shared.token[owner][key0 / 8]), 64, full, rank ^ 1);
        } else {
            barrier_arrive(full);
        }
    };
    find(0);
    load_scales();
#pragma unroll
    for (int u = 0; u < AHEAD; u++) load(u / 4, u % 4, u);
    for (int i = 0; i < n; i++) {
        const int owner = i & 1;
        float inverse[ROWS];
        __half2 ratio[ROWS][2];  // of a row, two by two
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 s = reinterpret_cast<const float4&>(scale[r]);
            const float largest = fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w));
            uint32_t bits = __float_as_uint(largest) & 0x7F800000;
            bits = bits == 0 ? 0x3F800000 : max(bits, uint32_t(127 - 100) << 23);
            inverse[r] = __uint_as_float(0x7F000000 - bits);
            ratio[r][0] = __floats2half2_rn(s.x * inverse[r], s.y * inverse[r]);
            ratio[r][1] = __floats2half2_rn(s.z * inverse[r], s.w * inverse[r]);
        }
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const int half = owner ^ part;
            if (part == (PAIR ? 0 : 1)) {
                load_rope();
                if (i + 1 < n) find(i + 1);
            }
            barrier_wait(shared_address(&shared.empty[owner][part]), (i >> 1 & 1) ^ 1);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int slot = PAIR ? 4 * part + u : u;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const __half2 two = half ? ratio[r][1] : ratio[r][0];
                    const __half2 factor = u < 2 ? __low2half2(two) : __high2half2(two);
                    store_codes(shared.key[owner][4 * half + u], key0 + 8 * r, 2 * q, codes[slot][r], factor);
                }
                if (!PAIR && part == 0) {
                    load(half ^ 1, u, slot);
                } else if (i + 1 < n) {
                    load(PAIR ? half ^ 1 : owner ^ 1, u, slot);
                }
                deliver(owner, 4 * half + u);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const __nv_bfloat162 factor = __float2bfloat162_rn(inverse[r]);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint4 chunk = rope[r][j];
                __nv_bfloat162* two = reinterpret_cast<__nv_bfloat162*>(&chunk);
#pragma unroll
                for (int k = 0; k < 4; k++) two[k] = __hmul2(two[k], factor);
                *reinterpret_cast<uint4*>(shared.key[owner][8] + swizzled(key0 + 8 * r, 2 * q + j)) = chunk;
            }
            if (q == 0) {
                const uint32_t bits = 0x7F000000 - __float_as_uint(inverse[r]);
                shared.token[owner][key0 / 8 + r][0][key0 % 8] = __uint_as_float(bits);
                shared.token[owner][key0 / 8 + r][1][key0 % 8] = float(int(bits >> 23) - 127);
            }
        }
        deliver(owner, 8);
        if (i + 1 < n) load_scales();
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
template <bool FP8, bool PAIR>
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
    const float scale[2] = {FP8 ? a.scale * shared.unit[m[0]] : 0.0f, FP8 ? a.scale * shared.unit[m[1]] : 0.0f};
    // Where a lane's row of four matrices of weights goes: lanes 8 on to queries 8 on, lanes 16 on to keys 8 on.
    const uint32_t weights_at = shared_address(shared.key[me][8]) + swizzled(16 * warp + lane % 16, lane / 16);
    MLA_START
    for (int i = me;; i += 2) {
        const bool mine = i < n, theirs = i > 0 && i - 1 < n;
        float score[32];
        if (mine) {
            products_begin();
#pragma unroll
            for (int j = 0; j < kTiles; j++) {
                const int tile = tile_at(me, j);
                MLA_SPENT(0)
                barrier_wait(shared_address(&shared.full[me][tile]), i >> 1 & 1);
                MLA_SPENT(1)
                const uint64_t query = along_rows(shared_address(shared.query[tile]));
                const uint64_t key = along_rows(shared_address(shared.key[me][tile]));
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    if (j < 8)
                        score_product<FP8>(score, query + 2 * k, key + 2 * k, j + k > 0);
                    else
                        score_product<false>(score, query + 2 * k, key + 2 * k, true);
                }
            }
            products_commit();
            products_wait<0>(score);
            MLA_SPENT(2)
        }
        if (theirs) {
            named_sync(1 + other, 256);  // the other tile's weights are there, and all of mine has been multiplied
            MLA_SPENT(3)
            refer(sum, total, reference, shared.reference[other][m[0]], shared.reference[other][m[1]]);
            products_begin();
            const uint64_t weight = along_rows(shared_address(shared.key[other][8]));
            const uint64_t value = down_rows(shared_address(shared.key[other][4 * me]));
#pragma unroll
            for (int k = 0; k < 4; k++) value_product<FP8>(sum, weight + 2 * k, value + 128 * k);
            products_commit();
        } else if (mine) {
            named_sync(3 + me, 128);
        }
        uint32_t weight[16];
        float to[2] = {reference[0], reference[1]}, more[2] = {0.0f, 0.0f};
        if (mine) {
            const bool ragged = __shfl_sync(0xFFFFFFFF, int(span.ragged(span.low + i)), 0);
            if constexpr (FP8) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 power = *reinterpret_cast<const float2*>(&shared.token[me][j][0][2 * t]);
                    const float2 exponent = *reinterpret_cast<const float2*>(&shared.token[me][j][1][2 * t]);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        score[4 * j + 2 * r] = fmaf(score[4 * j + 2 * r] * scale[r], power.x, exponent.x);
                        score[4 * j + 2 * r + 1] = fmaf(score[4 * j + 2 * r + 1] * scale[r], power.y, exponent.y);
                    }
                }
            }
            if (ragged) {
                const int at = (span.low + i) * kPage + 2 * t;
#pragma unroll
                for (int j = 0; j < 32; j++) {
                    const int key = at + j / 4 * 8 + j % 2;
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
                if (t == 0) shared.reference[me][m[r]] = to[r];
            }
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const int r = j % 2;
                float p[2];
                if constexpr (FP8) {
                    const uint2 power = *reinterpret_cast<const uint2*>(&shared.token[me][j / 2][0][2 * t]);
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
#pragma unroll
            for (int k = 0; k < 4; k++) store_matrices(weights_at ^ (32 * k), weight + 4 * k);
            if (!FP8 && ragged) {  // what nobody sees may be NaN, which 0 does not cancel
                for (int j = thread; j < kPage * kRank / 8; j += 128) {
                    const int key = j / (kRank / 8), chunk = j % (kRank / 8);
                    if (!span.seen((span.low + i) * kPage + key))
                        *reinterpret_cast<uint4*>(shared.key[me][chunk / 8] + key * 128 + chunk % 8 * 16) = {0, 0, 0, 0};
                }
            }
            fence_async();
            if (!FP8 && ragged) named_sync(3 + me, 128);
            named_arrive(1 + me, 256);
            MLA_SPENT(4)
        }
        if (theirs) {
            products_wait<0>(sum);
            MLA_SPENT(5)
            release<PAIR>(shared.empty[other][1]);
        }
        if (!mine) break;
        refer(sum, total, reference, to[0], to[1]);
        total[0] += more[0], total[1] += more[1];
        products_begin();
        const uint64_t value = down_rows(shared_address(shared.key[me][4 * me]));
#pragma unroll
        for (int k = 0; k < 4; k++) value_product<FP8>(sum, weight + 4 * k, value + 128 * k);
        products_commit();
        products_wait<0>(sum);
        MLA_SPENT(6)
        release<PAIR>(shared.empty[me][0]);
    }
#ifdef MLA_TRACE
    if (thread == 0 && blockIdx.x + blockIdx.y + blockIdx.z == 0)
        for (int k = 0; k < 7; k++) trace[me][k] = spent[k];
#endif

    dependents_may_start();
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

template <bool FP8, bool PAIR>
__global__ void __launch_bounds__(384, 1)
    decode_64(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int first_query = blockIdx.x * kQueries, row = blockIdx.y, split = blockIdx.z, queries = a.tokens * a.heads;
    const int first = PAIR ? first_query & ~(2 * kQueries - 1) : first_query;  // a pair loads what either wants
    const Span span(a, row, split, first, min(first + (PAIR ? 2 : 1) * kQueries, queries) - 1);
    const int group = __shfl_sync(0xFFFFFFFF, int(threadIdx.x / 128), 0);  // the compiler sees that warps do not part
    if (threadIdx.x == 256) {
        for (int buffer = 0; buffer < 2; buffer++) {
            for (int i = 0; i < kTiles; i++) barrier_init(shared_address(&shared.full[buffer][i]), FP8 ? 4 : 1);
            for (int i = 0; i < 2; i++) barrier_init(shared_address(&shared.empty[buffer][i]), PAIR ? 8 : 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if constexpr (PAIR) cluster_sync();
    if (group == 2) {
        // Of 168 x 384 registers that the launch has, three groups' shares may not exceed the sum.
        registers_shrink<FP8 ? 88 : 24>();
        named_arrive(6, 384);
        if constexpr (FP8) {
            named_sync(7, 128);
            convert_keys<PAIR>(a, shared, span, row);
        } else {
            if (threadIdx.x == 256) load_keys<PAIR>(a, shared, &map, span, row);
        }
    } else {
        registers_grow<FP8 ? 208 : 240>();
        load_queries<FP8>(a, shared, row, first_query);
        named_sync(6, 384);
        attend<FP8, PAIR>(a, shared, span, group, row, split, first_query);
    }
    if constexpr (PAIR) cluster_sync();  // nobody goes while the other may still write to it
}

}  // namespace mla
