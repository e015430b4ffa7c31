// What the files of this folder hand to each other, and Python to them (pack.py, runner.py).

#include <stdint.h>

typedef void (*Sgemm)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                      const int *, const float *, const int *, const float *, float *, const int *);

typedef struct {
    const float *input_norm, *post_norm;
    const float *down, *down_bias, *q_norm, *kv_norm, *query, *out, *out_bias;
    const float *gate, *gate_bias, *expert_up, *expert_down;  // no gate: a dense layer
    const float *up, *down_proj;                              // dense layer or shared expert; may be absent
    const float *enorm, *hnorm, *joint, *head_norm;           // of a draft module
    int64_t inner;                                            // of the dense layer or shared expert
} Layer;

typedef struct {
    const float *embed, *norm, *head, *cosine, *sine;  // the tables are (position, HALF)
    float *cache;                                      // (layer, page, PAGE, LATENT)
    const Layer *layers;
    Sgemm sgemm;
    int64_t depth, layer_stride, widest;  // main layers; floats of cache a layer; the largest inner size
    float eps, scale, routed_scale;
    int32_t norm_topk;
} Model;

typedef struct {
    const int32_t *tokens;
    const int64_t *positions, *slots;  // of each new token
    const int32_t *table;              // (slot, table_width): pages
    int64_t count, table_width, longest;  // new tokens; pages a slot; highest position plus 1
} Step;

// step.c
int64_t workspace(const Model *model, int64_t count, int64_t longest);
void forward(const Model *model, const Step *step, int64_t wanted, const int64_t *which, float *work, float *hidden,
             float *logits);
void draft(const Model *model, const Step *step, const float *before, const int64_t *first, int64_t wanted,
           const int64_t *which, float *work, float *hidden, float *logits);

// sample.c
int64_t draw(const float *logits, int64_t vocab, float temperature, float top_p, int64_t top_k, float min_p,
             int64_t seed, int64_t counter, float *work);
