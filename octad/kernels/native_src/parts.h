/* The decoder's operations as parts of one parallel region: every thread of the region calls them together. Part of
   native.c. Those named *_part share their loop out among the threads and end when all have come.

   Letters: N tokens, D model, O outputs, K inputs or head dimension, E experts, A experts a token, F feed-forward hidden,
   H heads, G key/value heads, R sequences. */

/* ---- the threads of a region ----------------------------------------------------------------------------------- */

#define FEW 2 /* rows that each thread prepares for itself, which is quicker than waiting for another */

#define SHARED 64 /* rows up to which each thread has its fixed part of the weights: one run, that memory reads quickest */

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

/* How many neighbouring panels a thread takes at a time where arithmetic counts: small pieces share it out evenly. (With few
   rows the weights come from memory, and runs of 9 kB read at a third of the bandwidth of runs of 150 kB.) */
static int64_t chunk_size(int64_t panels, int64_t threads) { return (panels + 16 * threads - 1) / (16 * threads); }

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
    for (int64_t n = 0; n < N; n += ROWS) {
        int count = (int)min64(ROWS, N - n);
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
    if (N <= SHARED) {
        for (int64_t task = share(t, t->thread, total); task < share(t, t->thread + 1, total); task++)
            linear_task(w, task, x, N, y, dtype, biases);
    } else {
        int64_t chunk = chunk_size(total, t->threads);
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

/* 16 hidden values of one expert, for the pairs first .. last that chose it; h [pairs, F]; see experts_part for x and taken. */
static void hidden_panel(const Weight *gate, const Weight *up, int64_t p, const Rows *x, const Rows *taken, const Slots *s,
                         int64_t first, int64_t last, float *h, int64_t F) {
    const uint8_t *data[2] = {panel_at(gate, p), panel_at(up, p)};
    int outs[2] = {panel_outputs(gate, p), panel_outputs(up, p)};
    float gu[2 * ROWS * PANEL], *u = gu + ROWS * PANEL;
    for (int64_t slot = first; slot < last; slot += ROWS) {
        Row rows[ROWS];
        int n = (int)min64(ROWS, last - slot);
        for (int r = 0; r < n; r++) rows[r] = taken ? taken->rows[slot + r] : x->rows[s->token[slot + r]];
        panels(gate, data, outs, 2, slot > first ? 0 : gate->step, rows, n, gu);
        for (int r = 0; r < n; r++) {
            float *to = h + (slot + r) * F + p * PANEL;
            for (int j = 0; j < outs[0]; j++) to[j] = silu(gu[r * PANEL + j]) * u[r * PANEL + j];
        }
    }
}

/* Panels whose hidden values are whole groups of the second half's inputs. */
static int64_t panels_a_group(const Weight *down) {
    int64_t panels = 1;
    while (panels * PANEL % down->group) panels++;
    return panels;
}

/* One task of the first half: the hidden values of a few panels, left in mid as the second half takes them. Who made them
   rounds them, while they are in its cache. */
static void hidden_task(const Weight *gate, const Weight *up, int64_t task, int64_t each, int64_t size, const Rows *x,
                        const Rows *taken, const Slots *s, float *h, Rows *mid) {
    int64_t e = s->active[task / each], F = gate->outputs, p = task % each * size, last = min64(p + size, panel_count(gate));
    int64_t start = p * PANEL, n = min64(last * PANEL, F) - start;
    for (; p < last; p++) hidden_panel(&gate[e], &up[e], p, x, taken, s, s->start[e], s->start[e + 1], h, F);
    for (int64_t slot = s->start[e]; slot < s->start[e + 1]; slot++)
        rows_set_part(mid, slot, start, n, h + slot * F + start);
}

/* Panels p and p + 1 of the outputs, of one expert's tokens. next: the panel that comes behind. */
static void output_pair(const Weight *down, int64_t p, const uint8_t *next, const Rows *h, const Slots *s, int64_t first,
                        int64_t last, float *y, int64_t D) {
    int P = p + 1 < panel_count(down) ? 2 : 1;
    int outs[2] = {panel_outputs(down, p), panel_outputs(down, p + P - 1)};
    const uint8_t *data[2] = {panel_at(down, p), panel_at(down, p + P - 1)};
    float out[2 * ROWS * PANEL];
    for (int64_t slot = first; slot < last; slot += ROWS) {
        int n = (int)min64(ROWS, last - slot);
        panels(down, data, outs, P, slot > first ? 0 : next - data[0], h->rows + slot, n, out);
        for (int i = 0; i < P; i++)
            for (int r = 0; r < n; r++) {
                float *to = y + s->token[slot + r] * D + (p + i) * PANEL, *o = out + (i * ROWS + r) * PANEL;
                for (int j = 0; j < outs[i]; j++) to[j] += s->weight[slot + r] * o[j];
            }
    }
}

/* The pairs first .. last of output panels, expert by expert: each one's panels lie in one piece. */
static void output_pairs(const Weight *down, int64_t first, int64_t last, const Rows *h, const Slots *s, float *y, int64_t D) {
    for (int64_t a = 0; a < s->count && first < last; a++) {
        int64_t e = s->active[a], then = a + 1 < s->count ? s->active[a + 1] : e;
        for (int64_t p = first; p < last; p++) {
            const uint8_t *next = p + 1 < last ? panel_at(&down[e], 2 * p + 2) : panel_at(&down[then], 2 * first);
            output_pair(&down[e], 2 * p, next, h, s, s->start[e], s->start[e + 1], y, D);
        }
    }
}

/* y [N, D] (float32) += the weighted experts of the rows x; h [pairs, F] and mid are scratch that all threads share. x and
   s are the thread's own where the team is alone. taken: null, or room for the rows of all pairs in their order, as tiles
   want them. The caller waits for the others. */
static void experts_part(const Team *t, const Weight *gate, const Weight *up, const Weight *down, const Rows *x, Rows *taken,
                         const Slots *s, int64_t pairs, float *h, Rows *mid, float *y) {
    int64_t size = panels_a_group(down), each = (panel_count(gate) + size - 1) / size, total = s->count * each;
    int64_t D = gate->inputs, outs = (panel_count(down) + 1) / 2;
    if (taken) {
        for (int64_t slot = share(t, t->thread, pairs); slot < share(t, t->thread + 1, pairs); slot++)
            rows_copy(taken, slot, x, s->token[slot]);
        meet(t);
    }
    if (pairs <= SHARED) {
        for (int64_t task = share(t, t->thread, total); task < share(t, t->thread + 1, total); task++)
            hidden_task(gate, up, task, each, size, x, taken, s, h, mid);
        for (int64_t i = 0; i < s->count; i++) fetch_part(t, &down[s->active[i]], 1);
    } else {
        int64_t chunk = chunk_size(total, t->threads);
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t task = 0; task < total; task++) hidden_task(gate, up, task, each, size, x, taken, s, h, mid);
    }
    meet(t);
    if (pairs <= SHARED) {
        output_pairs(down, share(t, t->thread, outs), share(t, t->thread + 1, outs), mid, s, y, D);
    } else {
        int64_t chunk = chunk_size(outs, t->threads);
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t p = 0; p < outs; p++) output_pairs(down, p, p + 1, mid, s, y, D);
    }
}

/* ---- one token's small operations ---------------------------------------------------------------------------------- */

/* y = x / rms(x) * weight, all of n values; weight in `dtype`. Returns 1 / rms(x). */
ONE float norm_row(const float *x, int64_t n, const void *weight, int64_t dtype, float eps, float *y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    if (dtype == F_F32)
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * ((const float *)weight)[i];
    else
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * from_bf16(((const uint16_t *)weight)[i]);
    return scale;
}

/* One head's K values rotated, the half-split layout; c and s are the position's rows of the tables. turn: 1, or -1 for the
   way back. */
ONE void rotate_head(const float *x, int64_t K, const float *c, const float *s, float turn, float *y) {
    const float *a = x, *b = x + K / 2, *d = c + K / 2, *t = s + K / 2;
    for (int64_t i = 0; i < K / 2; i++) y[i] = a[i] * c[i] - turn * b[i] * s[i];
    for (int64_t i = 0; i < K / 2; i++) y[K / 2 + i] = b[i] * d[i] + turn * a[i] * t[i];
}

/* heads x K values rotated in place. */
static void rope_row(void *x, int64_t dtype, int64_t start, int64_t heads, int64_t K, const float *c, const float *s) {
    float from[K], to[K];
    for (int64_t at = start; at < start + heads * K; at += K) {
        load_row(from, x, dtype, at, K);
        rotate_head(from, K, c, s, 1.0f, to);
        store_row(x, dtype, at, to, K);
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
