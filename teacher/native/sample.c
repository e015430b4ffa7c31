// `teacher.sampling.sample` for a CPU: the same definition, without sorting more of a row than the draw needs.

#include <stdint.h>
#include <stdlib.h>

#include "maths.h"
#include "step.h"

static uint64_t mix(uint64_t x) {  // splitmix64's finaliser
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static double uniform(int64_t seed, int64_t counter) {
    const uint64_t mixed = mix((uint64_t)seed) ^ ((uint64_t)counter * 0x9E3779B97F4A7C15u);
    return (double)(mix(mixed) >> 11) * 0x1p-53;
}

typedef struct { float share; int32_t token; } Candidate;

static int descending(const void *left, const void *right) {
    const Candidate *a = left, *b = right;
    if (a->share != b->share) return a->share < b->share ? 1 : -1;
    return a->token < b->token ? -1 : 1;
}

static int64_t largest(const float *x, int64_t size) {
    int64_t best = 0;
    float top = x[0];
    PRAGMA(omp simd reduction(max : top)) for (int64_t i = 1; i < size; i++) top = x[i] > top ? x[i] : top;
    while (best < size - 1 && x[best] != top) best++;  // a row of NaN has no largest
    return best;
}

enum { EXTRACTED = 32 };  // candidates taken one by one before the row is sorted whole

// The next token of one row, the `counter`-th of its request. `work` holds 3 * vocab floats: shares, and room to sort.
int64_t draw(const float *logits, int64_t vocab, float temperature, float top_p, int64_t top_k, float min_p,
             int64_t seed, int64_t counter, float *work) {
    float *shares = work;
    Candidate *order = (Candidate *)(work + vocab);
    const int64_t best = largest(logits, vocab);
    if (!(temperature > 0)) return best;
    const double u = uniform(seed, counter);
    const float scale = 1.0f / (temperature < 1e-6f ? 1e-6f : temperature), top = logits[best];
    float sum = 0.0f;
    SIMD_SUM(sum) for (int64_t i = 0; i < vocab; i++) {
        shares[i] = exponential((logits[i] - top) * scale);
        sum += shares[i];
    }
    if (!(sum > 0.0f && sum < INFINITY)) return best;  // logits that are no numbers: nothing can be drawn from them
    const float factor = 1.0f / sum, least = min_p * factor;
    for (int64_t i = 0; i < vocab; i++) shares[i] *= factor;
    const int64_t most = top_k > 0 && top_k < vocab ? top_k : vocab;
    const int limited = top_k > 0 || min_p > 0;

    // Candidates by descending share, as many as top-k and min-p leave; without these, as many as the draw needs.
    int64_t count = 0;
    for (double before = 0.0; count < most; count++) {
        if (!limited && count && (before >= top_p || (top_p >= 1.0f && before > u))) break;
        if (count < EXTRACTED) {
            const int64_t token = largest(shares, vocab);
            order[count] = (Candidate){shares[token], (int32_t)token};
            shares[token] = -1.0f;
        } else if (count == EXTRACTED) {
            int64_t rest = count;
            for (int64_t i = 0; i < vocab; i++)
                if (shares[i] >= 0.0f) order[rest++] = (Candidate){shares[i], (int32_t)i};
            qsort(order + count, (size_t)(vocab - count), sizeof(Candidate), descending);
        }
        if (count && order[count].share < least) break;
        before += order[count].share;
    }
    // top-p counts shares of what the other limits left, which without them is 1.
    double left = limited ? 0.0 : 1.0, total = 0.0, before = 0.0;
    if (limited) for (int64_t i = 0; i < count; i++) left += order[i].share;
    int64_t kept = 0;
    while (kept < count && (kept == 0 || total < top_p * left)) total += order[kept++].share;
    if (!limited && top_p >= 1.0f) total = 1.0;
    for (int64_t i = 0; i < kept - 1; i++) {
        before += order[i].share;
        if (before > u * total) return order[i].token;
    }
    return order[kept - 1].token;
}

// The next token of each row of (rows, vocab) logits; `work` holds 3 * vocab floats.
void sample(const float *logits, int64_t rows, int64_t vocab, const float *temperature, const float *top_p,
            const int64_t *top_k, const float *min_p, const int64_t *seed, const int64_t *counter, float *work,
            int64_t *tokens) {
    for (int64_t i = 0; i < rows; i++)
        tokens[i] = draw(logits + i * vocab, vocab, temperature[i], top_p[i], top_k[i], min_p[i], seed[i], counter[i],
                         work);
}
