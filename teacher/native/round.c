// `decode` and `go_on` of teacher/decoding.py over the engine's own arrays: a round of drawing, verifying and drafting.

#include <stdlib.h>
#include <string.h>

#include "step.h"

typedef struct {  // the arrays of teacher/slots.py; `width` tokens and `pages` pages a slot
    int32_t *tokens, *table, *draft;
    int64_t *length, *prompt, *limit, *cached, *drafts, *drafted_from, *draft_counts;
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k, *seed, *stop;
    uint8_t *ended;
    int64_t width, pages, stops, most_drafts;
} Slots;

static int64_t next_token(const Slots *slots, int64_t slot, int64_t counter, const float *logits, float *work) {
    return draw(logits, VOCAB, slots->temperature[slot], slots->top_p[slot], slots->top_k[slot], slots->min_p[slot],
                slots->seed[slot], counter, work);
}

static int is_stop(const Slots *slots, int64_t slot, int64_t token) {
    for (int64_t i = 0; i < slots->stops; i++)
        if (slots->stop[slot * slots->stops + i] == token) return 1;
    return 0;
}

// Floats that `decode` needs.
int64_t round_workspace(const Model *model, int64_t count, int64_t drafts, int64_t longest) {
    const int64_t most = count * (1 + drafts);
    return workspace(model, most, longest) + most * (2 * HIDDEN + VOCAB) + 3 * VOCAB;
}

// Brings each of the `count` sequences in the slots `rows` a token, or with drafts up to 1 + drafts; `kept` says how many.
// Returns 0, or -1 if there is no memory for its small arrays.
int decode(const Model *model, const Slots *slots, const int64_t *rows, int64_t count, int64_t drafts, float *work,
           int64_t *kept) {
    const int64_t most = count * (1 + drafts);
    int64_t *position = malloc((size_t)most * (4 * sizeof(int64_t) + sizeof(int32_t)));
    if (!position) return -1;
    int64_t *slot = position + most, *which = slot + most, *first = which + most;
    int32_t *tokens = (int32_t *)(first + most);
    int64_t n = 0, longest = 0;
    for (int64_t b = 0; b < count; b++) {
        const int64_t s = rows[b], at = slots->length[s] - 1, room = slots->limit[s] - slots->length[s] - 1;
        const int64_t waiting = drafts == 0 ? 0 : (slots->drafts[s] < room ? slots->drafts[s] : room);
        for (int64_t j = 0; j <= waiting; j++, n++) {
            tokens[n] = j ? slots->draft[s * slots->most_drafts + j - 1] : slots->tokens[s * slots->width + at];
            position[n] = at + j;
            slot[n] = s;
            which[n] = n;
        }
        kept[b] = waiting + 1;
        if (at + waiting + 1 > longest) longest = at + waiting + 1;
    }
    longest += drafts;  // drafting looks no further
    float *hidden = work + workspace(model, most, longest), *out = hidden + most * HIDDEN, *logits = out + most * HIDDEN;
    float *room = logits + most * VOCAB;
    Step step = {tokens, position, slot, slots->table, n, slots->pages, longest};
    forward(model, &step, n, which, work, hidden, logits);

    // A draft is kept if it is what the model draws there; what follows the first wrong one is void.
    int64_t going = 0, there = 0;
    for (int64_t b = 0, start = 0, given; b < count; start += given, b++) {
        const int64_t s = rows[b], at = slots->length[s] - 1;
        int64_t token, drawn = 0;
        int stopped;
        given = kept[b];
        do {
            token = next_token(slots, s, at + drawn + 1 - slots->prompt[s], logits + (start + drawn) * VOCAB, room);
            slots->tokens[s * slots->width + at + 1 + drawn] = (int32_t)token;
            stopped = is_stop(slots, s, token);
            drawn++;
        } while (!stopped && drawn < given && tokens[start + drawn] == token);
        kept[b] = drawn;
        slots->length[s] += drawn;
        slots->cached[s] = slots->length[s] - 1;
        slots->ended[s] = stopped || slots->length[s] >= slots->limit[s];
        slots->draft_counts[2 * s] += given - 1;
        slots->draft_counts[2 * s + 1] += drawn - 1;
        slots->drafts[s] = 0;
        if (drafts == 0) slots->drafted_from[s] = -1;
        if (drafts == 0 || slots->ended[s]) continue;
        // The kept tokens' hidden states move to the front, each with the token after it. They were read already.
        if (slots->drafted_from[s] < 0) slots->drafted_from[s] = at;
        memmove(hidden + there * HIDDEN, hidden + start * HIDDEN, (size_t)drawn * HIDDEN * sizeof(float));
        for (int64_t j = 0; j < drawn; j++, there++) {
            tokens[there] = slots->tokens[s * slots->width + at + 1 + j];
            position[there] = at + j;
            slot[there] = s;
            first[there] = slots->drafted_from[s];
        }
        which[going++] = there - 1;
    }
    for (int64_t depth = 0; depth < drafts && going; depth++) {
        step.count = depth ? going : there;
        draft(model, &step, hidden, first, going, which, work, out, logits);
        for (int64_t r = 0; r < going; r++) {
            const int64_t last = which[r], s = slot[last], after = slots->length[s] - slots->prompt[s] + depth;
            const int64_t token = next_token(slots, s, after, logits + r * VOCAB, room);
            slots->draft[s * slots->most_drafts + depth] = (int32_t)token;
            slots->drafts[s] = drafts;
            memcpy(hidden + r * HIDDEN, out + last * HIDDEN, HIDDEN * sizeof(float));
            // Drafts past the end are of no use, but must lie somewhere.
            position[r] = position[last] + 1 < slots->width ? position[last] + 1 : slots->width - 1;
            tokens[r] = (int32_t)token;
            slot[r] = s;
            first[r] = slots->drafted_from[s];
            which[r] = r;
        }
    }
    free(position);
    return 0;
}
