// What mla_decode.cu says in PTX: barriers, TMA and the warp-group products of Hopper.
//
// Sources: PTX ISA 8.x, "Asynchronous Warpgroup Level Matrix Instructions", "Tensors and TMA", "mbarrier".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace mla {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The thread's number in its group, read anew: registers are too few to keep it.
__device__ __forceinline__ int thread_of_group() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % 128;
}

// Barriers in shared memory, by their address. A phase ends when `count` threads have arrived and all bytes are there.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// The CTA's numbered barriers: among `threads` of which some only say that they have come by.
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Plain stores to shared memory before it, seen by products and TMA after it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// A box of the tensor map at (column, row), swizzled as the map says; its bytes are counted by the barrier.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
    constexpr uint64_t once = 0x12F0000000000000;  // the L2 may drop it first
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(once)
        : "memory");
}
// `bytes` of memory to the L2.
__device__ __forceinline__ void fetch_bytes(const void* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// `bytes` of memory as they lie.
__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The launch that comes next in the stream (and says so) may take the place of CTAs that end, and waits for all of this
// one's writes.
__device__ __forceinline__ void dependents_may_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Tiles of 64 rows x 64 values of 2 bytes lie as 64 rows of 128 bytes whose 16-byte chunks are exchanged by the row.
constexpr int kTileBytes = 64 * 128;
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Four matrices of 8 x 8 values as products leave them, each row to the address that a lane names: lane 8 i + r row r
// of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t* values) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(values[0]),
                 "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
}

// An operand whose contracted dimension lies along the rows (queries, keys, weights): 8 rows are 1024 bytes apart.
// The next 16 contracted values are 32 bytes further.
__device__ __forceinline__ uint64_t along_rows(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// One whose contracted dimension goes down the rows (keys as values): 8 rows are 1024 bytes, 64 columns a tile apart.
// The next 16 contracted values are 2048 bytes further.
__device__ __forceinline__ uint64_t down_rows(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(kTileBytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Nobody touches `values` before the products that write them are done, all but the latest PENDING groups.
template <int PENDING, int N>
__device__ __forceinline__ void products_wait(float (&values)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(values[i])::"memory");
}

#define MLA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MLA_16(d, i) MLA_4(d, i), MLA_4(d, i + 4), MLA_4(d, i + 8), MLA_4(d, i + 12)
#define MLA_32(d, i) MLA_16(d, i), MLA_16(d, i + 16)
#define MLA_128(d) MLA_32(d, 0), MLA_32(d, 32), MLA_32(d, 64), MLA_32(d, 96)
#define MLA_NAMES_32                                                                                              \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
    "%29,%30,%31}"
#define MLA_NAMES_128                                                                                              \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
    "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
    "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82," \
    "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107," \
    "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"

// score (64 x 64) += a (64 x 16) b (64 x 16)', or = where not `add`.
#define MLA_SCORE(TYPE)                                                                                           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE \
                 "." TYPE " " MLA_NAMES_32 ", %32, %33, add, 1, 1, 0, 0;\n}\n"                                    \
                 : MLA_32(score, 0)                                                                               \
                 : "l"(a), "l"(b), "r"(int(add)))
template <bool F16>
__device__ __forceinline__ void score_product(float (&score)[32], uint64_t a, uint64_t b, bool add) {
    if constexpr (F16) {
        MLA_SCORE("f16");
    } else {
        MLA_SCORE("bf16");
    }
}

// sum (64 x 256) += weight (64 x 16) value (16 x 256); weights from shared memory or registers.
#define MLA_VALUE_SHARED(TYPE)                                                                                   \
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE \
                 "." TYPE " " MLA_NAMES_128 ", %128, %129, add, 1, 1, 0, 1;\n}\n"                                \
                 : MLA_128(sum)                                                                                  \
                 : "l"(weight), "l"(value))
#define MLA_VALUE_REGISTERS(TYPE)                                                                                \
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE \
                 "." TYPE " " MLA_NAMES_128 ", {%128, %129, %130, %131}, %132, add, 1, 1, 1;\n}\n"               \
                 : MLA_128(sum)                                                                                  \
                 : "r"(weight[0]), "r"(weight[1]), "r"(weight[2]), "r"(weight[3]), "l"(value))
template <bool F16>
__device__ __forceinline__ void value_product(float (&sum)[128], uint64_t weight, uint64_t value) {
    if constexpr (F16) {
        MLA_VALUE_SHARED("f16");
    } else {
        MLA_VALUE_SHARED("bf16");
    }
}
template <bool F16>
__device__ __forceinline__ void value_product(float (&sum)[128], const uint32_t* weight, uint64_t value) {
    if constexpr (F16) {
        MLA_VALUE_REGISTERS("f16");
    } else {
        MLA_VALUE_REGISTERS("bf16");
    }
}

// c (16 x 8) += a (16 x 16) b (16 x 8), of a warp.
template <bool F16>
__device__ __forceinline__ void product_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (F16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two codes in the low or the high half of a word, as fp16.
__device__ __forceinline__ uint32_t low_e4m3(uint32_t codes) {
    uint32_t pair;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(pair) : "r"(codes));
    return pair;
}
__device__ __forceinline__ uint32_t high_e4m3(uint32_t codes) {
    uint32_t pair;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}"
        : "=r"(pair)
        : "r"(codes));
    return pair;
}

}  // namespace mla
