// What the casts share: how values are read, a block's scale and the division by it, codes, maxima over threads.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace {

constexpr unsigned ALL = 0xffffffffu;

// 16 bytes of a type: `larger` keeps the largest magnitudes place by place, as integers, which order the same and keep
// NaN; `value` and `bits` give one of them, the latter of a magnitude and as fp32's bits.
template <typename T>
struct Lane;

template <>
struct Lane<__nv_bfloat16> {
    static constexpr int COLS = 8;
    static __device__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b & 0x7fff7fffu); }
    static __device__ uint32_t bits(const uint32_t* w, int j) {
        return j & 1 ? w[j / 2] & 0xffff0000u : w[j / 2] << 16;
    }
    static __device__ float value(const uint32_t* w, int j) { return __uint_as_float(bits(w, j)); }
};

template <>
struct Lane<__half> {
    static constexpr int COLS = 8;
    static __device__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b & 0x7fff7fffu); }
    static __device__ float value(const uint32_t* w, int j) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(w[j / 2] >> (j & 1) * 16)));
    }
    static __device__ uint32_t bits(const uint32_t* w, int j) { return __float_as_uint(value(w, j)); }
};

template <>
struct Lane<float> {
    static constexpr int COLS = 4;
    static __device__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b & 0x7fffffffu); }
    static __device__ uint32_t bits(const uint32_t* w, int j) { return w[j]; }
    static __device__ float value(const uint32_t* w, int j) { return __uint_as_float(w[j]); }
};

// The largest of a lane's four words.
template <typename L>
__device__ uint32_t largest_of(const uint32_t (&v)[4]) {
    const uint32_t a = L::larger(L::larger(L::larger(L::larger(0, v[0]), v[1]), v[2]), v[3]);
    return L::COLS == 8 ? max(L::bits(&a, 0), L::bits(&a, 1)) : a;
}

// 16 or 8 bytes, or zeros. 16 go through the L1, though nothing is read twice: `L1::no_allocate` costs them 4%.
__device__ void load(uint32_t (&to)[4], const void* from, bool really) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3]) : "l"(from), "r"(static_cast<int>(really)));
}
__device__ void load(uint32_t (&to)[2], const void* from, bool really) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %3, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\n"
        "@p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];}"
        : "=&r"(to[0]), "=&r"(to[1]) : "l"(from), "r"(static_cast<int>(really)));
}

// 16 bytes or zeros on their way to shared memory, where the thread that asked for them finds them after `arrived`.
__device__ void fetch(uint4* to, const void* from, bool really) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(really ? 16 : 0)
                 : "memory");
}
__device__ void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A block's scale, and how values are divided by it: times `lift` first where it is not 1, then by `a` and `b`.
struct Scale {
    float scale, lift, a, b;
};

// As `block_scale` of quantize.py. `lift` is for scales so small or large that a remainder would leave fp32's range.
// A scale of infinity divides to zeros, and infinities to NaN, by an inverse of 0.
template <typename T>
__device__ Scale scale_of(uint32_t amax_bits, bool power_of_two) {
    const float amax = __uint_as_float(amax_bits);
    const float inverse = 1.0f / 448.0f;
    float scale = amax * inverse;
    scale = fmaf(-fmaf(scale, 448.0f, -amax), inverse, scale);
    scale = scale < 0x1p-126f ? 0x1p-126f : scale;
    if (power_of_two) scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
    if (amax_bits >= 0x7f800000u) scale = amax;
    if (amax_bits == 0) scale = 1.0f;
    if (amax_bits == 0x7f800000u) return {scale, 1.0f, 0.0f, 0.0f};
    const float lift = scale < 0x1p-90f ? 0x1p64f : scale > 0x1p90f ? 0x1p-64f : 1.0f, divisor = scale * lift;
    if constexpr (sizeof(T) == 4) return {scale, lift, __frcp_rn(divisor), divisor};
    float a;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(a) : "f"(divisor));
    float rest = fmaf(-divisor, a, 1.0f);
    if (rest < 0.0f) {  // rounded up: one less, so that the rest adds to a zero of either sign what has its sign
        a = __uint_as_float(__float_as_uint(a) - 1);
        rest = fmaf(-divisor, a, 1.0f);
    }
    return {scale, lift, a, rest * a};
}

// x / scale to e4m3's last digit. fp32: rounded once, by Markstein (b is the divisor; the signs keep that of a zero).
// Of 16 bits: by an inverse in two parts, which for every pair of significands gives the same codes (test_quantize.py).
template <typename T, bool LIFTED>
__device__ float quotient(float x, float a, float b, float lift) {
    if (LIFTED) x *= lift;
    if constexpr (sizeof(T) == 4) {
        const float q = x * a;
        return fmaf(-fmaf(q, b, -x), a, q);
    } else {
        return fmaf(x, a, x * b);
    }
}

// Four codes, the first lowest; beyond 448 they saturate.
__device__ uint32_t codes(float a, float b, float c, float d) {
    uint32_t packed;
    asm("{.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};}"
        : "=r"(packed) : "f"(a), "f"(b), "f"(c), "f"(d));
    return packed;
}

// The codes of a lane's values, beside each other.
template <typename T, bool LIFTED>
__device__ void encode(uint32_t (&word)[Lane<T>::COLS / 4], const uint32_t (&v)[4], float a, float b, float lift) {
    auto one = [&](int j) { return quotient<T, LIFTED>(Lane<T>::value(v, j), a, b, lift); };
#pragma unroll
    for (int j = 0; j < Lane<T>::COLS; j += 4) word[j / 4] = codes(one(j), one(j + 1), one(j + 2), one(j + 3));
}

// Four rows' codes of column j.
template <typename T, bool LIFTED>
__device__ uint32_t encode_down(const uint32_t (*v)[4], int j, float a, float b, float lift) {
    auto one = [&](int i) { return quotient<T, LIFTED>(Lane<T>::value(v[i], j), a, b, lift); };
    return codes(one(0), one(1), one(2), one(3));
}

// 4 x 4 bytes transposed.
__device__ void turn(uint32_t (&to)[4], uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t ab = __byte_perm(a, b, 0x5140), ab2 = __byte_perm(a, b, 0x7362);  // a0 b0 a1 b1, a2 b2 a3 b3
    const uint32_t cd = __byte_perm(c, d, 0x5140), cd2 = __byte_perm(c, d, 0x7362);
    to[0] = __byte_perm(ab, cd, 0x5410);
    to[1] = __byte_perm(ab, cd, 0x7632);
    to[2] = __byte_perm(ab2, cd2, 0x5410);
    to[3] = __byte_perm(ab2, cd2, 0x7632);
}

// Codes j and j + 1, in fp32.
__device__ float2 decode(const uint32_t* v, int j) {
    uint32_t halves;
    const uint16_t two = static_cast<uint16_t>(v[j / 4] >> j % 4 * 8);
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
    return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

__device__ void put(uint8_t* to, const uint32_t (&word)[1]) { *reinterpret_cast<uint32_t*>(to) = word[0]; }
__device__ void put(uint8_t* to, const uint32_t (&word)[2]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
}
__device__ void put(uint8_t* to, const uint32_t (&word)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

// Two lanes that differ in the bit BIT halve 2 HALF maxima among them: the upper one keeps the upper half.
template <int HALF, int BIT, int N>
__device__ void halve_max(uint32_t (&m)[N], int lane) {
    const bool upper = lane & BIT;
#pragma unroll
    for (int j = 0; j < HALF; ++j) {
        const uint32_t kept = upper ? m[j + HALF] : m[j], sent = upper ? m[j] : m[j + HALF];
        m[j] = max(kept, __shfl_xor_sync(ALL, sent, BIT));
    }
}

// Maxima of N values over the lanes that differ in bits from SHIFT on: a lane is left with value `lane >> SHIFT` mod N.
template <int N, int SHIFT>
__device__ uint32_t spread_max(uint32_t (&m)[N], int lane) {
    if constexpr (N >= 8) halve_max<4, 4 << SHIFT>(m, lane);
    if constexpr (N >= 4) halve_max<2, 2 << SHIFT>(m, lane);
    if constexpr (N >= 2) halve_max<1, 1 << SHIFT>(m, lane);
    return m[0];
}

// The largest of a block of threads; all get it. Once a kernel.
template <int WARPS>
__device__ uint32_t block_max(uint32_t mine) {
    __shared__ uint32_t of_warp[WARPS];
    mine = __reduce_max_sync(ALL, mine);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; ++w) mine = max(mine, of_warp[w]);
    return mine;
}

struct Place {
    int matrix, row, column;  // tiles
};

// Tiles in turn: `group` rows of tiles side by side before the next ones, so that what is written transposed and what
// is read both come to lie together.
__device__ Place place_of(unsigned tile, unsigned down, unsigned across, unsigned group) {
    const unsigned matrix = tile / (down * across), local = tile - matrix * down * across;
    const unsigned first = local / (group * across) * group, height = min(down - first, group);
    const unsigned within = local - first * across;
    return {static_cast<int>(matrix), static_cast<int>(first + within % height), static_cast<int>(within / height)};
}

}  // namespace
