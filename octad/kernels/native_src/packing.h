/* Weights rounded and laid out in panels: what packed.py does in PyTorch, in one pass over memory. Part of native.c.

   Bit for bit packed.py's integers and scales, for finite weights: divisions are true ones, and the sums of squared errors
   are taken in float64 in eight lanes. There and in q * scale products are exact, so that it does not matter whether the
   compiler joins them with the sum that follows.

   Letters: O outputs, K inputs, K' K padded to whole groups, G groups of inputs. */

typedef struct {
    const void *from; /* [O, K] in dtype, rows `stride` values apart */
    int64_t dtype, stride, outputs, inputs, bits, group;
    const float *cost; /* [K'], of an error in each input; none: all count the same. At 4 bits alone */
} Plain;

static int64_t group_count(const Plain *w) { return (w->inputs + w->group - 1) / w->group; }

static int round_some(const Plain *w, int64_t k, const float *x, uint8_t *raw, uint16_t *scale) {
    if (w->bits == 8) return round8(x, w->group, raw, scale);
    return w->cost ? round4_dear(x, w->cost + k, w->group, raw, scale) : round4(x, w->group, raw, scale);
}

/* Row o in unsigned integers raw [K'] and scales [G]; x is scratch [K']. */
static int round_weights(const Plain *w, int64_t o, float *x, uint8_t *raw, uint16_t *scales) {
    int64_t padded = round_up(w->inputs, w->group), failed = 0;
    load_row(x, w->from, w->dtype, o * w->stride, w->inputs);
    memset(x + w->inputs, 0, (padded - w->inputs) * sizeof(float));
    for (int64_t k = 0; k < padded; k += w->group)
        failed |= round_some(w, k, x + k, raw + k, scales + k / w->group);
    return (int)failed;
}

/* A panel of rows [16] of words [count] each, word by word. */
static void lay_words(const uint32_t *rows, int64_t stride, int64_t count, uint32_t *to) {
    for (int64_t i = 0; i < count; i++)
        for (int o = 0; o < PANEL; o++) to[i * PANEL + o] = rows[o * stride + i];
}

/* The same at 4 bits: two words become one. */
static void lay_nibbles(const uint32_t *rows, int64_t stride, int64_t count, uint32_t *to) {
    for (int64_t i = 0; i < count; i++)
        for (int o = 0; o < PANEL; o++)
            to[i * PANEL + o] = rows[o * stride + 2 * i] | rows[o * stride + 2 * i + 1] << 4;
}

/* Integers raw [16, K'] and scales [16, G], of `stride` groups a row, as a panel. */
static void lay_panel(const uint8_t *raw, const uint16_t *scales, int64_t stride, int64_t groups, int64_t group,
                      int64_t bits, uint8_t *to) {
    for (int64_t g = 0; g < groups; g++) {
        if (g % 2 == 0) {
            uint16_t *head = (uint16_t *)to;
            for (int64_t i = 0; i < 2 * PANEL; i++) {
                int64_t at = g + i / PANEL;
                head[i] = at < groups ? scales[i % PANEL * stride + at] : 0;
            }
            to += 4 * PANEL;
        }
        const uint32_t *from = (const uint32_t *)(raw + g * group);
        int64_t words = group * bits / 32;
        (bits == 8 ? lay_words : lay_nibbles)(from, stride * group / 4, words, (uint32_t *)to);
        to += words * 4 * PANEL;
    }
}

/* Floats: rows first .. of the weight as a panel of float32 or (16 bits) bfloat16. x is scratch [16, K']. */
static void lay_floats(const Plain *w, int64_t first, float *x, uint8_t *to) {
    int64_t padded = round_up(w->inputs, w->group), size = w->bits / 8, last = min64(first + PANEL, w->outputs);
    memset(x, 0, PANEL * padded * size);
    for (int64_t o = first; o < last; o++) {
        char *row = (char *)x + (o - first) * padded * size;
        if (size == 4) load_row((float *)row, w->from, w->dtype, o * w->stride, w->inputs);
        else if (w->dtype == F_BF16) memcpy(row, (const uint16_t *)w->from + o * w->stride, w->inputs * 2);
        else store_row(row, F_BF16, 0, (const float *)w->from + o * w->stride, w->inputs);
    }
    lay_words((const uint32_t *)x, padded * size / 4, padded * size / 4, (uint32_t *)to);
}

static int lay_rounded(const Plain *w, int64_t first, float *x, uint8_t *raw, uint16_t *scales, uint8_t *to) {
    int64_t groups = group_count(w), padded = groups * w->group;
    int failed = 0;
    memset(raw, 1 << (w->bits - 1), PANEL * padded);
    memset(scales, 0, PANEL * groups * sizeof(uint16_t));
    for (int64_t o = first; o < min64(first + PANEL, w->outputs); o++)
        failed |= round_weights(w, o, x, raw + (o - first) * padded, scales + (o - first) * groups);
    lay_panel(raw, scales, groups, groups, w->group, w->bits, to);
    return failed;
}

/* A weight [O, K] as panels, which are `step` bytes apart. 3 where a value that is to be rounded is not finite. */
int NAME(pack)(const void *from, int64_t dtype, int64_t stride, int64_t outputs, int64_t inputs, int64_t bits,
               int64_t group, const float *cost, uint8_t *panels, int64_t step, int64_t threads) {
    Plain w = {from, dtype, stride, outputs, inputs, bits, group, cost};
    int64_t groups = group_count(&w), padded = groups * group, count = (outputs + PANEL - 1) / PANEL;
    int missing = 0, odd = 0;
#pragma omp parallel num_threads(threads) reduction(| : missing, odd)
    {
        float *x = malloc((bits > 8 ? PANEL : 1) * padded * sizeof(float) + 64);
        uint8_t *raw = malloc(PANEL * padded + 64);
        uint16_t *scales = malloc(PANEL * groups * sizeof(uint16_t) + 64);
        missing = !x || !raw || !scales;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count; p++) {
            if (missing) continue;
            if (bits > 8) lay_floats(&w, p * PANEL, x, panels + p * step);
            else odd |= lay_rounded(&w, p * PANEL, x, raw, scales, panels + p * step);
        }
        free(x), free(raw), free(scales);
    }
    return missing ? 1 : (odd ? 3 : 0);
}

/* A weight [O, K] as unsigned integers raw [O, K'] and scales [O, G]. As pack. */
int NAME(quantise)(const void *from, int64_t dtype, int64_t stride, int64_t outputs, int64_t inputs, int64_t bits,
                   int64_t group, const float *cost, uint8_t *raw, uint16_t *scales, int64_t threads) {
    Plain w = {from, dtype, stride, outputs, inputs, bits, group, cost};
    int64_t groups = group_count(&w), padded = groups * group;
    int missing = 0, odd = 0;
#pragma omp parallel num_threads(threads) reduction(| : missing, odd)
    {
        float *x = malloc(padded * sizeof(float) + 64);
        missing = !x;
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o++)
            if (!missing) odd |= round_weights(&w, o, x, raw + o * padded, scales + o * groups);
        free(x);
    }
    return missing ? 1 : (odd ? 3 : 0);
}

/* Integers raw [O, K'] and scales [O, G] as panels, which are `step` bytes apart. */
int NAME(pack_raw)(const uint8_t *raw, const uint16_t *scales, int64_t outputs, int64_t groups, int64_t group,
                   int64_t bits, uint8_t *panels, int64_t step, int64_t threads) {
    int64_t padded = groups * group, count = (outputs + PANEL - 1) / PANEL;
    int missing = 0;
#pragma omp parallel num_threads(threads) reduction(| : missing)
    {
        uint8_t *some = malloc(PANEL * padded + 64); /* for a last panel with fewer outputs */
        uint16_t *heads = malloc(PANEL * groups * sizeof(uint16_t) + 64);
        missing = !some || !heads;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count; p++) {
            const uint8_t *rows = raw + p * PANEL * padded;
            const uint16_t *own = scales + p * PANEL * groups;
            int64_t there = min64(PANEL, outputs - p * PANEL);
            if (missing) continue;
            if (there < PANEL) {
                memset(some, 1 << (bits - 1), PANEL * padded), memset(heads, 0, PANEL * groups * sizeof(uint16_t));
                memcpy(some, rows, there * padded), memcpy(heads, own, there * groups * sizeof(uint16_t));
                rows = some, own = heads;
            }
            lay_panel(rows, own, groups, groups, group, bits, panels + p * step);
        }
        free(some), free(heads);
    }
    return missing;
}

/* ---- weights on the disk, rounded as they are read ------------------------------------------------------------------ */

#if defined(__unix__) || defined(__APPLE__)
#include <errno.h>
#include <unistd.h>

enum { READ_BYTES = 1 << 18 }; /* at a time: they stay in the processor's cache until they are rounded */

/* Rows of a weight as they lie in a file, and where its panels go. state: 0 not yet, 1 there, else why not: 2 no memory,
   3 not finite, 4 the file cannot be read. */
typedef struct {
    int64_t file, offset, dtype, outputs, inputs, bits, group, step, state;
    uint8_t *panels;
} Task;

static int read_whole(int file, char *to, int64_t count, int64_t offset) {
    while (count > 0) {
        ssize_t got = pread(file, to, count, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 1;
        to += got, offset += got, count -= got;
    }
    return 0;
}

/* What a thread needs beside the panels, as large as the largest task so far asked for. */
typedef struct {
    char *rows;
    float *x;
    uint8_t *raw;
    uint16_t *scales;
    int64_t room;
} Desk;

/* Rows that are read at a time: whole panels. */
static int64_t rows_at_once(int64_t row) {
    return (READ_BYTES / (row * PANEL) > 0 ? READ_BYTES / (row * PANEL) : 1) * PANEL;
}

static int desk_fits(Desk *d, int64_t padded, int64_t row) {
    int64_t need = padded * 4 > row ? padded * 4 : row;
    if (d->room >= need) return 1;
    free(d->rows), free(d->x), free(d->raw), free(d->scales);
    d->rows = malloc(rows_at_once(need) * need > READ_BYTES ? rows_at_once(need) * need : READ_BYTES);
    d->x = malloc(PANEL * need + 64), d->raw = malloc(PANEL * need + 64), d->scales = malloc(PANEL * need + 64);
    d->room = d->rows && d->x && d->raw && d->scales ? need : 0;
    return d->room > 0;
}

static int fill_one(const Task *t, Desk *d) {
    int64_t row = t->inputs * (t->dtype == F_F32 ? 4 : 2), at_once = rows_at_once(row);
    Plain w = {0, t->dtype, t->inputs, 0, t->inputs, t->bits, t->group, 0};
    if (!desk_fits(d, group_count(&w) * t->group, row)) return 2;
    for (int64_t first = 0; first < t->outputs; first += at_once) {
        w.outputs = min64(at_once, t->outputs - first);
        if (read_whole((int)t->file, d->rows, w.outputs * row, t->offset + first * row)) return 4;
        w.from = d->rows;
        for (int64_t q = 0; q < w.outputs; q += PANEL) {
            uint8_t *to = t->panels + (first + q) / PANEL * t->step;
            if (t->bits > 8) lay_floats(&w, q, d->x, to);
            else if (lay_rounded(&w, q, d->x, d->raw, d->scales, to)) return 3;
        }
    }
    return 1;
}

/* Weights as panels, each as `pack` lays it out. Several threads may call this with the same tasks at once: `next` is the
   number of the first that nobody has begun, and a number past the last ends them all. */
int NAME(fill)(Task *tasks, int64_t count, int64_t *next) {
    Desk desk = {0};
    for (;;) {
        int64_t mine = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (mine >= count) break;
        __atomic_store_n(&tasks[mine].state, fill_one(tasks + mine, &desk), __ATOMIC_RELEASE);
    }
    free(desk.rows), free(desk.x), free(desk.raw), free(desk.scales);
    return 0;
}
#endif

/* ---- one input after the other ------------------------------------------------------------------------------------ */

#define TILE 64 /* outputs that are rounded together: a group of them stays in the cache */

/* Scales of n outputs of a group x [G], whose rows are `stride` apart; cost [G]: of an error in each input. */
static void scales_by_cost(const float *x, int64_t stride, int64_t G, int64_t n, const float *cost, int64_t bits,
                           const float *sought, int64_t tries, float *scale) {
    float low[TILE], high[TILE], least[TILE];
    for (int64_t o = 0; o < n; o++) low[o] = high[o] = x[o], least[o] = INFINITY;
    for (int64_t i = 1; i < G; i++)
        for (int64_t o = 0; o < n; o++) {
            float v = x[i * stride + o];
            low[o] = v < low[o] ? v : low[o], high[o] = v > high[o] ? v : high[o];
        }
    for (int64_t o = 0; o < n; o++) {
        high[o] = high[o] > -low[o] ? high[o] : low[o];
        if (bits == 8) scale[o] = from_bf16(upward_bf16(fabsf(high[o]) / 127.0f));
        else scale[o] = 0, high[o] /= -8.0f;
    }
    for (int64_t t = 0; bits == 4 && t < tries; t++) {
        float tried[TILE], step[TILE], sum[TILE];
        for (int64_t o = 0; o < n; o++) tried[o] = from_bf16(to_bf16(high[o] * sought[t])), sum[o] = 0;
        for (int64_t o = 0; o < n; o++) step[o] = tried[o] == 0 ? 1.0f : tried[o];
        for (int64_t i = 0; i < G; i++)
#pragma omp simd
            for (int64_t o = 0; o < n; o++) {
                float off = nearest4(x[i * stride + o], step[o]) * tried[o] - x[i * stride + o];
                sum[o] += cost[i] * off * off;
            }
        for (int64_t o = 0; o < n; o++)
            if (sum[o] < least[o]) least[o] = sum[o], scale[o] = tried[o];
    }
}

/* One group's inputs left [G, O] rounded one after the other, as packed.py's round_in_turn: left changes; factor [G, G];
   raw and errors [G, O], scales [O]. */
int NAME(round_in_turn)(float *left, int64_t G, int64_t O, const float *factor, int64_t bits, const float *sought,
                        int64_t tries, uint8_t *raw, uint16_t *scales, float *errors, int64_t threads) {
    float zero = bits == 8 ? 128 : 8, low = bits == 8 ? -127 : -8, high = bits == 8 ? 127 : 7;
    float *cost = malloc(G * sizeof(float));
    if (!cost) return 1;
    for (int64_t i = 0; i < G; i++) cost[i] = 1.0f / (factor[i * G + i] * factor[i * G + i]);
#pragma omp parallel for num_threads(threads) if (G * O > 65536)
    for (int64_t start = 0; start < O; start += TILE) {
        float scale[TILE], step[TILE];
        int64_t n = min64(TILE, O - start);
        scales_by_cost(left + start, O, G, n, cost, bits, sought, tries, scale);
        for (int64_t o = 0; o < n; o++) step[o] = scale[o] == 0 ? 1.0f : scale[o];
        for (int64_t o = 0; o < n; o++) scales[start + o] = scale[o] == 0 ? 0 : to_bf16(scale[o]);
        for (int64_t i = 0; i < G; i++) {
            float *x = left + i * O + start, *error = errors + i * O + start, own = factor[i * G + i];
            uint8_t *to = raw + i * O + start;
#pragma omp simd
            for (int64_t o = 0; o < n; o++) {
                float q = rintf(x[o] / step[o]);
                q = q < low ? low : (q > high ? high : q);
                to[o] = (uint8_t)(int32_t)(q + zero), error[o] = (x[o] - q * scale[o]) / own;
            }
            for (int64_t j = i + 1; j < G; j++)
#pragma omp simd
                for (int64_t o = 0; o < n; o++) left[j * O + start + o] -= factor[i * G + j] * error[o];
        }
    }
    free(cost);
    return 0;
}
