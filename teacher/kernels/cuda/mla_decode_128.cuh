// MLA decode for Hopper, 128 queries of one sequence and one split of its keys a pair of CTAs (a cluster).
//
// What bounds decode_64 is that its two buffers of 72 KB wait for the L2 while the tensor cores wait for them. Here
// each CTA of the pair has half of the columns: 256 of the latent and 32 of the rotary ones, of queries and of keys, so
// that a tile of 64 keys takes 36 KB and three are under way. Each warp group has 64 queries: it computes its columns'
// part of their scores, exchanges it with the same group of the other CTA through distributed shared memory, and
// multiplies the weights, which both compute alike, with its own columns as values: 64 x 256 of the output. In bf16 the
// scores of the next tile are under way while weights are computed; in FP8, whose rows a third group converts,
// registers do not suffice.
#pragma once

#include "mla_softmax.cuh"

namespace mla {

constexpr int kBuffers = 3, kRopeBytes = 64 * 64;  // of 64 rows x 32 values

struct SharedPair {
    uint8_t query[2][4][kTileBytes];
    uint8_t key[kBuffers][4][kTileBytes];
    uint8_t query_rope[2][kRopeBytes], key_rope[kBuffers][kRopeBytes];
    float4 score[2][8][128];                             // of a group, from the other CTA, as its threads have them
    alignas(16) float token[kBuffers][kPage / 8][2][8];  // FP8: of keys, see Tokens
    float unit[2 * kQueries];                            // FP8: of queries
    uint64_t full[kBuffers], empty[kBuffers], received[2], taken[2];
};

// Tiles of 64 bytes a row: the chunks of every other row are exchanged.
__device__ __forceinline__ uint32_t swizzled_narrow(int row, int chunk) {
    return row * 64 + ((chunk ^ (row / 2 & 3)) << 4);
}
__device__ __forceinline__ uint64_t along_narrow_rows(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(512 >> 4) << 32 | uint64_t(2) << 62;
}

// Eight warps, one a query: of its columns of the latent a lane has one chunk (in FP8 one of the other CTA's too, for
// the largest), of the rotary ones four lanes.
template <bool FP8>
__device__ void load_query_columns(const Arguments& a, SharedPair& shared, int row, int first_query, int rank) {
    const int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int m = threadIdx.x / 32; m < 2 * kQueries; m += 8) {
        const __nv_bfloat16* latent = query_at(a, row, first_query + m, false);
        const __nv_bfloat16* rope = query_at(a, row, first_query + m, true);
        uint4 chunk = load_chunk(latent ? latent + 256 * rank + lane * 8 : nullptr, a.aligned);
        uint4 more = load_chunk(rope && lane < 4 ? rope + 32 * rank + lane * 8 : nullptr, a.aligned);
        if constexpr (FP8) {
            const uint4 theirs = load_chunk(latent ? latent + 256 * (rank ^ 1) + lane * 8 : nullptr, a.aligned);
            const float unit = power_of_two(fmaxf(largest(chunk), largest(theirs)));
            const float inverse = 1.0f / unit;
            if (lane == 0) shared.unit[m] = unit;
            chunk = scaled_chunk<true>(chunk, inverse);
            more = scaled_chunk<false>(more, inverse);
        }
        *reinterpret_cast<uint4*>(shared.query[m / 64][lane / 8] + swizzled(m % 64, lane % 8)) = chunk;
        if (lane < 4) *reinterpret_cast<uint4*>(shared.query_rope[m / 64] + swizzled_narrow(m % 64, lane)) = more;
    }
    fence_async();
}

// One thread: its CTA's columns of the tiles of a split, into the buffers in turn.
__device__ void load_key_columns(const Arguments& a, SharedPair& shared, const CUtensorMap* map,
                                 const CUtensorMap* rope, const Span& span, int row, int rank) {
    int buffer = 0, used = 1;
#pragma unroll 1
    for (int tile = span.low; tile < span.high; tile++) {
        const int at = int(tile_row(a, row, tile));
        const uint32_t full = shared_address(&shared.full[buffer]);
        barrier_wait(shared_address(&shared.empty[buffer]), used);
        barrier_expect(full, 4 * kTileBytes + kRopeBytes);
#pragma unroll 1
        for (int j = 0; j < 4; j++) load_box(shared_address(shared.key[buffer][j]), map, 256 * rank + 64 * j, at, full);
        load_box(shared_address(shared.key_rope[buffer]), rope, kRank + 32 * rank, at, full);
        if (++buffer == kBuffers) buffer = 0, used ^= 1;
    }
}

// A warp group: its CTA's columns of FP8 rows into the buffers in turn, a tile ahead in registers.
__device__ void convert_key_columns(const Arguments& a, SharedPair& shared, const Span& span, int row, int rank) {
    const int lane = threadIdx.x % 32, q = lane % 4, n = __shfl_sync(0xFFFFFFFF, span.tiles(), 0);
    if (n == 0) return;
    Rows rows(a, span, row, n);
    uint4 codes[4][2], rope[2], scale[2];
    auto load = [&]() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            scale[r] = rows.at(r, kRank), rope[r] = rows.at(r, kRank + 16 + 64 * rank + 16 * q);
#pragma unroll
            for (int u = 0; u < 4; u++) codes[u][r] = rows.at(r, 256 * rank + 64 * u + 16 * q);
        }
    };
    rows.find(0);
    load();
    int buffer = 0, used = 1;
    for (int i = 0; i < n; i++) {
        if (i + 1 < n) rows.find(i + 1);
        barrier_wait(shared_address(&shared.empty[buffer]), used);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            __half2 ratio[2];
            const int key = rows.key0 + 8 * r;
            const float inverse = divided(scale[r], ratio);
            const __half2 two = rank ? ratio[1] : ratio[0];
#pragma unroll
            for (int u = 0; u < 4; u++)
                store_codes(shared.key[buffer][u], key, 2 * q, codes[u][r],
                            u < 2 ? __low2half2(two) : __high2half2(two));
            *reinterpret_cast<uint4*>(shared.key_rope[buffer] + swizzled_narrow(key, q)) =
                scaled_rope(rope[r], inverse);
            if (q == 0) store_token(shared.token[buffer], key, inverse);
        }
        if (i + 1 < n) load();
        fence_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.full[buffer]));
        if (++buffer == kBuffers) buffer = 0, used ^= 1;
    }
}

// A group's part of the scores of a tile begins.
template <bool FP8>
__device__ __forceinline__ void begin_scores(SharedPair& shared, float (&score)[32], int i, int me) {
    const int buffer = i % kBuffers;
    barrier_wait(shared_address(&shared.full[buffer]), i / kBuffers & 1);
    products_begin();
    const uint64_t query = along_rows(shared_address(shared.query[me])),
                   key = along_rows(shared_address(shared.key[buffer]));
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            score_product<FP8>(score, query + j * (kTileBytes >> 4) + 2 * k, key + j * (kTileBytes >> 4) + 2 * k,
                               j + k > 0);
    const uint64_t query_rope = along_narrow_rows(shared_address(shared.query_rope[me]));
    const uint64_t key_rope = along_narrow_rows(shared_address(shared.key_rope[buffer]));
#pragma unroll
    for (int k = 0; k < 2; k++) score_product<false>(score, query_rope + 2 * k, key_rope + 2 * k, true);
    products_commit();
}

// A group's part of the scores goes to the same group of the other CTA.
__device__ __forceinline__ void send_scores(SharedPair& shared, const float (&score)[32], int me) {
    const int thread = thread_of_group(), other = cluster_rank() ^ 1;
    uint32_t to, received;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(to)
                 : "r"(shared_address(&shared.score[me][0][thread])), "r"(other));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(received)
                 : "r"(shared_address(&shared.received[me])), "r"(other));
#pragma unroll
    for (int j = 0; j < 8; j++)
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                to + j * 128 * 16),
            "f"(score[4 * j]), "f"(score[4 * j + 1]), "f"(score[4 * j + 2]), "f"(score[4 * j + 3]), "r"(received)
            : "memory");
}

// What a thread of a group has: its part of the output of two queries.
struct Attended {
    float sum[128], total[2], reference[2];
};

// One tile: its weights from both CTAs' parts of the scores, and its values; while the scores of the NEXT begin.
template <bool FP8, bool NEXT>
__device__ __forceinline__ void attend_tile(const Arguments& a, SharedPair& shared, const Span& span, Attended& o,
                                            float (&score)[32], int row, int first_query, int i, int me) {
    const int thread = thread_of_group(), lane = thread % 32, buffer = i % kBuffers, tile = span.low + i;
    const uint32_t received = shared_address(&shared.received[me]);
    float next[32];
    if constexpr (NEXT) begin_scores<FP8>(shared, next, i + 1, me);
    barrier_wait(received, i & 1);
    if (thread == 0) barrier_expect(received, 128 * 128);  // of the next tile, if there is one
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float4 more = shared.score[me][j][thread];
        score[4 * j] += more.x, score[4 * j + 1] += more.y, score[4 * j + 2] += more.z, score[4 * j + 3] += more.w;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive_at(shared_address(&shared.taken[me]), cluster_rank() ^ 1);

    const bool ragged = __shfl_sync(0xFFFFFFFF, int(span.ragged(tile)), 0);
    if (!FP8 && ragged) {
        clear_unseen<256>(span, tile, shared.key[buffer]);
        fence_async();
        named_sync(3 + me, 128);
    }
    const int m = 64 * me + thread / 32 * 16 + lane / 4;
    float to[2] = {o.reference[0], o.reference[1]}, more[2] = {0.0f, 0.0f}, scale[2] = {};
    if constexpr (FP8) scale[0] = a.scale * shared.unit[m], scale[1] = a.scale * shared.unit[m + 8];
    uint32_t weight[16];
    weigh<FP8>(a, span, tile, ragged, shared.token[buffer], scale, row, first_query + m, score, to, more, weight);
    refer(o.sum, o.total, o.reference, to[0], to[1]);
    o.total[0] += more[0], o.total[1] += more[1];
    products_begin();
    const uint64_t value = down_rows(shared_address(shared.key[buffer]));
#pragma unroll
    for (int k = 0; k < 4; k++) value_product<FP8>(o.sum, weight + 4 * k, value + 128 * k);
    products_commit();
    if constexpr (NEXT) {
        products_wait<1>(next);
        barrier_wait(shared_address(&shared.taken[me]), i & 1);
        send_scores(shared, next, me);
    }
    products_wait<0>(o.sum);
    if (thread_of_group() % 32 == 0) barrier_arrive(shared_address(&shared.empty[buffer]));
    if constexpr (NEXT) {
#pragma unroll
        for (int j = 0; j < 32; j++) score[j] = next[j];
    }
}

template <bool FP8>
__device__ void attend_pair(const Arguments& a, SharedPair& shared, const Span& span, int me, int row, int split,
                            int first_query, int rank) {
    const int n = __shfl_sync(0xFFFFFFFF, span.tiles(), 0), queries = a.tokens * a.heads;
    Attended o;
#pragma unroll
    for (int i = 0; i < 128; i++) o.sum[i] = 0.0f;
    for (int r = 0; r < 2; r++) o.total[r] = 0.0f, o.reference[r] = kNothing;

    if (n > 0) {
        float score[32];
        if (thread_of_group() == 0) barrier_expect(shared_address(&shared.received[me]), 128 * 128);
        if constexpr (FP8) {
            for (int i = 0; i < n; i++) {
                begin_scores<true>(shared, score, i, me);
                products_wait<0>(score);
                if (i > 0) barrier_wait(shared_address(&shared.taken[me]), (i - 1) & 1);
                send_scores(shared, score, me);
                attend_tile<true, false>(a, shared, span, o, score, row, first_query, i, me);
            }
        } else {
            begin_scores<false>(shared, score, 0, me);
            products_wait<0>(score);
            send_scores(shared, score, me);
            for (int i = 0; i < n - 1; i++)
                attend_tile<false, true>(a, shared, span, o, score, row, first_query, i, me);
            attend_tile<false, false>(a, shared, span, o, score, row, first_query, n - 1, me);
        }
    }

    dependents_may_start();
    const int thread = thread_of_group(), warp = thread / 32, lane = thread % 32, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        o.total[r] += __shfl_xor_sync(0xFFFFFFFF, o.total[r], 1);
        o.total[r] += __shfl_xor_sync(0xFFFFFFFF, o.total[r], 2);
        const int query = first_query + 64 * me + warp * 16 + lane / 4 + 8 * r;
        if (query >= queries) continue;
        const int64_t part = (int64_t(row) * a.splits + split) * queries + query;
        if (a.splits > 1) {
            if (rank == 0 && t == 0) a.lse[part] = o.reference[r] + log2f(o.total[r]);
            if (n == 0) continue;  // the merge does not read it
        }
        store_row(a, o.sum, r, o.total[r], part * kRank + 256 * rank + 2 * t);
    }
}

template <bool FP8>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    decode_128(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map,
               const __grid_constant__ CUtensorMap rope) {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedPair& shared = *reinterpret_cast<SharedPair*>(memory);
    const int rank = cluster_rank(), first_query = blockIdx.x / 2 * 2 * kQueries, row = blockIdx.y, split = blockIdx.z;
    const Span span(a, row, split, first_query, min(first_query + 2 * kQueries, a.tokens * a.heads) - 1);
    const int group = __shfl_sync(0xFFFFFFFF, int(threadIdx.x / 128), 0);  // the compiler sees that warps do not part
    if (threadIdx.x == 256) {
        for (int i = 0; i < kBuffers; i++) {
            barrier_init(shared_address(&shared.full[i]), FP8 ? 4 : 1);
            barrier_init(shared_address(&shared.empty[i]), 8);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&shared.received[i]), 1);
            barrier_init(shared_address(&shared.taken[i]), 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    if (group == 2) {
        // Of 168 x 384 registers that the launch has, three groups' shares may not exceed the sum.
        registers_shrink<FP8 ? 88 : 24>();
        named_arrive(6, 384);
        if constexpr (FP8) {
            convert_key_columns(a, shared, span, row, rank);
        } else {
            if (threadIdx.x == 256) load_key_columns(a, shared, &map, &rope, span, row, rank);
        }
    } else {
        registers_grow<FP8 ? 208 : 240>();
        load_query_columns<FP8>(a, shared, row, first_query, rank);
        named_sync(6, 384);
        attend_pair<FP8>(a, shared, span, group, row, split, first_query, rank);
    }
    cluster_sync();  // nobody goes while the other may still write to it
}

}  // namespace mla
