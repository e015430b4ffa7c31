// The two loading warps of a block: operands by TMA, and scales, for every tile that is the block's, in order.
#pragma once

#include "gemm_ring.cuh"

namespace gemm {

// A block's tiles: those of its cluster, of which it has its own row or column tile.
template <Mode MODE>
class Tiles {
  public:
    __device__ explicit Tiles(const Arguments& a)
        : walk_(a.groups, MODE == SHARE_MATRIX ? 2 * ROWS : ROWS, (a.columns + WIDE - 1) / WIDE, a.group),
          rank_(MODE == ALONE ? 0 : hopper::cluster_rank()), index_(blockIdx.x / BLOCKS) {}

    __device__ int rank() const { return rank_; }

    // By all lanes of a warp.
    __device__ bool next(Tile& tile) {
        if (!walk_.find(index_, tile)) return false;
        index_ += gridDim.x / BLOCKS;
        if (MODE == SHARE_MATRIX) tile.row += rank_ * ROWS, tile.rows -= rank_ * ROWS;
        if (MODE == SHARE_ROWS) tile.column = tile.column * 2 + rank_;
        return true;
    }

  private:
    static constexpr int BLOCKS = MODE == ALONE ? 1 : 2;
    static constexpr int WIDE = COLUMNS * (MODE == SHARE_ROWS ? 2 : 1);
    Walk walk_;
    int rank_, index_;
};

template <Mode MODE>
__device__ void load_operands(const CUtensorMap* x_map, const CUtensorMap* w_map, const Arguments& a, Ring ring) {
    const bool first_lane = threadIdx.x % 32 == 0;
    Tiles<MODE> tiles(a);
    Tile tile;
    unsigned number = 0;
    for (; tiles.next(tile); ++number) {
        const int row = tile.rows > 0 ? tile.row : a.rows;  // beyond the last: TMA gives zeros
        const int w_row = tile.expert * a.columns + tile.column * COLUMNS;
        if (first_lane) {
            ring.write_note(number, tile);
#pragma unroll 1
            for (int k = 0; k < a.steps(); ++k, ring.next()) {
                const int at = k * K_STEP, half = tiles.rank();
                const uint32_t full = ring.full(), x = ring.x(), w = ring.w();
                hopper::barrier_wait(ring.empty(), ring.phase() ^ 1);
                hopper::barrier_expect(full, STAGE);
                if (MODE == SHARE_ROWS)
                    hopper::load_tile_both(x + half * X_BYTES / 2, x_map, at, row + half * ROWS / 2, full);
                else
                    hopper::load_tile(x, x_map, at, row, full);
                if (MODE == SHARE_MATRIX)
                    hopper::load_tile_both(w + half * W_BYTES / 2, w_map, at, w_row + half * COLUMNS / 2, full);
                else
                    hopper::load_tile(w, w_map, at, w_row, full);
            }
        }
        __syncwarp();
    }
    if (first_lane) {
        hopper::barrier_wait(ring.empty(), ring.phase() ^ 1);
        tile.expert = -1;
        ring.write_note(number, tile);
        hopper::barrier_arrive(ring.full());
    }
}

// Scales are read a step before they are put where the groups that multiply find them.
template <Mode MODE>
__device__ void load_scales(const Arguments& a, Ring ring) {
    const int lane = threadIdx.x % 32;
    const int blocks = (a.columns + 127) / 128;
    Tiles<MODE> tiles(a);
    Tile tile;
    while (tiles.next(tile)) {
        const int block = min(tile.column, blocks - 1);  // the second of two column tiles may not exist
        const long w_row = static_cast<long>(tile.expert) * blocks + block;
        const float *w_at = a.w_scales + w_row * a.steps(), *x_at = a.x_scales + tile.row + lane;
        float x[ROWS / 32], w;
        const auto read = [&] {
#pragma unroll
            for (int i = 0; i < ROWS / 32; ++i) x[i] = hopper::load_here(x_at + i * 32, lane + i * 32 < tile.rows);
            w = hopper::load_here(w_at, lane == 0);
            ++w_at, x_at += a.x_scale_stride;
        };
        read();
#pragma unroll 1
        for (int k = 1; k <= a.steps(); ++k, ring.next()) {
            hopper::barrier_wait(ring.empty(), ring.phase() ^ 1);
            const uint32_t to = ring.scales() + lane * 4;
#pragma unroll
            for (int i = 0; i < ROWS / 32; ++i) hopper::store_shared(to + i * 128, x[i]);
            if (lane == 0) hopper::store_shared(to + ROWS * 4, w);
            __syncwarp();
            if (lane == 0) hopper::barrier_arrive(ring.full());
            if (k < a.steps()) read();
        }
    }
    if (lane == 0) {  // for the note that no tile is left
        hopper::barrier_wait(ring.empty(), ring.phase() ^ 1);
        hopper::barrier_arrive(ring.full());
    }
}

}  // namespace gemm
