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

// 16 bytes, or zeros. They go through the L1, though nothing is read twice: `L1::no_allocate` costs 4%.
__device__ void load(uint32_t (&to)[4], const void* from, bool really) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3]) : "l"(from), "r"(static_cast<int>(really)));
}

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
template <typename T, bool LIFTED, int WORDS>
__device__ uint32_t encode_down(const uint32_t (*v)[WORDS], int j, float a, float b, float lift) {
    auto one = [&](int i) { return quotient<T, LIFTED>(Lane<T>::value(v[i], j), a, b, lift); };
    return codes(one(0), one(1), one(2), one(3));
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

// The larger of a magnitude and |f|; NaN stays.
__device__ float larger(float a, float f) {
    float out;
    asm("{.reg .f32 t;\nabs.f32 t, %2;\nmax.NaN.f32 %0, %1, t;}" : "=f"(out) : "f"(a), "f"(f));
    return out;
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

}  // namespace
