// Rows of an FP8 cache on their way to products: values in fp16 and a power of two for each token.
//
// A token is 2^e, the exponent of its largest scale, times values that fp16 holds to 2^-12 and rotary ones in bf16.
// e4m3 is exact in fp16, so a value takes one conversion and one product.
#pragma once

#include "mla_arguments.cuh"
#include "mla_hopper.cuh"

namespace mla {

// Where a warp group reads rows of FP8: lane (r, q) of warp w has rows 16 w + r and 8 more of each tile.
struct Rows {
    const Arguments& a;
    const Span& span;
    int row, n, key0, next;  // `next`: where the tile to be found next lies
    const uint8_t* from = nullptr;
    bool there[2] = {};  // whether somebody sees the row; the others may hold anything

    __device__ __forceinline__ Rows(const Arguments& a, const Span& span, int row, int n)
        : a(a), span(span), row(row), n(n) {
        key0 = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        next = int(tile_row(a, row, span.low));
    }
    // Tile i, and the one after it on its way to the L2.
    __device__ __forceinline__ void find(int i) {
        from = static_cast<const uint8_t*>(a.cache) + int64_t(next + key0) * kFp8Row;
#pragma unroll
        for (int r = 0; r < 2; r++) there[r] = span.seen((span.low + i) * kPage + key0 + 8 * r);
        if (i + 1 == n) return;
        next = int(tile_row(a, row, span.low + i + 1));
        if (threadIdx.x % 128 == 0)
            fetch_bytes(static_cast<const uint8_t*>(a.cache) + int64_t(next) * kFp8Row, kPage * kFp8Row);
    }
    __device__ __forceinline__ uint4 at(int r, int offset) const {
        return there[r] ? *reinterpret_cast<const uint4*>(from + 8 * r * kFp8Row + offset) : uint4{0, 0, 0, 0};
    }
};

// Of a row's four scales: one over the power of two of the largest, and the scales times that, two by two.
__device__ __forceinline__ float divided(const uint4& scales, __half2 (&ratio)[2]) {
    const float4& s = reinterpret_cast<const float4&>(scales);
    uint32_t bits = __float_as_uint(fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w))) & 0x7F800000;
    bits = bits == 0 ? 0x3F800000 : max(bits, uint32_t(127 - 100) << 23);
    const float inverse = __uint_as_float(0x7F000000 - bits);
    ratio[0] = __floats2half2_rn(s.x * inverse, s.y * inverse);
    ratio[1] = __floats2half2_rn(s.z * inverse, s.w * inverse);
    return inverse;
}

// Eight rotary values times a power of two.
__device__ __forceinline__ uint4 scaled_rope(uint4 chunk, float factor) {
    __nv_bfloat162* two = reinterpret_cast<__nv_bfloat162*>(&chunk);
#pragma unroll
    for (int k = 0; k < 4; k++) two[k] = __hmul2(two[k], __float2bfloat162_rn(factor));
    return chunk;
}

// Of keys, eight by eight: 2^e and e.
using Tokens = float[kPage / 8][2][8];
__device__ __forceinline__ void store_token(Tokens& tokens, int key, float inverse) {
    const uint32_t bits = 0x7F000000 - __float_as_uint(inverse);
    tokens[key / 8][0][key % 8] = __uint_as_float(bits);
    tokens[key / 8][1][key % 8] = float(int(bits >> 23) - 127);
}

// Sixteen codes times `ratio`, as two chunks of fp16.
__device__ __forceinline__ void store_codes(uint8_t* tile, int row, int chunk, const uint4& codes, __half2 ratio) {
    const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t value[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t pair = i % 2 ? high_e4m3(word[i / 2]) : low_e4m3(word[i / 2]);
        const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(pair), ratio);
        value[i] = reinterpret_cast<const uint32_t&>(scaled);
    }
    *reinterpret_cast<uint4*>(tile + swizzled(row, chunk)) = {value[0], value[1], value[2], value[3]};
    *reinterpret_cast<uint4*>(tile + swizzled(row, chunk + 1)) = {value[4], value[5], value[6], value[7]};
}

}  // namespace mla
