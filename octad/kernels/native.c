/* octad's native kernels for CPUs: what decoding needs, on plain pointers, one OpenMP region a call.

   Decoding one token is bound by reading the active weights once. So weights are kept as 8 or 4 bit integers (or bf16),
   laid out so that one 64-byte load feeds 16 outputs, and everything between two weight matrices (activation, routing
   weight, sum over experts) happens in registers and cache. Integer products take activations that are rounded to 8 bits
   per group of inputs. packed.py holds the formats and the slow twin; build.py compiles this file with -march=native, so
   that `#ifdef __AVX512...` is the dispatch, and the plain loops serve every other machine.

   native_src/panels.h   16 outputs times a few rows: where the time goes
   native_src/parts.h    the decoder's operations inside one parallel region
   here                  what Python calls. dtype is F_F32 or F_BF16; functions return 0, 1 without memory,
                          or 2 for an expert that is not there. */

#include "native_src/panels.h"
#include "native_src/parts.h"

/* y = x W^T + b. x [N, K]; outputs[i] [N, O_i] in the same dtype; biases[i] float32 [O_i] or null. */
int octad_linear(const Weight *w, int64_t count, const void *x, int64_t dtype, int64_t N, void **outputs,
                 const float *const *biases, int64_t threads) {
    Rows rows;
    float *scratch = malloc((N * w->inputs + 16) * sizeof(float));
    int failed = rows_alloc(&rows, N, w) || !scratch;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
            rows_part(&rows, x, dtype, N, scratch);
            linear_part(w, count, &rows, N, outputs, dtype, biases, threads);
        }
    }
    rows_free(&rows);
    free(scratch);
    return failed;
}

/* y = the sum over a token's experts of weight * down(silu(gate x) * up x). gate, up [E] of [F, D], down [E] of [D, F];
   x, y [N, D]; weights float32 [N, A], experts int64 [N, A]. Only the chosen experts' weights are read. */
int octad_experts(const Weight *gate, const Weight *up, const Weight *down, int64_t E, const void *x, int64_t dtype,
                  int64_t N, const float *weights, const int64_t *experts, int64_t A, void *y, int64_t threads) {
    int64_t D = gate->inputs, F = gate->outputs, pairs = N * A;
    if (!slots_valid(experts, pairs, E)) return 2;
    Slots s = {0};
    Rows in = {0}, mid = {0};
    float *h = malloc((pairs * F + 16) * sizeof(float)), *sum = malloc((N * D + 16) * sizeof(float));
    int failed = slots_alloc(&s, pairs, E) || rows_alloc(&in, N, gate) || rows_alloc(&mid, pairs, down) || !h || !sum;
    if (!failed) {
        slots_fill(&s, experts, weights, N, A, E);
#pragma omp parallel num_threads(threads)
        {
            rows_part(&in, x, dtype, N, sum);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n++) memset(sum + n * D, 0, D * sizeof(float));
            experts_part(gate, up, down, E, &in, &s, pairs, h, &mid, sum, threads);
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < N; n++) store_row(y, dtype, n * D, sum + n * D, D);
        }
    }
    rows_free(&in), rows_free(&mid), slots_free(&s);
    free(h), free(sum);
    return failed;
}

/* y = x / rms(x) * weight, x and y [N, D], weight [D], all in one dtype. */
int octad_rms_norm(const void *x, int64_t dtype, int64_t N, int64_t D, const void *weight, float eps, void *y,
                   int64_t threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (N * D > 65536)
    {
        float *row = malloc((D + 16) * sizeof(float));
        if (!row) failed = 1;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            if (!row) continue;
            load_row(row, x, dtype, n * D, D);
            norm_row(row, D, weight, dtype, eps, row);
            store_row(y, dtype, n * D, row, D);
        }
        free(row);
    }
    return failed;
}

/* x [N, heads, K] rotated in place to positions [N] (or start, start + 1, ...); cosines, sines float32 [T, K]. */
void octad_rope(void *x, int64_t dtype, int64_t N, int64_t heads, int64_t K, const int64_t *positions, int64_t start,
                const float *cosines, const float *sines, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (N * heads * K > 65536)
    for (int64_t n = 0; n < N; n++) {
        int64_t position = (positions ? positions[n] : start + n) * K;
        rope_row(x, dtype, n * heads * K, heads, K, cosines + position, sines + position);
    }
}

/* weights float32 [N, A] and experts int64 [N, A] of x [N, D]; W float32 [E, D]. */
int octad_route(const void *x, int64_t dtype, int64_t N, int64_t D, const float *W, int64_t E, int64_t A,
                int64_t normalise, float *weights, int64_t *experts, int64_t threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (N * D * E > 262144)
    {
        float *row = malloc((D + 16) * sizeof(float));
        if (!row) failed = 1;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            if (!row) continue;
            load_row(row, x, dtype, n * D, D);
            route_row(row, D, W, E, A, normalise, weights + n * A, experts + n * A);
        }
        free(row);
    }
    return failed;
}

/* q, y [R, H, K], one token a sequence; keys, values [blocks, block_size, G, K]; lengths [R] and tables [R, width] int32,
   as in paged.py. */
int octad_paged_attention(const void *q, const void *keys, const void *values, int64_t dtype, const int32_t *lengths,
                          const int32_t *tables, int64_t R, int64_t width, int64_t block_size, int64_t H, int64_t G,
                          int64_t K, int64_t window, float scale, void *y, int64_t threads) {
    Pages pages = {keys, values, dtype, block_size, G, K, window};
    int64_t longest = 1, failed = 0;
    for (int64_t r = 0; r < R; r++) longest = lengths[r] > longest ? lengths[r] : longest;
    float *sum = malloc((R * H * K + 16) * sizeof(float));
    if (!sum) return 1;
#pragma omp parallel num_threads(threads) if (R * H * longest * K > 65536)
    {
        float *scores = malloc((GROUP * (longest + K) + 16) * sizeof(float));
        if (!scores) failed = 1;
#pragma omp barrier
        if (!failed) {
            attention_part(&pages, q, R, H, lengths, tables, width, scale, longest, scores, sum);
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < R; r++) store_row(y, dtype, r * H * K, sum + r * H * K, H * K);
        }
        free(scores);
    }
    free(sum);
    return (int)failed;
}

/* ---- a whole block of the decoder, one token a sequence ------------------------------------------------------------ */

typedef struct { /* a DecoderLayer's weights and numbers */
    const Weight *qkv, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *o_bias; /* or null */
    const void *input_norm, *post_norm, *q_norm, *k_norm; /* the last two per head, or null */
    const float *router;                                  /* [E, D], or null: the experts are always given */
    int64_t E, normalise, D, H, G, K, window;
    float norm_eps, head_eps, scale;
} Block;

typedef struct { /* what a step's tokens share in all layers */
    int64_t dtype, R, width, block_size, start, given; /* given: weights and experts hold the routing already */
    const int64_t *positions, *slots;                  /* positions null: R is 1 and the position is start */
    const int32_t *lengths, *tables;
    const float *cosines, *sines;
} Step;

/* The rest of attention's input for one token: head norms, rotation, keys and values into their slot. */
static void place_token(const Block *b, const Step *s, int64_t n, void *q, void *k, const void *v, void *keys,
                        void *values, float *scratch) {
    int64_t K = b->K, size = s->dtype == F_F32 ? 4 : 2, row = b->G * K;
    for (int64_t h = 0; b->q_norm && h < b->H + b->G; h++) {
        void *x = h < b->H ? q : k;
        int64_t at = h < b->H ? (n * b->H + h) * K : (n * b->G + h - b->H) * K;
        load_row(scratch, x, s->dtype, at, K);
        norm_row(scratch, K, h < b->H ? b->q_norm : b->k_norm, s->dtype, b->head_eps, scratch);
        store_row(x, s->dtype, at, scratch, K);
    }
    int64_t position = (s->positions ? s->positions[n] : s->start) * K;
    rope_row(q, s->dtype, n * b->H * K, b->H, K, s->cosines + position, s->sines + position);
    rope_row(k, s->dtype, n * row, b->G, K, s->cosines + position, s->sines + position);
    memcpy((char *)keys + s->slots[n] * row * size, (const char *)k + n * row * size, row * size);
    memcpy((char *)values + s->slots[n] * row * size, (const char *)v + n * row * size, row * size);
}

/* x + y where both were stored in `dtype` before. */
static void add_row(float *x, const float *y, int64_t dtype, int64_t n) {
    if (dtype == F_F32)
        for (int64_t i = 0; i < n; i++) x[i] += y[i];
    else
        for (int64_t i = 0; i < n; i++) x[i] = from_bf16(to_bf16(x[i] + from_bf16(to_bf16(y[i]))));
}

/* y = DecoderLayer(x), x and y [R, D]; the composed modules are the slow twin, and bit for bit the same: whatever they
   store between two modules is rounded to `dtype` here too, so that a sequence's text does not depend on which of the
   two ways its company needs. weights float32 [R, A] and experts int64 [R, A] say how the tokens were routed. */
int octad_block(const Block *b, const Step *s, const void *x, void *keys, void *values, void *y, float *weights,
                int64_t *experts, int64_t A, int64_t threads) {
    int64_t N = s->R, D = b->D, HK = b->H * b->K, GK = b->G * b->K, F = b->gate->outputs, pairs = N * A, longest = 1;
    if (s->given && !slots_valid(experts, pairs, b->E)) return 2;
    for (int64_t r = 0; r < N; r++) longest = s->lengths[r] > longest ? s->lengths[r] : longest;
    Pages pages = {keys, values, s->dtype, s->block_size, b->G, b->K, b->window};
    Rows in = {0}, mixed = {0}, post = {0}, mid = {0};
    Slots slots = {0};
    int64_t each = GROUP * (longest + b->K) + 16; /* floats a thread for attention */
    float *memory = malloc((N * 2 * (D + HK + GK) + pairs * F + threads * each + 64) * sizeof(float));
    int failed = !memory || rows_alloc(&in, N, b->qkv) || rows_alloc(&mixed, N, b->o) || rows_alloc(&post, N, b->gate) ||
                 rows_alloc(&mid, pairs, b->down) || slots_alloc(&slots, pairs, b->E);
    if (!failed) {
        float *h = memory, *part = h + N * D, *attended = part + N * D, *q = attended + N * HK, *k = q + N * HK;
        float *v = k + N * GK, *hidden = v + N * GK, *scores = hidden + pairs * F;
        const float *biases[3] = {b->q_bias, b->k_bias, b->v_bias}, *o_bias[1] = {b->o_bias};
        void *qkv[3] = {q, k, v}, *to_part[1] = {part};
#pragma omp parallel num_threads(threads)
        {
#ifdef _OPENMP
            float *own = scores + omp_get_thread_num() * each;
#else
            float *own = scores;
#endif
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n++) {
                float *row = part + n * D;
                load_row(h + n * D, x, s->dtype, n * D, D);
                norm_row(h + n * D, D, b->input_norm, s->dtype, b->norm_eps, row);
                round_row(row, s->dtype, D);
                rows_set(&in, n, row);
            }
            linear_part(b->qkv, 3, &in, N, qkv, s->dtype, biases, threads);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n++) place_token(b, s, n, q, k, v, keys, values, own);
            attention_part(&pages, q, N, b->H, s->lengths, s->tables, s->width, b->scale, longest, own, attended);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n++) {
                round_row(attended + n * HK, s->dtype, HK);
                rows_set(&mixed, n, attended + n * HK);
            }
            linear_part(b->o, 1, &mixed, N, to_part, F_F32, o_bias, threads);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n++) {
                float *row = part + n * D;
                add_row(h + n * D, row, s->dtype, D);
                norm_row(h + n * D, D, b->post_norm, s->dtype, b->norm_eps, row);
                round_row(row, s->dtype, D);
                rows_set(&post, n, row);
                if (!s->given) route_row(row, D, b->router, b->E, A, b->normalise, weights + n * A, experts + n * A);
                memset(row, 0, D * sizeof(float));
            }
#pragma omp single
            slots_fill(&slots, experts, weights, N, A, b->E);
            experts_part(b->gate, b->up, b->down, b->E, &post, &slots, pairs, hidden, &mid, part, threads);
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < N; n++) {
                add_row(h + n * D, part + n * D, s->dtype, D);
                store_row(y, s->dtype, n * D, h + n * D, D);
            }
        }
    }
    rows_free(&in), rows_free(&mixed), rows_free(&post), rows_free(&mid), slots_free(&slots);
    free(memory);
    return failed;
}

int octad_features(void) { /* bit 0: 8-bit dot products, bit 1: bf16 dot products, bit 2: OpenMP */
    int features = VECTOR_INT;
#if defined(__AVX512BF16__)
    features |= 2;
#endif
#ifdef _OPENMP
    features |= 4;
#endif
    return features;
}
