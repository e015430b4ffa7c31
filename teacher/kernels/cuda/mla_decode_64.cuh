// MLA decode for Hopper, 64 queries of one sequence and one split of its keys a CTA: bound by the tensor cores.
//
// FlashMLA's way (https://github.com/deepseek-ai/FlashMLA, "A deep dive into the new kernel"): the output of 64 queries
// is 64 x 512 in fp32, half of an SM's registers, so two warp groups share one program. Each keeps 256 of its columns.
// They take the tiles of 64 keys in turn: the owner of a tile multiplies it with the queries, computes the weights,
// hands them over in shared memory, and both multiply them with their own half of the tile as values. While one group
// computes weights the other one's products run. A third group loads: bf16 by TMA, FP8 through its registers, as fp16.
//
// Shared memory, 216 KB: queries 64 x 576 and two tiles of 64 x 576. A tile's weights take the place of its rotary
// keys, which only the scores need.
#pragma once

#include "mla_softmax.cuh"

namespace mla {

constexpr int kTiles = 9;  // of 64 columns of a row

struct Shared {
    uint8_t query[kTiles][kTileBytes];
    uint8_t key[2][kTiles][kTileBytes];
    float reference[2][kQueries], sum[2][kQueries];
    float unit[kQueries];                         // FP8: of queries
    alignas(16) float token[2][kPage / 8][2][8];  // of keys: see Tokens
    uint64_t full[2][kTiles], empty[2][2];  // of a buffer: tiles; its owner's half, and the other half with the rope
};

// The order in which a buffer's tiles are loaded and multiplied: the owner's half is free first.
__device__ __forceinline__ int tile_at(int owner, int i) { return i == 8 ? 8 : (i + 4 * owner) % 8; }

// Eight warps, one a query, a lane chunks `lane` and `lane + 32` of its latent; the first eight lanes its rotary part.
template <bool FP8>
__device__ void load_queries(const Arguments& a, Shared& shared, int row, int first_query) {
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
            const float unit = power_of_two(fmaxf(largest(chunk[0]), largest(chunk[1])));
            const float inverse = 1.0f / unit;
            if (lane == 0) shared.unit[m] = unit;
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

// One thread: the tiles of a split, into the two buffers in turn.
__device__ void load_keys(const Arguments& a, Shared& shared, const CUtensorMap* map, const Span& span, int row) {
    for (int i = 0; i < span.tiles(); i++) {
        const int owner = i & 1;
        const int at = int(tile_row(a, row, span.low + i));
        for (int j = 0; j < kTiles; j++) {
            if (j % 4 == 0 && j < 8) barrier_wait(shared_address(&shared.empty[owner][j / 4]), (i >> 1 & 1) ^ 1);
            const int tile = tile_at(owner, j);
            const uint32_t full = shared_address(&shared.full[owner][tile]);
            barrier_expect(full, kTileBytes);
            load_box(shared_address(shared.key[owner][tile]), map, tile * 64, at, full);
        }
    }
}

// A warp group: FP8 rows on their way to the buffers, of each tile of 64 columns 16 a lane, half of the columns ahead
// in registers.
__device__ void convert_keys(const Arguments& a, Shared& shared, const Span& span, int row) {
    const int q = threadIdx.x % 4, n = __shfl_sync(0xFFFFFFFF, span.tiles(), 0);
    if (n == 0) return;
    Rows rows(a, span, row, n);
    uint4 codes[4][2], rope[2][2], scale[2];
    auto load = [&](int half, int u) {
#pragma unroll
        for (int r = 0; r < 2; r++) codes[u][r] = rows.at(r, 256 * half + 64 * u + 16 * q);
    };
    auto deliver = [&](uint64_t& full) {
        fence_async();
        __syncwarp();
        if (thread_of_group() % 32 == 0) barrier_arrive(shared_address(&full));
    };
    rows.find(0);
#pragma unroll
    for (int r = 0; r < 2; r++) scale[r] = rows.at(r, kRank);
#pragma unroll
    for (int u = 0; u < 4; u++) load(0, u);
    for (int i = 0; i < n; i++) {
        const int owner = i & 1;
        float inverse[2];
        __half2 ratio[2][2];
#pragma unroll
        for (int r = 0; r < 2; r++) inverse[r] = divided(scale[r], ratio[r]);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const int half = owner ^ part;
            if (part == 1) {
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int j = 0; j < 2; j++) rope[r][j] = rows.at(r, kRank + 16 + 32 * q + 16 * j);
                if (i + 1 < n) rows.find(i + 1);
            }
            barrier_wait(shared_address(&shared.empty[owner][part]), (i >> 1 & 1) ^ 1);
#pragma unroll
            for (int u = 0; u < 4; u++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const __half2 two = half ? ratio[r][1] : ratio[r][0];
                    const __half2 factor = u < 2 ? __low2half2(two) : __high2half2(two);
                    store_codes(shared.key[owner][4 * half + u], rows.key0 + 8 * r, 2 * q, codes[u][r], factor);
                }
                if (part == 0) {
                    load(half ^ 1, u);
                } else if (i + 1 < n) {
                    load(owner ^ 1, u);
                }
                deliver(shared.full[owner][4 * half + u]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int j = 0; j < 2; j++)
                *reinterpret_cast<uint4*>(shared.key[owner][8] + swizzled(rows.key0 + 8 * r, 2 * q + j)) =
                    scaled_rope(rope[r][j], inverse[r]);
            if (q == 0) store_token(shared.token[owner], rows.key0 + 8 * r, inverse[r]);
        }
        deliver(shared.full[owner][8]);
        if (i + 1 < n) {
#pragma unroll
            for (int r = 0; r < 2; r++) scale[r] = rows.at(r, kRank);
        }
    }
}

// Group `me`: its tiles' weights, and its half of the columns of the output.
template <bool FP8>
__device__ void attend(const Arguments& a, Shared& shared, const Span& span, int me, int row, int split,
                       int first_query) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, t = lane % 4;
    const int m[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    const int n = __shfl_sync(0xFFFFFFFF, span.tiles(), 0), queries = a.tokens * a.heads;
    float sum[128], total[2] = {0.0f, 0.0f}, reference[2] = {kNothing, kNothing};
#pragma unroll
    for (int i = 0; i < 128; i++) sum[i] = 0.0f;

    const int other = me ^ 1;
    const float scale[2] = {FP8 ? a.scale * shared.unit[m[0]] : 0.0f, FP8 ? a.scale * shared.unit[m[1]] : 0.0f};
    // Where a lane's row of four matrices of weights goes: lanes 8 on to queries 8 on, lanes 16 on to keys 8 on.
    const uint32_t weights_at = shared_address(shared.key[me][8]) + swizzled(16 * warp + lane % 16, lane / 16);
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
                for (int k = 0; k < 4; k++) {
                    if (j < 8)
                        score_product<FP8>(score, query + 2 * k, key + 2 * k, j + k > 0);
                    else
                        score_product<false>(score, query + 2 * k, key + 2 * k, true);
                }
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
            for (int k = 0; k < 4; k++) value_product<FP8>(sum, weight + 2 * k, value + 128 * k);
            products_commit();
        } else if (mine) {
            named_sync(3 + me, 128);
        }
        uint32_t weight[16];
        float to[2] = {reference[0], reference[1]}, more[2] = {0.0f, 0.0f};
        if (mine) {
            const bool ragged = __shfl_sync(0xFFFFFFFF, int(span.ragged(span.low + i)), 0);
            weigh<FP8>(a, span, span.low + i, ragged, shared.token[me], scale, row, first_query + m[0], score, to, more,
                       weight);
            if (t == 0) shared.reference[me][m[0]] = to[0], shared.reference[me][m[1]] = to[1];
#pragma unroll
            for (int k = 0; k < 4; k++) store_matrices(weights_at ^ (32 * k), weight + 4 * k);
            if (!FP8 && ragged) clear_unseen<kRank>(span, span.low + i, shared.key[me]);
            fence_async();
            if (!FP8 && ragged) named_sync(3 + me, 128);
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
        for (int k = 0; k < 4; k++) value_product<FP8>(sum, weight + 4 * k, value + 128 * k);
        products_commit();
        products_wait<0>(sum);
        if (lane == 0) barrier_arrive(shared_address(&shared.empty[me][0]));
    }

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
        store_row(a, sum, r, total[r], part * kRank + 256 * me + 2 * t);
    }
}

template <bool FP8>
__global__ void __launch_bounds__(384, 1)
    decode_64(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int first_query = blockIdx.x * kQueries, row = blockIdx.y, split = blockIdx.z;
    const Span span(a, row, split, first_query, min(first_query + kQueries, a.tokens * a.heads) - 1);
    const int group = __shfl_sync(0xFFFFFFFF, int(threadIdx.x / 128), 0);  // the compiler sees that warps do not part
    if (threadIdx.x == 256) {
        for (int buffer = 0; buffer < 2; buffer++) {
            for (int i = 0; i < kTiles; i++) barrier_init(shared_address(&shared.full[buffer][i]), FP8 ? 4 : 1);
            for (int i = 0; i < 2; i++) barrier_init(shared_address(&shared.empty[buffer][i]), 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (group == 2) {
        // Of 168 x 384 registers that the launch has, three groups' shares may not exceed the sum.
        registers_shrink<FP8 ? 88 : 24>();
        named_arrive(6, 384);
        if constexpr (FP8) {
            named_sync(7, 128);
            convert_keys(a, shared, span, row);
        } else {
            if (threadIdx.x == 256) load_keys(a, shared, &map, span, row);
        }
    } else {
        registers_grow<FP8 ? 208 : 240>();
        load_queries<FP8>(a, shared, row, first_query);
        named_sync(6, 384);
        attend<FP8>(a, shared, span, group, row, split, first_query);
    }
}

}  // namespace mla
