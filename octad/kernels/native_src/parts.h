/* The decoder's operations as parts of one parallel region: every thread of the region calls them together. Part of
   native.c. Those named *_part share their loop out among the threads and end when all have come.

   Letters: N tokens, D model, O outputs, K inputs or head dimension, E experts, A experts a token, F feed-forward hidden,
   H heads, G key/value heads, R sequences. */

/* ---- the threads of a region ----------------------------------------------------------------------------------- */

#define FEW 2 /* rows that each thread prepares for itself, which is quicker than waiting for another */

typedef struct { int64_t arrived, turn; } Meeting;

/* alone: the small operations between the weights are done by every thread, each into memory of its own. */
typedef struct {
    Meeting *meeting;
    int64_t threads, thread, first, step; /* of the rows of small operations: first, first + step, ... */
    int alone;
} Team;

static Team team_of(Meeting *meeting, int alone) {
    int64_t threads = 1, thread = 0;
#ifdef _OPENMP
    threads = omp_get_num_threads(), thread = omp_get_thread_num();
#endif
    return (Team){meeting, threads, thread, alone ? 0 : thread, alone ? 1 : threads, alone};
}

/* Wait until all threads of the team are here. There are some hundred of these a token, so that OpenMP's barrier, which
   enters the kernel each time, would cost a tenth of it. Who has waited for long lets others have the core. */
static void meet(const Team *t) {
    if (t->threads == 1) return;
    int64_t turn = __atomic_load_n(&t->meeting->turn, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&t->meeting->arrived, 1, __ATOMIC_ACQ_REL) == t->threads) {
        __atomic_store_n(&t->meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&t->meeting->turn, turn + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&t->meeting->turn, __ATOMIC_ACQUIRE) == turn; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
#if defined(__unix__) || defined(__APPLE__)
        if (spins > 10000) sched_yield();
#endif
    }
}

/* Where this thread's part of `total` tasks begins; the next one's beginning is its end. */
static inline int64_t share(const Team *t, int64_t thread, int64_t total) { return total * thread / t->threads; }

/* How many neighbouring panels a thread takes at a time. With few rows the weights come from memory, and long runs keep
   the prefetcher going (runs of 9 kB read at a third of the bandwidth of runs of 150 kB); with many rows, arithmetic
   counts, and small pieces share it out evenly. */
static int64_t chunk_size(int64_t panels, int64_t rows, int64_t threads) {
    int64_t pieces = threads * (rows <= 4 ? 1 : (rows <= 64 ? 4 : 16));
    return panels > pieces ? (panels + pieces - 1) / pieces : 1;
}

/* Ask for the beginning of this thread's part of the weights that come next (few rows: each thread has one run of panels),
   so that memory has something to do while threads wait for each other. */
#define FETCHED (48 << 10)
static void fetch_part(const Team *t, const Weight *w, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += (panel_count(&w[i]) + 1) / 2;
    int64_t p = share(t, t->thread, total), i = 0;
    while (i + 1 < count && p >= (panel_count(&w[i]) + 1) / 2) p -= (panel_count(&w[i]) + 1) / 2, i++;
    const uint8_t *from = panel_at(&w[i], 2 * p);
    int64_t size = min64(FETCHED, (panel_count(&w[i]) - 2 * p) * w[i].step);
    for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(from + at, 0, 2);
}

/* ---- y = x W^T + b for several W that share x (q, k and v) ------------------------------------------------------- */

/* Panels p and p + 1 (if there is one) of one weight, for all rows. */
static void linear_pair(const Weight *w, int64_t p, const Rows *x, int64_t N, void *y, int64_t dtype,
                        const float *bias) {
    int P = p + 1 < panel_count(w) ? 2 : 1;
    const uint8_t *data[2] = {panel_at(w, p), panel_at(w, p + P - 1)};
    int outs[2] = {panel_outputs(w, p), panel_outputs(w, p + P - 1)};
    float out[2 * ROWS * PANEL];
    for (int64_t n = 0; n < N; n += rows_at_once(w)) {
        int count = (int)min64(rows_at_once(w), N - n);
        panels(w, data, outs, P, n ? 0 : 2 * w->step, x->rows + n, count, out);
        for (int i = 0; i < P; i++)
            for (int r = 0; r < count; r++) {
                float *o = out + (i * ROWS + r) * PANEL;
                int64_t at = (n + r) * w->outputs + (p + i) * PANEL;
                if (bias)
                    for (int j = 0; j < outs[i]; j++) o[j] += bias[(p + i) * PANEL + j];
                store_row(y, dtype, at, o, outs[i]);
            }
    }
}

static void linear_task(const Weight *w, int64_t p, const Rows *x, int64_t N, void **y, int64_t dtype,
                        const float *const *biases) {
    int64_t i = 0;
    while (p >= (panel_count(&w[i]) + 1) / 2) p -= (panel_count(&w[i]) + 1) / 2, i++;
    linear_pair(&w[i], 2 * p, x, N, y[i], dtype, biases ? biases[i] : 0);
}

static void linear_part(const Team *t, const Weight *w, int64_t count, const Rows *x, int64_t N, void **y, int64_t dtype,
                        const float *const *biases) {
    int64_t total = 0; /* tasks of two panels */
    for (int64_t i = 0; i < count; i++) total += (panel_count(&w[i]) + 1) / 2;
    if (N <= FEW) {
        for (int64_t task = share(t, t->thread, total); task < share(t, t->thread + 1, total); task++)
            linear_task(w, task, x, N, y, dtype, biases);
    } else {
        int64_t chunk = chunk_size(total, N, t->threads);
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t task = 0; task < total; task++) linear_task(w, task, x, N, y, dtype, biases);
    }
    meet(t);
}

/* x [N, K] into rows. */
static void rows_part(const Team *t, Rows *rows, const void *x, int64_t dtype, int64_t N, float *scratch) {
    int64_t K = rows->inputs;
    for (int64_t n = t->first; n < N; n += t->step) {
        const float *row = (const float *)x + n * K;
        if (dtype != F_F32) load_row(scratch + n * K, x, dtype, n * K, K), row = scratch + n * K;
        rows_set(rows, n, row);
    }
    meet(t);
}

/* ---- experts ------------------------------------------------------------------------------------------------------ */

typedef struct { /* the (token, expert) pairs, ordered by expert, and the experts that have any */
    int64_t *token, *start, *active, count; /* start [E + 1] */
    float *weight;
} Slots;

static int slots_alloc(Slots *s, int64_t pairs, int64_t E) {
    s->token = malloc((pairs + 1) * sizeof(int64_t));
    s->weight = malloc((pairs + 1) * sizeof(float));
    s->start = malloc((E + 2) * sizeof(int64_t));
    s->active = malloc((E + 1) * sizeof(int64_t));
    return !s->token || !s->weight || !s->start || !s->active;
}

static void slots_free(Slots *s) { free(s->token), free(s->weight), free(s->start), free(s->active); }

/* Whether all experts are there; a router's are, a caller's may not be. */
static int slots_valid(const int64_t *experts, int64_t pairs, int64_t E) {
    for (int64_t i = 0; i < pairs; i++)
        if (experts[i] < 0 || experts[i] >= E) return 0;
    return 1;
}

static void slots_fill(Slots *s, const int64_t *experts, const float *weights, int64_t N, int64_t A, int64_t E) {
    memset(s->start, 0, (E + 2) * sizeof(int64_t));
    for (int64_t i = 0; i < N * A; i++) s->start[experts[i] + 2]++;
    for (int64_t e = 0; e < E; e++) s->start[e + 2] += s->start[e + 1];
    for (int64_t i = 0; i < N * A; i++) {
        int64_t slot = s->start[experts[i] + 1]++;
        s->token[slot] = i / A, s->weight[slot] = weights[i];
    }
    s->count = 0;
    for (int64_t e = 0; e < E; e++)
        if (s->start[e + 1] > s->start[e]) s->active[s->count++] = e;
}

/* One task of the first half: 16 hidden values of one expert, for all tokens that chose it. */
static void hidden_panel(const Weight *gate, const Weight *up, int64_t p, const Rows *x, const Slots *s, int64_t first,
                         int64_t last, float *h, int64_t F) {
    const uint8_t *data[2] = {panel_at(gate, p), panel_at(up, p)};
    int outs[2] = {panel_outputs(gate, p), panel_outputs(up, p)};
    float gu[2 * ROWS * PANEL], *u = gu + ROWS * PANEL;
    for (int64_t slot = first; slot < last; slot += rows_at_once(gate)) {
        Row rows[ROWS];
        int n = (int)min64(rows_at_once(gate), last - slot);
        for (int r = 0; r < n; r++) rows[r] = x->rows[s->token[slot + r]];
        panels(gate, data, outs, 2, slot > first ? 0 : gate->step, rows, n, gu);
        for (int r = 0; r < n; r++) {
            float *to = h + (slot + r) * F + p * PANEL;
            for (int j = 0; j < outs[0]; j++) to[j] = silu(gu[r * PANEL + j]) * u[r * PANEL + j];
        }
    }
}

/* One task of the second half: panels p and p + 1 of the outputs, of every expert's tokens in turn. */
static void output_pair(const Weight *down, int64_t E, int64_t p, const Rows *h, const Slots *s, float *y, int64_t D) {
    int P = p + 1 < panel_count(down) ? 2 : 1;
    int outs[2] = {panel_outputs(down, p), panel_outputs(down, p + P - 1)};
    float out[2 * ROWS * PANEL];
    for (int64_t e = 0; e < E; e++) {
        const uint8_t *data[2] = {panel_at(&down[e], p), panel_at(&down[e], p + P - 1)};
        for (int64_t slot = s->start[e]; slot < s->start[e + 1]; slot += rows_at_once(down)) {
            int n = (int)min64(rows_at_once(down), s->start[e + 1] - slot);
            panels(&down[e], data, outs, P, slot > s->start[e] ? 0 : 2 * down->step, h->rows + slot, n, out);
            for (int i = 0; i < P; i++)
                for (int r = 0; r < n; r++) {
                    float *to = y + s->token[slot + r] * D + (p + i) * PANEL, *o = out + (i * ROWS + r) * PANEL;
                    for (int j = 0; j < outs[i]; j++) to[j] += s->weight[slot + r] * o[j];
                }
        }
    }
}

static void hidden_task(const Weight *gate, const Weight *up, int64_t task, int64_t each, const Rows *x, const Slots *s,
                        float *h, int64_t F) {
    int64_t e = s->active[task / each];
    hidden_panel(&gate[e], &up[e], task % each, x, s, s->start[e], s->start[e + 1], h, F);
}

/* y [N, D] (float32) += the weighted experts of the rows x; h [pairs, F] and mid are scratch. x, s and mid are the
   thread's own where the team is alone. The caller waits for the others. */
static void experts_part(const Team *t, const Weight *gate, const Weight *up, const Weight *down, int64_t E, const Rows *x,
                         const Slots *s, int64_t pairs, float *h, Rows *mid, float *y) {
    int64_t D = gate->inputs, F = gate->outputs, each = panel_count(gate), outs = (panel_count(down) + 1) / 2;
    int64_t total = s->count * each;
    if (pairs <= 2 * FEW) {
        for (int64_t task = share(t, t->thread, total); task < share(t, t->thread + 1, total); task++)
            hidden_task(gate, up, task, each, x, s, h, F);
        for (int64_t i = 0; i < s->count; i++) fetch_part(t, &down[s->active[i]], 1);
    } else {
        int64_t chunk = chunk_size(total, pairs, t->threads);
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t task = 0; task < total; task++) hidden_task(gate, up, task, each, x, s, h, F);
    }
    meet(t);
    for (int64_t slot = t->first; slot < pairs; slot += t->step) rows_set(mid, slot, h + slot * F);
    if (!t->alone) meet(t);
    if (pairs <= 2 * FEW) {
        for (int64_t p = share(t, t->thread, outs); p < share(t, t->thread + 1, outs); p++)
            output_pair(down, E, 2 * p, mid, s, y, D);
    } else {
        int64_t chunk = chunk_size(outs, pairs, t->threads);
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t p = 0; p < outs; p++) output_pair(down, E, 2 * p, mid, s, y, D);
    }
}

/* ---- one token's small operations ---------------------------------------------------------------------------------- */

/* y = x / rms(x) * weight, all of n values; weight in `dtype`. */
ONE void norm_row(const float *x, int64_t n, const void *weight, int64_t dtype, float eps, float *y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    if (dtype == F_F32)
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * ((const float *)weight)[i];
    else
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * from_bf16(((const uint16_t *)weight)[i]);
}

/* heads x K values rotated in place, the half-split layout; c and s are this position's rows of the tables. */
static void rope_row(void *x, int64_t dtype, int64_t start, int64_t heads, int64_t K, const float *c, const float *s) {
    int64_t half = K / 2;
    for (int64_t h = 0; h < heads; h++) {
        int64_t at = start + h * K;
        for (int64_t i = 0; i < half; i++) {
            float a = load1(x, dtype, at + i), b = load1(x, dtype, at + half + i);
            store1(x, dtype, at + i, a * c[i] - b * s[i]);
            store1(x, dtype, at + half + i, b * c[half + i] + a * s[half + i]);
        }
    }
}

/* Softmax over E scores x W^T, the best A of them (of equal ones the first), summing to 1 if `normalise`. W float32
   [E, D]. */
ONE void route_row(const float *x, int64_t D, const float *W, int64_t E, int64_t A, int64_t normalise, float *weights,
                   int64_t *experts) {
    float score[E], most = -INFINITY, total = 0, kept = 0;
    for (int64_t e = 0; e < E; e++) {
        float sum = 0;
        const float *w = W + e * D;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < D; d++) sum += x[d] * w[d];
        score[e] = sum, most = sum > most ? sum : most;
    }
    for (int64_t e = 0; e < E; e++) total += score[e] = expf(score[e] - most);
    for (int64_t a = 0; a < A; a++) {
        int64_t best = 0;
        for (int64_t e = 1; e < E; e++)
            if (score[e] > score[best]) best = e;
        weights[a] = score[best] / total, experts[a] = best;
        kept += score[best] / total, score[best] = -1;
    }
    if (normalise)
        for (int64_t a = 0; a < A; a++) weights[a] /= kept;
}

/* ---- attention over paged keys and values [blocks, block_size, G, K] ------------------------------------------------ */

typedef struct {
    const void *keys, *values;
    int64_t dtype, block_size, G, K, window; /* window 0: none */
} Pages;

/* Softmax of n scores in place. */
ONE void softmax_(float *scores, int64_t n) {
    float most = -INFINITY, total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < n; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < n; t++) {
        scores[t] = exp_(scores[t] - most);
        total += scores[t];
    }
    for (int64_t t = 0; t < n; t++) scores[t] /= total;
}

static inline int64_t page_offset(const Pages *p, const int32_t *blocks, int64_t t, int64_t g) {
    return (((int64_t)blocks[t / p->block_size] * p->block_size + t % p->block_size) * p->G + g) * p->K;
}

/* The heads of one group (n of them, n <= GROUP) over the T positions of one sequence; keys and values are read once for
   all. q [n, K], scaled; scores [n, T]; out [n, K]. */
#define GROUP 4

ONE void attend_plain(const Pages *p, const float *q, int n, const int32_t *blocks, int64_t first, int64_t T, int64_t g,
                      float *scores, float *out) {
    for (int64_t t = first; t < T; t++) {
        int64_t at = page_offset(p, blocks, t, g);
        for (int h = 0; h < n; h++) {
            float sum = 0;
            const float *qh = q + h * p->K, *k = (const float *)p->keys + at;
            const uint16_t *k16 = (const uint16_t *)p->keys + at;
            if (p->dtype == F_F32) {
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < p->K; i++) sum += qh[i] * k[i];
            } else {
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < p->K; i++) sum += qh[i] * from_bf16(k16[i]);
            }
            scores[h * T + t] = sum;
        }
    }
    for (int h = 0; h < n; h++) softmax_(scores + h * T + first, T - first);
    memset(out, 0, n * p->K * sizeof(float));
    for (int64_t t = first; t < T; t++) {
        int64_t at = page_offset(p, blocks, t, g);
        for (int h = 0; h < n; h++) {
            float weight = scores[h * T + t], *to = out + h * p->K;
            if (p->dtype == F_F32)
                for (int64_t i = 0; i < p->K; i++) to[i] += weight * ((const float *)p->values)[at + i];
            else
                for (int64_t i = 0; i < p->K; i++) to[i] += weight * from_bf16(((const uint16_t *)p->values)[at + i]);
        }
    }
}

#if defined(__AVX512F__)

/* 32 bf16 numbers as two float vectors: those at even places, those at odd ones. */
static inline __m512 evens(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }

static inline __m512 odds(__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }

/* Ask for the key some positions ahead, and for this position's value, which the second pass needs: they lie in short
   pieces, which the hardware does not foresee. */
static inline __attribute__((always_inline)) void fetch_ahead(const Pages *p, const int32_t *blocks, int64_t t, int64_t T,
                                                              int64_t g, const int parts) {
    const uint16_t *k = (const uint16_t *)p->keys + page_offset(p, blocks, min64(t + 16, T - 1), g);
    const uint16_t *v = (const uint16_t *)p->values + page_offset(p, blocks, t, g);
    for (int i = 0; i < parts; i++) __builtin_prefetch(k + 32 * i), __builtin_prefetch(v + 32 * i);
}

/* attend_plain for bf16 pages and K = 32 parts, with everything but keys and values in registers. */
static inline __attribute__((always_inline)) void attend_bf16(const Pages *p, const float *q, const int n, const int parts,
                                                              const int32_t *blocks, int64_t first, int64_t T, int64_t g,
                                                              float *scores, float *out) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i front = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    __m512 a[GROUP][8], b[GROUP][8]; /* the query, then the sums, split in even and odd places */
    for (int h = 0; h < n; h++)
        for (int i = 0; i < parts; i++) {
            __m512 low = _mm512_loadu_ps(q + h * p->K + 32 * i), high = _mm512_loadu_ps(q + h * p->K + 32 * i + 16);
            a[h][i] = _mm512_permutex2var_ps(low, even, high), b[h][i] = _mm512_permutex2var_ps(low, odd, high);
        }
    for (int64_t t = first; t < T; t++) {
        const uint16_t *k = (const uint16_t *)p->keys + page_offset(p, blocks, t, g);
        fetch_ahead(p, blocks, t, T, g, parts);
        __m512 sum[GROUP];
        for (int h = 0; h < n; h++) sum[h] = _mm512_setzero_ps();
        for (int i = 0; i < parts; i++) {
            __m512i x = _mm512_loadu_si512(k + 32 * i);
            for (int h = 0; h < n; h++)
                sum[h] = _mm512_fmadd_ps(odds(x), b[h][i], _mm512_fmadd_ps(evens(x), a[h][i], sum[h]));
        }
        for (int h = 0; h < n; h++) scores[h * T + t] = _mm512_reduce_add_ps(sum[h]);
    }
    for (int h = 0; h < n; h++) {
        softmax_(scores + h * T + first, T - first);
        for (int i = 0; i < parts; i++) a[h][i] = b[h][i] = _mm512_setzero_ps();
    }
    for (int64_t t = first; t < T; t++) {
        const uint16_t *v = (const uint16_t *)p->values + page_offset(p, blocks, t, g);
        for (int i = 0; i < parts; i++) {
            __m512i x = _mm512_loadu_si512(v + 32 * i);
            for (int h = 0; h < n; h++) {
                __m512 weight = _mm512_set1_ps(scores[h * T + t]);
                a[h][i] = _mm512_fmadd_ps(evens(x), weight, a[h][i]), b[h][i] = _mm512_fmadd_ps(odds(x), weight, b[h][i]);
            }
        }
    }
    for (int h = 0; h < n; h++)
        for (int i = 0; i < parts; i++) {
            _mm512_storeu_ps(out + h * p->K + 32 * i, _mm512_permutex2var_ps(a[h][i], front, b[h][i]));
            _mm512_storeu_ps(out + h * p->K + 32 * i + 16, _mm512_permutex2var_ps(a[h][i], back, b[h][i]));
        }
}

#endif

ONE void attend_heads(const Pages *p, const float *q, int n, const int32_t *blocks, int64_t T, int64_t g, float *scores,
                      float *out) {
    int64_t first = p->window && T > p->window ? T - p->window : 0;
#if defined(__AVX512F__)
#define HEADS(n_, parts_)                                                                                              \
    if (n == n_ && p->K == 32 * parts_ && p->dtype == F_BF16) {                                                        \
        attend_bf16(p, q, n_, parts_, blocks, first, T, g, scores, out);                                               \
        return;                                                                                                        \
    }
    HEADS(1, 2) HEADS(2, 2) HEADS(3, 2) HEADS(4, 2) HEADS(1, 4) HEADS(2, 4) HEADS(3, 4) HEADS(4, 4)
#endif
    attend_plain(p, q, n, blocks, first, T, g, scores, out);
}

/* y [R, H, K] (float32) of sequence r's query (one token) for the heads that share group g. scores: scratch of this
   thread, GROUP (longest + K). */
static void attend_group(const Pages *p, const void *q, int64_t r, int64_t g, int64_t H, const int32_t *lengths,
                         const int32_t *tables, int64_t width, float scale, int64_t longest, float *scores, float *y) {
    int64_t each = H / p->G;
    for (int64_t first = 0; first < each; first += GROUP) {
        int n = (int)min64(GROUP, each - first);
        int64_t at = (r * H + g * each + first) * p->K;
        float *query = scores + GROUP * longest;
        load_row(query, q, p->dtype, at, n * p->K);
        for (int64_t i = 0; i < n * p->K; i++) query[i] *= scale;
        attend_heads(p, query, n, tables + r * width, lengths[r], g, scores, y + at);
    }
}
