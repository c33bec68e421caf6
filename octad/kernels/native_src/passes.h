/* The passes over activations between the matrix products of training, on plain pointers, one OpenMP loop a call. Part of
   native.c.

   Each is one pass where PyTorch makes several, in float32 inside whatever the activations are. passes.py has the slow
   twins. Rows are shared out among the threads; but for the sums over rows (a norm's weight) the bits do not depend on how
   many there are. dtype is F_F32 or F_BF16; functions return 0, or 1 without memory.

   Letters: N rows, D model, F feed-forward hidden, V vocabulary, S keys or positions, T queries of a block, H heads, K head
   dimension. */

/* store_row, by the processor's own rounding where it has one (which takes the smallest numbers for zero). */
static void put_row(void *to, int64_t dtype, int64_t start, const float *from, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if (dtype == F_BF16)
        for (; i + 16 <= n; i += 16)
            _mm256_storeu_si256((__m256i *)((uint16_t *)to + start + i),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    store_row(to, dtype, start + i, from + i, n - i);
}

static float most_of(const float *row, int64_t n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = row[i] > most ? row[i] : most;
    return most;
}

/* row = e^((row - most) * scale), and its sum. */
static float exp_row(float *row, int64_t n, float most, float scale) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        row[i] = exp_((row[i] - most) * scale);
        total += row[i];
    }
    return total;
}

/* A loop over rows n < N, each with `size` floats of scratch `row` of its thread's own. */
#define ROWS_BEGIN(N, size)                                                                                            \
    int failed = 0;                                                                                                    \
    _Pragma("omp parallel num_threads(threads)") {                                                                     \
        float *row = malloc(((size) + 64) * sizeof(float));                                                            \
        if (!row) failed = 1;                                                                                          \
        _Pragma("omp for schedule(static)") for (int64_t n = 0; n < (N); n++) {                                        \
            if (!row) continue;
#define ROWS_END                                                                                                       \
        }                                                                                                              \
        free(row);                                                                                                     \
    }                                                                                                                  \
    return failed;

/* ---- silu(gate) * up ------------------------------------------------------------------------------------------- */

/* h [N, F] = silu(gate) * up, whose rows are `stride` apart. */
int NAME(swiglu)(const void *gate, const void *up, int64_t stride, int64_t dtype, int64_t N, int64_t F, void *h,
                 int64_t threads) {
    ROWS_BEGIN(N, 2 * F)
    float *u = row + F;
    load_row(row, gate, dtype, n * stride, F);
    load_row(u, up, dtype, n * stride, F);
    for (int64_t i = 0; i < F; i++) row[i] = silu(row[i]) * u[i];
    put_row(h, dtype, n * F, row, F);
    ROWS_END
}

/* h again, and from its gradient dh [N, F] those of gate and up, into rows `stride` apart as well; dup may be dh. */
int NAME(swiglu_backward)(const void *gate, const void *up, int64_t stride, const void *dh, int64_t dtype, int64_t N,
                          int64_t F, void *h, void *dgate, void *dup, int64_t dstride, int64_t threads) {
    ROWS_BEGIN(N, 3 * F)
    float *u = row + F, *d = u + F;
    load_row(row, gate, dtype, n * stride, F);
    load_row(u, up, dtype, n * stride, F);
    load_row(d, dh, dtype, n * F, F);
    for (int64_t i = 0; i < F; i++) {
        float g = row[i], s = 1.0f / (1.0f + exp_(-g)), a = g * s, du = d[i] * a;
        row[i] = d[i] * u[i] * s * (1.0f + g * (1.0f - s));
        u[i] *= a, d[i] = du;
    }
    put_row(dgate, dtype, n * dstride, row, F);
    put_row(h, dtype, n * F, u, F);
    put_row(dup, dtype, n * dstride, d, F);
    ROWS_END
}

/* ---- attention's probabilities ---------------------------------------------------------------------------------- */

/* Row n of a block's scores [N, S]: query n % T of T, the last of S positions, sees the keys from `from` to `to`. */
static inline void seen(int64_t n, int64_t S, int64_t T, int64_t window, int64_t *from, int64_t *to) {
    *to = S - T + n % T + 1;
    *from = window && *to > window ? *to - window : 0;
}

/* Work goes on to a multiple of 32 numbers (the scratch has room), since loops that end in between cost as much again. */
static inline int64_t padded(int64_t count) { return round_up(count, 32); }

static void fill(float *row, int64_t from, int64_t to, float value) {
    for (int64_t i = from; i < to; i++) row[i] = value;
}

/* The row's numbers of the keys seen, and zeros for the others; the padding of `row` is zero. */
static void store_seen(void *to, int64_t dtype, int64_t n, int64_t S, const float *row, int64_t from, int64_t end) {
    int64_t size = dtype == F_F32 ? 4 : 2, count = min64(padded(end - from), S - from);
    memset((char *)to + n * S * size, 0, from * size);
    put_row(to, dtype, n * S + from, row, count);
    memset((char *)to + (n * S + from + count) * size, 0, (S - from - count) * size);
}

/* Softmax of scale * scores [N, S] in place, causal within a window (0: none). */
int NAME(causal_softmax)(void *scores, int64_t dtype, int64_t N, int64_t S, int64_t T, int64_t window, float scale,
                         int64_t threads) {
    ROWS_BEGIN(N, padded(S))
    int64_t from, to;
    seen(n, S, T, window, &from, &to);
    int64_t count = to - from;
    load_row(row, scores, dtype, n * S + from, min64(padded(count), S - from));
    fill(row, count, padded(count), -INFINITY);
    float most = most_of(row, padded(count)), total = exp_row(row, padded(count), most, scale);
    fill(row, count, padded(count), 0); /* e^-87 so far, which took no part in a sum of at least 1 */
    float share = 1.0f / total;
    for (int64_t i = 0; i < padded(count); i++) row[i] *= share;
    store_seen(scores, dtype, n, S, row, from, to);
    ROWS_END
}

/* From the probabilities p and their gradient dp, both [N, S], that of the scores before scaling, in dp's place. */
int NAME(softmax_backward)(const void *p, void *dp, int64_t dtype, int64_t N, int64_t S, int64_t T, int64_t window,
                           float scale, int64_t threads) {
    ROWS_BEGIN(N, 2 * padded(S))
    int64_t from, to;
    seen(n, S, T, window, &from, &to);
    int64_t count = padded(to - from), there = min64(count, S - from);
    float *d = row + padded(S), total = 0;
    load_row(row, p, dtype, n * S + from, there); /* zeros from `to` on */
    load_row(d, dp, dtype, n * S + from, there);
    fill(row, to - from, count, 0), fill(d, to - from, count, 0);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) total += row[i] * d[i];
    for (int64_t i = 0; i < count; i++) row[i] *= (d[i] - total) * scale;
    store_seen(dp, dtype, n, S, row, from, to);
    ROWS_END
}

/* ---- the loss ----------------------------------------------------------------------------------------------------- */

/* Logits [N, V] into their own gradient, softmax - target, in place; losses float32 [N] are -ln p(target). Rows whose
   target is negative are not learnt: zeros. */
int NAME(cross_entropy)(void *logits, int64_t dtype, int64_t N, int64_t V, const int64_t *targets, float *losses,
                        int64_t threads) {
    ROWS_BEGIN(N, V)
    int64_t target = targets[n];
    losses[n] = 0;
    if (target < 0) {
        memset((char *)logits + n * V * (dtype == F_F32 ? 4 : 2), 0, V * (dtype == F_F32 ? 4 : 2));
        continue;
    }
    load_row(row, logits, dtype, n * V, V);
    float most = most_of(row, V), own = row[target];
    float total = exp_row(row, V, most, 1.0f);
    losses[n] = logf(total) - (own - most);
    float share = 1.0f / total;
    for (int64_t i = 0; i < V; i++) row[i] *= share;
    row[target] -= 1.0f;
    put_row(logits, dtype, n * V, row, V);
    ROWS_END
}

/* ---- norms and the residual stream ---------------------------------------------------------------------------------- */

/* h = x + delta (where there is one), y = h / rms(h) * weight; x, delta, h, y [N, D], weight [D], inverse float32 [N]
   keeps 1 / rms(h). */
int NAME(add_norm)(const void *x, const void *delta, const void *weight, float eps, int64_t dtype, int64_t N, int64_t D,
                   void *h, void *y, float *inverse, int64_t threads) {
    ROWS_BEGIN(N, 2 * D)
    float *d = row + D;
    load_row(row, x, dtype, n * D, D);
    if (delta) {
        load_row(d, delta, dtype, n * D, D);
        for (int64_t i = 0; i < D; i++) row[i] += d[i];
        put_row(h, dtype, n * D, row, D);
        load_row(row, h, dtype, n * D, D); /* as it was rounded */
    }
    inverse[n] = norm_row(row, D, weight, dtype, eps, row);
    put_row(y, dtype, n * D, row, D);
    ROWS_END
}

/* From the gradients dh (where there is one) and dy that of x, which is delta's too, in dx; each thread adds its rows' part
   of the weight's to its row of dweight float32 [threads, D], where there is one. */
int NAME(add_norm_backward)(const void *h, const void *weight, const float *inverse, const void *dh, const void *dy,
                            int64_t dtype, int64_t N, int64_t D, void *dx, float *dweight, int64_t threads) {
    ROWS_BEGIN(N, 4 * D)
    float *w = row + D, *g = w + D, *r = g + D, scale = inverse[n], sum = 0;
    load_row(row, h, dtype, n * D, D);
    load_row(w, weight, dtype, 0, D);
    load_row(g, dy, dtype, n * D, D);
#ifdef _OPENMP
    float *mine = dweight ? dweight + omp_get_thread_num() * D : 0;
#else
    float *mine = dweight;
#endif
    if (mine)
        for (int64_t i = 0; i < D; i++) mine[i] += g[i] * row[i] * scale;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; i++) {
        g[i] *= w[i];
        sum += g[i] * row[i];
    }
    float share = sum * scale * scale * scale / (float)D;
    if (dh) load_row(r, dh, dtype, n * D, D);
    else memset(r, 0, D * sizeof(float));
    for (int64_t i = 0; i < D; i++) row[i] = r[i] + g[i] * scale - row[i] * share;
    put_row(dx, dtype, n * D, row, D);
    ROWS_END
}

/* ---- rotary positions -------------------------------------------------------------------------------------------------- */

/* y = x rotated, both [N, H, K], row n to position n % S: half-split layout, cosines and sines float32 [S, K], which say
   the same twice. `turn` is 1, or -1 for the way back. */
int NAME(rotate)(const void *x, int64_t dtype, int64_t N, int64_t H, int64_t K, int64_t S, const float *cosines,
                 const float *sines, float turn, void *y, int64_t threads) {
    ROWS_BEGIN(N, 2 * H * K)
    const float *c = cosines + n % S * K, *s = sines + n % S * K;
    float *z = row + H * K;
    load_row(row, x, dtype, n * H * K, H * K);
    for (int64_t h = 0; h < H; h++) rotate_head(row + h * K, K, c, s, turn, z + h * K);
    put_row(y, dtype, n * H * K, z, H * K);
    ROWS_END
}
