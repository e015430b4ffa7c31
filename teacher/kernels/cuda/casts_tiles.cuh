// What the transposed casts share: the order of tiles, and their way to shared memory.

#pragma once

#include "casts_values.cuh"

namespace {

constexpr int SHIFT = 2;  // of a lane, to its group of 16 rows: 4 lanes' columns lie beside each other

// Division by what is known at the launch: an inverse rounded down, then one correction.
struct Divisor {
    unsigned by, inverse;
    static Divisor of(unsigned by) { return {by, by < 2 ? 0xffffffffu : static_cast<unsigned>((1ull << 32) / by)}; }
    __device__ unsigned divide(unsigned& x) const {  // the quotient; x becomes the remainder
        unsigned quotient = __umulhi(x, inverse);
        x -= quotient * by;
        if (x >= by) x -= by, ++quotient;
        return quotient;
    }
};

struct Place {
    int matrix, row, column;  // tiles
};

// Tiles in turn: `group` rows of tiles side by side before the next ones, so that what is written transposed and what
// is read both come to lie together.
struct Order {
    int R, C;
    unsigned down, across, tiles;
    Divisor matrix, rows, height, last;
    Order(int E, int R, int C, unsigned group) : R(R), C(C), down((R + 127) / 128), across((C + 127) / 128) {
        if (group > down) group = down;
        tiles = E * down * across;
        matrix = Divisor::of(down * across), rows = Divisor::of(group * across), height = Divisor::of(group);
        last = Divisor::of(down % group ? down % group : group);
    }
    __device__ Place place(unsigned tile) const {
        const unsigned m = matrix.divide(tile), first = rows.divide(tile) * height.by;
        const unsigned column = down - first < height.by ? last.divide(tile) : height.divide(tile);
        return {static_cast<int>(m), static_cast<int>(first + tile), static_cast<int>(column)};
    }
};

// 16 or 4 bytes on their way to shared memory, where after `arrived` the thread that asked for them finds them.
__device__ void fetch(uint8_t* to, const void* from) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}
__device__ void fetch(float* to, const float* from) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(from) : "memory");
}
__device__ void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace
