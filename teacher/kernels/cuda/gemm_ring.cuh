// What a block holds in shared memory, and how its warps meet there: a ring of operands that two warps fill and two warp
// groups empty, what is staged on the way out, and notes that say which tile comes next.
#pragma once

#include "gemm_schedule.cuh"
#include "gemm_store.cuh"
#include "hopper.cuh"

namespace gemm {

constexpr int ROWS = 128, COLUMNS = 128, K_STEP = 128, STAGES = 6;
constexpr int X_BYTES = ROWS * K_STEP, W_BYTES = COLUMNS * K_STEP, STAGE = X_BYTES + W_BYTES;
constexpr int SCALES = ROWS * 4 + 16;  // bytes of a stage: of each row, and of the columns
constexpr int NOTES = 8;               // more than STAGES, so that none is overwritten before all have read it

// What two blocks of a cluster share.
enum Mode { ALONE, SHARE_MATRIX, SHARE_ROWS };

struct Arguments {
    const float *x_scales, *w_scales;
    long x_scale_stride;
    void* out;
    Groups groups;
    int rows, columns, k;
    int group;
    bool by_tma;

    __device__ int steps() const { return (k + K_STEP - 1) / K_STEP; }
};

class Ring {
  public:
    static constexpr int STAGING_AT = STAGES * STAGE, NOTES_AT = STAGING_AT + 2 * PIECE,
                         SCALES_AT = NOTES_AT + NOTES * 16, BARRIERS_AT = SCALES_AT + STAGES * SCALES,
                         BYTES = BARRIERS_AT + 2 * STAGES * 8;

    __device__ explicit Ring(uint32_t base) : base_(base) {}

    __device__ void next() { ++step_; }
    __device__ int phase() const { return step_ / STAGES % 2; }
    __device__ uint32_t x() const { return base_ + stage() * STAGE; }
    __device__ uint32_t w() const { return x() + X_BYTES; }
    __device__ uint32_t scales() const { return base_ + SCALES_AT + stage() * SCALES; }
    __device__ uint32_t full() const { return base_ + BARRIERS_AT + stage() * 8; }
    __device__ uint32_t empty() const { return full() + STAGES * 8; }
    __device__ uint32_t staging(int group) const { return base_ + STAGING_AT + group * PIECE; }

    // By one thread. Barriers: full when both loading warps have arrived; empty when the warps that multiply have, of
    // both blocks where operands go to both.
    __device__ void begin(Mode mode) const {
        for (int i = 0; i < STAGES; ++i) {
            hopper::barrier_init(base_ + BARRIERS_AT + i * 8, 2);
            hopper::barrier_init(base_ + BARRIERS_AT + (STAGES + i) * 8, mode == ALONE ? 8 : 16);
        }
        hopper::barrier_init_fence();
    }

    // Whoever waits for the tile's first stage can read it afterwards. An expert below 0: there is no tile left.
    __device__ void write_note(unsigned number, const Tile& tile) const {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(note(number)), "r"(tile.expert), "r"(tile.row),
                     "r"(tile.rows), "r"(tile.column)
                     : "memory");
    }
    __device__ Tile read_note(unsigned number) const {
        Tile tile;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(tile.expert), "=r"(tile.row), "=r"(tile.rows), "=r"(tile.column)
                     : "r"(note(number))
                     : "memory");
        return tile;
    }

  private:
    __device__ unsigned stage() const { return step_ % STAGES; }
    __device__ uint32_t note(unsigned number) const { return base_ + NOTES_AT + number % NOTES * 16; }

    uint32_t base_;
    unsigned step_ = 0;
};

}  // namespace gemm
