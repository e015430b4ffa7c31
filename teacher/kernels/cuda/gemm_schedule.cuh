// Which tile a block, or a cluster of two, multiplies next.
#pragma once

namespace gemm {

struct Groups {
    const int *start, *count;  // of each expert's rows
    int experts;
};

struct Tile {
    int expert, row, rows, column;  // first row; how many from there on are the expert's; column tile
};

// Tiles are numbered expert by expert; inside an expert `group` row tiles take turns over all columns, so that what
// runs at one time shares operands in the L2. A warp looks for its next tile from the 32 experts of the last one on.
class Walk {
  public:
    __device__ Walk(Groups groups, int tall, int columns, int group)
        : groups_(groups), tall_(tall), columns_(columns), group_(group) {}

    // All lanes of a warp get the same tile; false after the last one. `tile` must not fall from call to call.
    __device__ bool find(int tile, Tile& found) {
        const int lane = threadIdx.x % 32;
        for (; first_ < groups_.experts; first_ += 32) {
            const int e = first_ + lane;
            const int count = e < groups_.experts ? __ldg(groups_.count + e) : 0;
            const int tiles = (count + tall_ - 1) / tall_ * columns_;
            int up_to = tiles;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int below = __shfl_up_sync(~0u, up_to, step);
                if (lane >= step) up_to += below;
            }
            const int all = __shfl_sync(~0u, up_to, 31);
            if (tile >= before_ + all) {
                before_ += all;
                continue;
            }
            const int owner = __ffs(__ballot_sync(~0u, tile < before_ + up_to)) - 1;
            const int rows = __shfl_sync(~0u, count, owner);
            const int local = tile - before_ - __shfl_sync(~0u, up_to - tiles, owner);
            const int across = group_ * columns_;
            const int first = local / across * group_;
            const int height = min((rows + tall_ - 1) / tall_ - first, group_);
            const int down = (first + local % across % height) * tall_;
            found.expert = first_ + owner;
            found.row = __ldg(groups_.start + found.expert) + down;
            found.rows = rows - down;
            found.column = local % across / height;
            return true;
        }
        return false;
    }

  private:
    Groups groups_;
    int tall_, columns_, group_;
    int first_ = 0, before_ = 0;  // the 32 experts looked at, and the tiles before theirs
};

}  // namespace gemm
