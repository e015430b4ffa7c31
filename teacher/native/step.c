// One step of the model over cached sequences on a CPU in float32: the whole of `TorchRunner.forward` and `.draft` in two
// calls, so that no time goes to launching operators (at batch 1 they take most of it) and attention reads the pages
// where they lie. Compiled on the machine it runs on, for the sizes of one model: they are macros, so that every loop
// over them has a constant length. The large products are torch's own BLAS, whose `sgemm` is handed in.
//
// Matrices are row-major, (in, out). Attention is in the absorbed form with weights multiplied out beforehand: `query`
// maps to each head's R latent and D rotary values, `out` maps each head's attended latent to the hidden state.
// Rotary pairs are first half with second half; the weights are ordered so. See pack.py for the packing.
//
// HIDDEN, VOCAB, HEADS, RANK (R), ROPE (D), QRANK (0: queries come straight from the hidden state), EXPERTS, TOP_K,
// GROUPS, TOP_GROUPS, INNER (of a routed expert), PAGE (tokens a page); LATENT = R + D.

#include <string.h>

#include "maths.h"
#include "step.h"

#define LATENT (RANK + ROPE)
#define DOWN (QRANK + LATENT)
#define HALF (ROPE / 2)
#define WIDE (HEADS * LATENT)

static void product(const Model *model, int rows, int inner, int outer, const float *x, const float *weight, float *out,
                    float beta) {
    const float one = 1.0f;
    model->sgemm("N", "N", &outer, &rows, &inner, &one, weight, &outer, x, &inner, &beta, out, &outer);
}

static inline void normalise(const float *x, const float *weight, int size, float eps, float *out) {
    float sum = 0.0f;
    SIMD_SUM(sum) for (int i = 0; i < size; i++) sum += x[i] * x[i];
    const float factor = 1.0f / sqrtf(sum / (float)size + eps);
    SIMD for (int i = 0; i < size; i++) out[i] = x[i] * factor * weight[i];
}

static inline void rotate(float *x, const float *cosine, const float *sine) {
    SIMD for (int i = 0; i < HALF; i++) {
        const float first = x[i], second = x[HALF + i];
        x[i] = first * cosine[i] - second * sine[i];
        x[HALF + i] = second * cosine[i] + first * sine[i];
    }
}

// Heads whose attended latents are summed up together: as many as fit into half of the vector registers.
#if HEADS % 8 == 0 && 8 * RANK <= 256
#define BLOCK 8
#elif HEADS % 4 == 0 && 4 * RANK <= 256
#define BLOCK 4
#elif HEADS % 2 == 0 && 2 * RANK <= 256
#define BLOCK 2
#else
#define BLOCK 1
#endif

// Products of each head's query with each key of a page; head h's go to scores + h * stride. Meanwhile the page `ahead` is
// fetched, a line at a time: all at once would have to wait for one another.
#if defined(__AVX512F__) && !defined(__clang__) && LATENT % 16 == 0 && PAGE % 16 == 0
typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef int32_t Lanes __attribute__((vector_size(64)));

// Sums of neighbouring lanes of a, then of b: four such levels turn sixteen vectors into the vector of their sums.
static inline Vector pairs(Vector a, Vector b) {
    const Lanes even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

static void score(const float *keys, const float *query, int64_t stride, float *scores, const float *ahead) {
    for (int h = 0; h < HEADS; h++)
        for (int t = 0; t < PAGE; t += 16) {
            const Vector *q = (const Vector *)(query + h * LATENT), *k = (const Vector *)(keys + t * LATENT);
            Vector sums[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) {
                const int line = (h * PAGE + t + j) * 16;
                if (line < PAGE * LATENT) __builtin_prefetch(ahead + line);
                sums[j] = q[0] * k[j * (LATENT / 16)];
                for (int i = 1; i < LATENT / 16; i++) sums[j] += q[i] * k[j * (LATENT / 16) + i];
            }
#pragma GCC unroll 4
            for (int left = 8; left > 0; left /= 2)
#pragma GCC unroll 8
                for (int j = 0; j < left; j++) sums[j] = pairs(sums[2 * j], sums[2 * j + 1]);
            *(Vector *)(scores + h * stride + t) = sums[0];
        }
}
#else
static void score(const float *keys, const float *query, int64_t stride, float *scores, const float *ahead) {
    for (int t = 0; t < PAGE; t++)
        for (int h = 0; h < HEADS; h++) {
            float sum = 0.0f;
            SIMD_SUM(sum) for (int i = 0; i < LATENT; i++) sum += query[h * LATENT + i] * keys[t * LATENT + i];
            scores[h * stride + t] = sum;
            if ((t * HEADS + h) * 16 < PAGE * LATENT) __builtin_prefetch(ahead + (t * HEADS + h) * 16);
        }
}
#endif

// Softmax attention of one token's heads over positions first..end-1; all heads read the same cache entry.
static void attend(const Model *model, const float *cache, const int32_t *pages, int64_t first, int64_t end,
                   const float *query, float *scores, float *out) {
    // Scores lie in rows of whole pages, so that `score` may fill a page at a time; what is not to be seen is left out.
    const int64_t skipped = first / PAGE, used = (end + PAGE - 1) / PAGE, width = (used - skipped) * PAGE;
    for (int64_t page = skipped; page < used; page++) {
        // Pages lie anywhere in memory, and a batch's are more than the near caches hold: ask for one early.
        const int64_t ahead = page + 2 < used ? page + 2 : used - 1;
        score(cache + (int64_t)pages[page] * PAGE * LATENT, query, width, scores + (page - skipped) * PAGE,
              cache + (int64_t)pages[ahead] * PAGE * LATENT);
    }
    const int64_t from = first - skipped * PAGE, to = end - skipped * PAGE;
    float factor[HEADS];
    for (int h = 0; h < HEADS; h++) {
        float sum = 0.0f, most = -INFINITY, *s = scores + h * width;
        PRAGMA(omp simd reduction(max : most)) for (int64_t t = from; t < to; t++) most = s[t] > most ? s[t] : most;
        SIMD_SUM(sum) for (int64_t t = from; t < to; t++) {
            s[t] = exponential((s[t] - most) * model->scale);
            sum += s[t];
        }
        factor[h] = 1.0f / sum;
    }
    for (int block = 0; block < HEADS; block += BLOCK) {
        float sums[BLOCK][RANK] = {{0}};
        for (int64_t t = from; t < to; t++) {
            const float *value = cache + ((int64_t)pages[skipped + t / PAGE] * PAGE + t % PAGE) * LATENT;
            for (int h = 0; h < BLOCK; h++) {
                const float share = scores[(block + h) * width + t];
                SIMD for (int i = 0; i < RANK; i++) sums[h][i] += share * value[i];
            }
        }
        for (int h = 0; h < BLOCK; h++)
            SIMD for (int i = 0; i < RANK; i++) out[(block + h) * RANK + i] = sums[h][i] * factor[block + h];
    }
}

// x += attention(normed); `first` (or null) is the first position that each token may see.
static void attention(const Model *model, const Layer *layer, float *cache, const Step *step, const int64_t *first,
                      float *x, float *normed, float *a, float *b, float *scores) {
    const int64_t n = step->count;
    float *down = a, *latent = a + n * DOWN, *query = b, *attended = b + n * WIDE;
    for (int64_t i = 0; i < n; i++) normalise(x + i * HIDDEN, layer->input_norm, HIDDEN, model->eps, normed + i * HIDDEN);
    product(model, (int)n, HIDDEN, DOWN, normed, layer->down, down, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        float *row = down + i * DOWN;
        if (layer->down_bias) SIMD for (int j = 0; j < DOWN; j++) row[j] += layer->down_bias[j];
        if (QRANK) normalise(row, layer->q_norm, QRANK, 1e-6f, latent + i * QRANK);
        const int64_t position = step->positions[i];
        const int32_t page = step->table[step->slots[i] * step->table_width + position / PAGE];
        float *entry = cache + ((int64_t)page * PAGE + position % PAGE) * LATENT;
        normalise(row + QRANK, layer->kv_norm, RANK, 1e-6f, entry);
        memcpy(entry + RANK, row + QRANK + RANK, ROPE * sizeof(float));
        rotate(entry + RANK, model->cosine + position * HALF, model->sine + position * HALF);
    }
    product(model, (int)n, QRANK ? QRANK : HIDDEN, WIDE, QRANK ? latent : normed, layer->query, query, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        const int64_t position = step->positions[i];
        float *row = query + i * WIDE;
        for (int h = 0; h < HEADS; h++)
            rotate(row + h * LATENT + RANK, model->cosine + position * HALF, model->sine + position * HALF);
        attend(model, cache, step->table + step->slots[i] * step->table_width, first ? first[i] : 0, position + 1, row,
               scores, attended + i * HEADS * RANK);
    }
    product(model, (int)n, HEADS * RANK, HIDDEN, attended, layer->out, x, 1.0f);
    if (layer->out_bias)
        for (int64_t i = 0; i < n; i++) SIMD for (int j = 0; j < HIDDEN; j++) x[i * HIDDEN + j] += layer->out_bias[j];
}

// (rows, 2 * inner) of gate and up -> silu(gate) * up, in place at the front of each row's place in `out`.
static void swiglu(int64_t rows, int64_t inner, const float *gate_up, float *out) {
    for (int64_t i = 0; i < rows; i++) {
        const float *gate = gate_up + i * 2 * inner, *up = gate + inner;
        SIMD for (int64_t j = 0; j < inner; j++) out[i * inner + j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
    }
}

#if EXPERTS
// The TOP_K best experts by score plus bias among the TOP_GROUPS best groups, and their weights (V3 eq. 12-16).
static void route(const Model *model, const float *logits, const float *bias, int32_t *chosen, float *weights) {
    float score[EXPERTS], biased[EXPERTS];
    SIMD for (int e = 0; e < EXPERTS; e++) {
        score[e] = 1.0f / (1.0f + exponential(-logits[e]));
        biased[e] = score[e] + bias[e];
    }
    if (TOP_GROUPS < GROUPS) {
        enum { SIZE = EXPERTS / GROUPS };
        float group[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            float best = -INFINITY, second = -INFINITY;
            for (int e = g * SIZE; e < (g + 1) * SIZE; e++) {
                if (biased[e] > best) second = best, best = biased[e];
                else if (biased[e] > second) second = biased[e];
            }
            group[g] = best + second;
        }
        int kept[GROUPS] = {0};
        for (int n = 0; n < TOP_GROUPS; n++) {
            int best = -1;
            for (int g = 0; g < GROUPS; g++)
                if (!kept[g] && (best < 0 || group[g] > group[best])) best = g;
            kept[best] = 1;
        }
        for (int g = 0; g < GROUPS; g++)
            if (!kept[g]) for (int e = g * SIZE; e < (g + 1) * SIZE; e++) biased[e] = -INFINITY;
    }
    float sum = 0.0f;
    for (int k = 0; k < TOP_K; k++) {
        int best = 0;
        for (int e = 1; e < EXPERTS; e++) if (biased[e] > biased[best]) best = e;
        chosen[k] = best;
        weights[k] = score[best];
        sum += score[best];
        biased[best] = -INFINITY;
    }
    const float factor = model->routed_scale / (model->norm_topk ? sum + 1e-20f : 1.0f);
    for (int k = 0; k < TOP_K; k++) weights[k] *= factor;
}

// x += the routed experts of each token: rows sorted by expert, two products an expert that has any.
static void experts(const Model *model, const Layer *layer, int64_t n, float *x, const float *normed, float *a, float *b) {
    float *rows = a, *results = a + n * TOP_K * HIDDEN, *weights = results + n * TOP_K * HIDDEN;
    int32_t *chosen = (int32_t *)(weights + n * TOP_K);
    int32_t *place = chosen + n * TOP_K;
    product(model, (int)n, HIDDEN, EXPERTS, normed, layer->gate, b, 0.0f);
    int64_t end[EXPERTS] = {0}, next[EXPERTS];
    for (int64_t i = 0; i < n; i++) {
        route(model, b + i * EXPERTS, layer->gate_bias, chosen + i * TOP_K, weights + i * TOP_K);
        for (int k = 0; k < TOP_K; k++) end[chosen[i * TOP_K + k]]++;
    }
    for (int e = 0, before = 0; e < EXPERTS; e++) next[e] = before, before += (int)end[e], end[e] = before;
    for (int64_t i = 0; i < n * TOP_K; i++) {
        place[i] = (int32_t)next[chosen[i]]++;
        memcpy(rows + (int64_t)place[i] * HIDDEN, normed + i / TOP_K * HIDDEN, HIDDEN * sizeof(float));
    }
    float *gate_up = b, *inner = b + n * TOP_K * 2 * INNER;
    for (int64_t e = 0, first = 0; e < EXPERTS; first = end[e], e++) {
        const int count = (int)(end[e] - first);
        if (count == 0) continue;
        product(model, count, HIDDEN, 2 * INNER, rows + first * HIDDEN, layer->expert_up + e * HIDDEN * 2 * INNER,
                gate_up, 0.0f);
        swiglu(count, INNER, gate_up, inner);
        product(model, count, INNER, HIDDEN, inner, layer->expert_down + e * INNER * HIDDEN, results + first * HIDDEN, 0.0f);
    }
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < TOP_K; k++) {
            const float weight = weights[i * TOP_K + k];
            const float *result = results + (int64_t)place[i * TOP_K + k] * HIDDEN;
            SIMD for (int j = 0; j < HIDDEN; j++) x[i * HIDDEN + j] += weight * result[j];
        }
}
#endif

static void run_layer(const Model *model, const Layer *layer, float *cache, const Step *step, const int64_t *first,
                      float *x, float *work) {
    const int64_t n = step->count;
    // `a` and `b` are each large enough for whatever of one half of the layer lives in them; see workspace().
    float *normed = work, *scores = normed + n * HIDDEN, *a = scores + HEADS * (step->longest + 2 * PAGE);
    const int64_t half = n * (int64_t)(TOP_K * (2 * HIDDEN + 3) + DOWN + QRANK);
    float *b = a + half;
    attention(model, layer, cache, step, first, x, normed, a, b, scores);
    for (int64_t i = 0; i < n; i++) normalise(x + i * HIDDEN, layer->post_norm, HIDDEN, model->eps, normed + i * HIDDEN);
    if (layer->up) {
        product(model, (int)n, HIDDEN, (int)(2 * layer->inner), normed, layer->up, b, 0.0f);
        float *inner = b + n * 2 * layer->inner;
        swiglu(n, layer->inner, b, inner);
        product(model, (int)n, (int)layer->inner, HIDDEN, inner, layer->down_proj, x, 1.0f);
    }
#if EXPERTS
    if (layer->gate) experts(model, layer, n, x, normed, a, b);
#endif
}

// Floats that `forward` and `draft` need for so many new tokens.
int64_t workspace(const Model *model, int64_t count, int64_t longest) {
    const int64_t a = TOP_K * (2 * HIDDEN + 3) + DOWN + QRANK;
    const int64_t routed = TOP_K * 3 * INNER + EXPERTS, dense = 3 * model->widest, heads = WIDE + HEADS * RANK;
    const int64_t b = routed > dense ? (routed > heads ? routed : heads) : (dense > heads ? dense : heads);
    return count * (4 * HIDDEN + a + b) + HEADS * (longest + 2 * PAGE);
}

static void logits_of(const Model *model, int64_t wanted, const int64_t *which, const float *hidden, const float *norm,
                      float *rows, float *logits) {
    if (wanted == 0) return;
    for (int64_t i = 0; i < wanted; i++) {
        if (norm) normalise(hidden + which[i] * HIDDEN, norm, HIDDEN, model->eps, rows + i * HIDDEN);
        else memcpy(rows + i * HIDDEN, hidden + which[i] * HIDDEN, HIDDEN * sizeof(float));
    }
    product(model, (int)wanted, HIDDEN, VOCAB, rows, model->head, logits, 0.0f);
}

// Hidden states (count, HIDDEN) after the final norm, and the logits (wanted, VOCAB) of the tokens `which`.
void forward(const Model *model, const Step *step, int64_t wanted, const int64_t *which, float *work, float *hidden,
             float *logits) {
    const int64_t n = step->count;
    float *x = work, *rest = work + n * HIDDEN;
    for (int64_t i = 0; i < n; i++)
        memcpy(x + i * HIDDEN, model->embed + (int64_t)step->tokens[i] * HIDDEN, HIDDEN * sizeof(float));
    for (int64_t l = 0; l < model->depth; l++)
        run_layer(model, model->layers + l, model->cache + l * model->layer_stride, step, 0, x, rest);
    for (int64_t i = 0; i < n; i++) normalise(x + i * HIDDEN, model->norm, HIDDEN, model->eps, hidden + i * HIDDEN);
    logits_of(model, wanted, which, hidden, 0, rest, logits);
}

// The draft module: `tokens` are those after the positions whose hidden states are `before`; its output goes to `hidden`.
void draft(const Model *model, const Step *step, const float *before, const int64_t *first, int64_t wanted,
           const int64_t *which, float *work, float *hidden, float *logits) {
    const int64_t n = step->count;
    const Layer *layer = model->layers + model->depth;
    float *joined = work, *rest = work + 2 * n * HIDDEN;
    for (int64_t i = 0; i < n; i++) {
        float *row = joined + i * 2 * HIDDEN;
        normalise(model->embed + (int64_t)step->tokens[i] * HIDDEN, layer->enorm, HIDDEN, model->eps, row);
        normalise(before + i * HIDDEN, layer->hnorm, HIDDEN, model->eps, row + HIDDEN);
    }
    product(model, (int)n, 2 * HIDDEN, HIDDEN, joined, layer->joint, hidden, 0.0f);
    run_layer(model, layer, model->cache + model->depth * model->layer_stride, step, first, hidden, rest);
    logits_of(model, wanted, which, hidden, layer->head_norm, rest, logits);
}
