"""MLA decode on the device: attention of a few queries a sequence over its paged latents, and the merge of its parts.

What is computed, and the floors, is said in mla_decode.py, which launches these.

Shapes: B sequences, T new tokens each, H heads, M = T * H queries of a sequence (`m`), N keys of a tile, R rank (padded
to BLOCK_R), D rotary size (BLOCK_D), C columns, K scales of an FP8 row, S splits.
"""

import triton
import triton.language as tl


# What differs from launch to launch is not compiled for.
@triton.jit(do_not_specialize=["table_stride", "splits"])
def decode(
    q_latent, q_rope, latents, scales, ropes, table, position, first, out, out_lse,
    scale_log2, splits, tokens, heads, table_stride, ql_b, ql_t, ql_h, qr_b, qr_t, qr_h,
    RANK: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    FP8: tl.constexpr, FROM_FIRST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one sequence over one split of its keys.

    `latents`, `scales` and `ropes` are the one cache seen as values, fp32 and bf16; WIDTH is its row in values of
    `latents`. EXACT multiplies in fp32, for the interpreter, whose bf16 products are wrong.

    FP8: e4m3 is exact in fp16, and fp16 holds a value divided by its token's largest scale to 2^-12, far below what
    e4m3 rounded off. So a tile is one conversion and one product a value, and the token's scale is put into the scores
    and, through the running maximum, into the weights: none can overflow, whatever the scales are.
    """
    BLOCK_R: tl.constexpr = TILE * TILES
    SCALES: tl.constexpr = (RANK + 127) // 128
    row, split = tl.program_id(1), tl.program_id(2)
    m_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_M = m_M < tokens * heads
    token_M, head_M = m_M // heads, m_M % heads
    at_R, at_D = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    position_M = tl.load(position + row * tokens + token_M, mask=real_M, other=-1).to(tl.int32)
    begin = 0
    if FROM_FIRST:
        begin = tl.load(first + row).to(tl.int32)
    end = tl.max(position_M, 0) + 1

    q_MR = tl.load(
        q_latent + row.to(tl.int64) * ql_b + (token_M * ql_t + head_M * ql_h)[:, None] + at_R[None, :],
        mask=real_M[:, None] & (at_R < RANK)[None, :], other=0.0,
    )  # fmt: skip
    q_MD = tl.load(
        q_rope + row.to(tl.int64) * qr_b + (token_M * qr_t + head_M * qr_h)[:, None] + at_D[None, :],
        mask=real_M[:, None] & (at_D < ROPE)[None, :], other=0.0,
    )  # fmt: skip
    unit_M = tl.full([BLOCK_M], scale_log2, tl.float32)
    if FP8:  # into fp16's range, by a power of two of each query's own
        wide_MR = q_MR.to(tl.float32)
        largest_M = tl.maximum(tl.max(tl.abs(wide_MR), 1), 1e-30)
        power_M = (largest_M.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        q_MR = (wide_MR / power_M[:, None]).to(tl.float16)
        unit_M *= power_M
    if EXACT:
        q_MR, q_MD = q_MR.to(tl.float32), q_MD.to(tl.float32)

    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    sought_MR = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    from_tile = begin // BLOCK_N
    share = tl.cdiv(tl.cdiv(end, BLOCK_N) - from_tile, splits)
    low = from_tile + split * share
    high = tl.minimum(low + share, tl.cdiv(end, BLOCK_N))
    for tile in tl.range(low, high):
        n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen_N = _seen(n_N, begin, end, FROM_FIRST)
        place_N = _places(table + row * table_stride, tile, seen_N, PAGE, BLOCK_N)
        if FP8:
            k_NR, largest_N = _dequantized(latents, scales, place_N, seen_N, RANK, WIDTH, TILE, TILES, SCALES)
            rope_N = place_N * (WIDTH // 2) + RANK // 2 + 2 * SCALES
        else:
            k_NR = tl.load(
                latents + (place_N * WIDTH)[:, None] + at_R[None, :],
                mask=seen_N[:, None] & (at_R < RANK)[None, :], other=0.0,
            )  # fmt: skip
            rope_N = place_N * WIDTH + RANK
        k_ND = tl.load(
            ropes + rope_N[:, None] + at_D[None, :], mask=seen_N[:, None] & (at_D < ROPE)[None, :], other=0.0
        )
        if EXACT:
            k_NR, k_ND = k_NR.to(tl.float32), k_ND.to(tl.float32)

        score_MN = tl.dot(q_MR, tl.trans(k_NR), input_precision="ieee")
        if FP8:
            score_MN *= unit_M[:, None] * largest_N[None, :]
            score_MN += tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        else:
            score_MN = tl.dot(q_MD, tl.trans(k_ND), score_MN, input_precision="ieee") * scale_log2
        visible_MN = seen_N[None, :] & (n_N[None, :] <= position_M[:, None])
        score_MN = tl.where(visible_MN, score_MN, float("-inf"))
        if FP8:  # the weights carry the scales, see above
            score_MN += tl.log2(largest_N)[None, :]
        new_top_M = tl.maximum(top_M, tl.max(score_MN, 1))
        safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        weight_MN = tl.exp2(score_MN - safe_M[:, None])
        fade_M = tl.exp2(top_M - safe_M)
        if FP8:
            sum_M = sum_M * fade_M + tl.sum(weight_MN / largest_N[None, :], 1)
        else:
            sum_M = sum_M * fade_M + tl.sum(weight_MN, 1)
        sought_MR = tl.dot(weight_MN.to(k_NR.dtype), k_NR, sought_MR * fade_M[:, None], input_precision="ieee")
        top_M = new_top_M

    part_M = row.to(tl.int64) * (splits * tokens * heads) + split * (tokens * heads) + m_M
    inverse_M = 1.0 / tl.where(sum_M == 0.0, 1.0, sum_M)
    if SPLIT:
        tl.store(out_lse + part_M, top_M + tl.log2(sum_M), mask=real_M)
    if not SPLIT or high > low:  # the merge does not read an empty split's part
        tl.store(
            out + part_M[:, None] * RANK + at_R[None, :], (sought_MR * inverse_M[:, None]).to(out.dtype.element_ty),
            mask=real_M[:, None] & (at_R < RANK)[None, :],
        )  # fmt: skip


@triton.jit
def _seen(n_N, begin, end, FROM_FIRST: tl.constexpr):
    """Which keys some query may see. The others may hold anything, NaN too: they are not loaded."""
    if FROM_FIRST:
        return (n_N < end) & (n_N >= begin)
    return n_N < end


@triton.jit
def _places(table_P, tile, seen_N, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of the cache that a tile's keys lie in."""
    if PAGE >= BLOCK_N:
        page = tl.load(table_P + tile * BLOCK_N // PAGE)
        return page.to(tl.int64) * PAGE + tile * BLOCK_N % PAGE + tl.arange(0, BLOCK_N)
    n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    page_N = tl.load(table_P + n_N // PAGE, mask=seen_N, other=0)
    # By `&`: of `%` Triton 3.6 concludes that rows of 68 bytes lie at 16, and loads them so.
    return page_N.to(tl.int64) * PAGE + (n_N & (PAGE - 1))


@triton.jit
def _dequantized(
    latents, scales, place_N, seen_N,
    RANK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """A tile of latents (N, R) in fp16, each divided by its token's largest scale (N,), and these."""
    at_K = tl.arange(0, TILES)
    at_KT = at_K[:, None] * TILE + tl.arange(0, TILE)[None, :]
    codes_NKT = tl.load(
        latents + (place_N * WIDTH)[:, None, None] + at_KT[None, :, :],
        mask=seen_N[:, None, None] & (at_KT < RANK)[None, :, :], other=0.0,
    )  # fmt: skip
    scale_NK = tl.load(
        scales + (place_N * (WIDTH // 4) + RANK // 4)[:, None] + at_K[None, :],
        mask=seen_N[:, None] & (at_K < SCALES)[None, :], other=0.0,
    )  # fmt: skip
    largest_N = tl.max(scale_NK, 1)
    largest_N = tl.where(largest_N == 0.0, 1.0, largest_N)
    ratio_NK = (scale_NK / largest_N[:, None]).to(tl.float16)
    scaled_NKT = codes_NKT.to(tl.float16) * ratio_NK[:, :, None]
    return tl.reshape(scaled_NKT, [codes_NKT.shape[0], TILE * TILES]), largest_N


@triton.jit(do_not_specialize=["splits"])
def merge(parts, lse, out, rows, splits, RANK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program: BLOCK_C columns of one query, its splits weighted by their shares of the softmax's sum."""
    m, at_S = tl.program_id(0), tl.arange(0, BLOCK_S)
    at_C = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1).to(tl.int64) * (splits * rows) + m
    lse_S = tl.load(lse + first + at_S * rows, mask=at_S < splits, other=float("-inf"))
    top = tl.max(lse_S, 0)
    weight_S = tl.exp2(lse_S - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight_S, 0)
    weight_S = weight_S / tl.where(total == 0.0, 1.0, total)
    part_SC = tl.load(
        parts + (first + at_S * rows)[:, None] * RANK + at_C[None, :],
        mask=(lse_S > float("-inf"))[:, None] & (at_C < RANK)[None, :], other=0.0,
    )  # fmt: skip
    merged_C = tl.sum(part_SC * weight_S[:, None], 0)
    to = (tl.program_id(1).to(tl.int64) * rows + m) * RANK
    tl.store(out + to + at_C, merged_C.to(out.dtype.element_ty), mask=at_C < RANK)
