/* octad's native kernels for CPUs: what decoding needs, and the passes of training, on plain pointers, one OpenMP region
   a call.

   Decoding one token is bound by reading the active weights once. So weights are kept as 8 or 4 bit integers (or bf16),
   laid out so that one 64-byte load feeds 16 outputs, and everything between two weight matrices (activation, routing
   weight, sum over experts) happens in registers and cache. Integer products take activations that are rounded to 8 bits
   per group of inputs. packed.py holds the formats and the slow twin.

   compile.py compiles this file once for each instruction set, with its flags and -DISA=name, which all functions carry:
   octad_avx2_linear; and once without, for the function that says what the processor runs. `#ifdef __AVX...` chooses
   the code inside.

   native_src/detect.h     what this processor runs
   native_src/numbers.h    numbers, and vectors of eight
   native_src/rows.h       rows of activations
   native_src/panels.h     16 outputs times a few rows: where the time goes
   native_src/parts.h      the decoder's operations inside one parallel region
   native_src/attention.h  queries over pages of keys and values
   native_src/layers.h     whole layers of them
   native_src/draw.h       a token of a row of logits
   native_src/passes.h     the passes between the products of training
   native_src/rounding.h   a group of weights rounded
   native_src/packing.h    weights rounded and packed
   here                    what Python calls. dtype is F_F32 or F_BF16; functions return 0, 1 without memory,
                           2 for an expert that is not there, 3 for a weight that is not finite. */

#ifndef ISA
#include "native_src/detect.h"
#else

#define JOINED(isa, name) octad_##isa##_##name
#define OF_ISA(isa, name) JOINED(isa, name)
#define NAME(name) OF_ISA(ISA, name)

#include "native_src/numbers.h"
#include "native_src/rows.h"
#include "native_src/panels.h"
#include "native_src/parts.h"
#include "native_src/attention.h"
#include "native_src/layers.h"
#include "native_src/draw.h"
#include "native_src/passes.h"
#include "native_src/rounding.h"
#include "native_src/packing.h"

/* y = x W^T + b. x [N, K]; outputs[i] [N, O_i] in the same dtype; biases[i] float32 [O_i] or null. */
int NAME(linear)(const Weight *w, int64_t count, const void *x, int64_t dtype, int64_t N, void **outputs,
                 const float *const *biases, int64_t threads) {
    Rows rows;
    float *scratch = malloc((N * w->inputs + 16) * sizeof(float));
    int failed = rows_alloc(&rows, N, w) || !scratch;
    if (!failed) {
        Meeting meeting = {0, 0};
#pragma omp parallel num_threads(threads)
        {
            Team team = team_of(&meeting, 0);
            rows_part(&team, &rows, x, dtype, N, scratch);
            linear_part(&team, w, count, &rows, N, outputs, dtype, biases);
            tiles_end();
        }
    }
    rows_free(&rows);
    free(scratch);
    return failed;
}

/* y = the sum over a token's experts of weight * down(silu(gate x) * up x). gate, up [E] of [F, D], down [E] of [D, F];
   x, y [N, D]; weights float32 [N, A], experts int64 [N, A]. Only the chosen experts' weights are read. */
int NAME(experts)(const Weight *gate, const Weight *up, const Weight *down, int64_t E, const void *x, int64_t dtype,
                  int64_t N, const float *weights, const int64_t *experts, int64_t A, void *y, int64_t threads) {
    int64_t D = gate->inputs, F = gate->outputs, pairs = N * A;
    if (!slots_valid(experts, pairs, E)) return 2;
    Slots s = {0};
    Rows in = {0}, taken = {0}, mid = {0};
    float *h = malloc((pairs * F + 16) * sizeof(float)), *sum = malloc((N * D + 16) * sizeof(float));
    int together = TILES && pairs > SHARED;
    int failed = slots_alloc(&s, pairs, E) || rows_alloc(&in, N, gate) || rows_alloc(&mid, pairs, down) || !h || !sum ||
                 (together && rows_alloc(&taken, pairs, gate));
    if (!failed) {
        Meeting meeting = {0, 0};
        slots_fill(&s, experts, weights, N, A, E);
#pragma omp parallel num_threads(threads)
        {
            Team team = team_of(&meeting, 0);
            rows_part(&team, &in, x, dtype, N, sum);
            for (int64_t n = team.first; n < N; n += team.step) memset(sum + n * D, 0, D * sizeof(float));
            experts_part(&team, gate, up, down, &in, together ? &taken : 0, &s, pairs, h, &mid, sum);
            meet(&team);
            for (int64_t n = team.first; n < N; n += team.step) store_row(y, dtype, n * D, sum + n * D, D);
            tiles_end();
        }
    }
    rows_free(&in), rows_free(&taken), rows_free(&mid), slots_free(&s);
    free(h), free(sum);
    return failed;
}

/* y = x / rms(x) * weight, x and y [N, D], weight [D], all in one dtype. */
int NAME(rms_norm)(const void *x, int64_t dtype, int64_t N, int64_t D, const void *weight, float eps, void *y,
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
void NAME(rope)(void *x, int64_t dtype, int64_t N, int64_t heads, int64_t K, const int64_t *positions, int64_t start,
                const float *cosines, const float *sines, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (N * heads * K > 65536)
    for (int64_t n = 0; n < N; n++) {
        int64_t position = (positions ? positions[n] : start + n) * K;
        rope_row(x, dtype, n * heads * K, heads, K, cosines + position, sines + position);
    }
}

/* weights float32 [N, A] and experts int64 [N, A] of x [N, D]; W float32 [E, D]. */
int NAME(route)(const void *x, int64_t dtype, int64_t N, int64_t D, const float *W, int64_t E, int64_t A,
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

/* q, y [R, H, K], a token each; keys, values [blocks, block_size, G, K]; lengths [R] and tables [R, width] int32,
   as in paged.py. */
int NAME(paged_attention)(const void *q, const void *keys, const void *values, int64_t dtype, const int32_t *lengths,
                          const int32_t *tables, int64_t R, int64_t width, int64_t block_size, int64_t H, int64_t G,
                          int64_t K, int64_t window, float scale, void *y, int64_t threads) {
    Pages pages = {keys, values, dtype, block_size, G, K, window};
    int64_t longest = 1, runs = 0, failed = 0, size = H * K * (dtype == F_F32 ? 4 : 2);
    for (int64_t r = 0; r < R; r++) longest = lengths[r] > longest ? lengths[r] : longest;
    int64_t *run = malloc((R + 1) * sizeof(int64_t)); /* where each begins */
    float *sum = malloc((R * part_size(H, K) + 16) * sizeof(float));
    if (!sum || !run) return free(sum), free(run), 1;
    for (int64_t r = 0; r < R; r += run_length(&pages, r, R, lengths, tables, width)) run[runs++] = r;
    run[runs] = R;
    int64_t parts = threads > 1 && runs < 2 * threads ? G : 1, heads = H / parts;
#pragma omp parallel num_threads(threads) if (R * H * longest * K > 65536)
    {
        float *scratch = malloc((attention_scratch(RUN * heads) + RUN * part_size(H, K)) * sizeof(float));
        if (!scratch) failed = 1;
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < runs * parts; task++) {
                int64_t r = run[task / parts], count = run[task / parts + 1] - r, h = task % parts * heads;
                int64_t end = r + count - 1, chunks = chunk_count(&pages, lengths[end]);
                Part whole[RUN], more[RUN];
                for (int64_t c = 0; c < count; c++) {
                    whole[c] = part_at(sum, r + c, H, K);
                    more[c] = part_at(scratch + attention_scratch(RUN * heads), c, H, K);
                }
                for (int64_t i = 0; i < chunks; i++) {
                    int64_t c = attend_chunk(&pages, (const char *)q + r * size, count, i, h, h + heads, H, lengths + r,
                                             tables + end * width, scale, scratch, i ? more : whole);
                    for (; i && c < count; c++) join_parts(&whole[c], &more[c], h, h + heads, K);
                }
                for (int64_t c = 0; c < count; c++) finish_part(&pages, &whole[c], h, h + heads);
            }
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < R; r++) store_row(y, dtype, r * H * K, part_at(sum, r, H, K).out, H * K);
        }
        free(scratch);
    }
    free(sum), free(run);
    return (int)failed;
}

/* ---- the decoder's layers, one token a sequence --------------------------------------------------------------------- */

/* y = the L layers of x, x and y [R, D], as layers.h says; keys and values [L] are the layers' pages. weights float32
   [L, R, A] and experts int64 [L, R, A] say how the tokens were routed. With `ends` it is the whole step, from tokens to
   logits, and x and y are null. */
int NAME(layers)(const Block *const *blocks, int64_t L, const Step *s, const void *x, void *const *keys,
                 void *const *values, void *y, float *weights, int64_t *experts, int64_t A, const Ends *ends,
                 int64_t threads) {
    int64_t R = s->R, pairs = R * A, D = blocks[0]->D;
    for (int64_t l = 0; s->given && l < L; l++)
        if (!slots_valid(experts + l * pairs, pairs, blocks[l]->E)) return 2;
    Work work = {0};
    int failed = work_alloc(&work, blocks, L, s, ends ? ends->head : 0, A, threads);
    if (!failed) {
        Meeting meeting = {0, 0};
#pragma omp parallel num_threads(threads)
        {
            Team team = team_of(&meeting, R <= FEW);
            Own *own = &work.own[team.alone ? team.thread : 0], *mine = &work.own[team.thread];
            for (int64_t n = team.first; n < R; n += team.step)
                if (ends) load_row(own->h + n * D, ends->embedding, ends->embedding_dtype, ends->tokens[n] * D, D);
                else load_row(own->h + n * D, x, s->dtype, n * D, D);
            for (int64_t l = 0; l < L; l++)
                layer_part(blocks[l], s, &team, &work, own, mine, keys[l], values[l], weights + l * pairs,
                           experts + l * pairs, A, l + 1 < L ? blocks[l + 1] : 0);
            if (ends) head_part(ends, s, &team, own, mine, D);
            else
                for (int64_t n = team.thread; n < R; n += team.threads) /* every row once */
                    store_row(y, s->dtype, n * D, own->h + n * D, D);
            tiles_end();
        }
        for (int64_t n = 0; ends && n < R; n++) {
            ends->likeliest[n] = likeliest(work.own, threads, n);
            find_speaker(weights, experts, L, R, A, blocks[0]->E, n, ends->speakers + n, ends->shares + n);
        }
    }
    work_free(&work, threads);
    return failed;
}

/* ---- drawing ---------------------------------------------------------------------------------------------------- */

/* tokens [R] of logits [R, V], rows `stride` numbers apart; numbers [R] in [0, 1). outside [R]: whether a token is to be
   drawn anew among the likelier ones, by draw_again. weights [2, R, V] and nucleus [R] are scratch of both. */
void NAME(draw)(const void *logits, int64_t dtype, int64_t R, int64_t V, int64_t stride, const Draws *draws,
                const double *numbers, float *weights, double *nucleus, int64_t *tokens, int64_t *outside, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (R > 1) schedule(static)
    for (int64_t r = 0; r < R; r++) {
        const char *row = (const char *)logits + r * stride * (dtype == F_F32 ? 4 : 2);
        float *own = weights + r * V, *some = own + R * V;
        draw_row(row, dtype, V, draws, r, numbers[r], own, some, nucleus + r, tokens + r, outside + r);
    }
}

void NAME(draw_again)(int64_t R, int64_t V, const double *numbers, const float *weights, const double *nucleus,
                      int64_t *tokens, int64_t *outside, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (R > 1) schedule(static)
    for (int64_t r = 0; r < R; r++) {
        if (!outside[r]) continue;
        const float *row = weights + r * V;
        pick(row, V, nextafterf(row[tokens[r]], INFINITY), numbers[r], tokens + r);
        outside[r] = is_outside(row, V, tokens[r], nucleus[r]);
    }
}

int NAME(features)(void) { /* bit 0: vectors of integers, bit 1: bf16 dot products, bit 2: OpenMP, bit 3: tiles */
    int features = VECTOR_INT | 2 * BF16_DOT | 8 * TILES;
#ifdef _OPENMP
    features |= 4;
#endif
    return features;
}

#endif
