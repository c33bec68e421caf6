/* Attention of tokens over paged keys and values [blocks, block_size, G, K]. Part of native.c; letters as in parts.h. */

typedef struct {
    const void *keys, *values;
    int64_t dtype, block_size, G, K, window; /* window 0: none */
} Pages;

/* n scores in place to e^(score - the largest); returns the factor that makes them sum to 1. */
ONE float softmax_(float *scores, int64_t n) {
    float most = -INFINITY, total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < n; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < n; t++) {
        scores[t] = exp_(scores[t] - most);
        total += scores[t];
    }
    return 1.0f / total;
}

/* The slots of positions first .. T, counted from the first: the pool's position of each, so that no loop divides. */
static void find_places(const Pages *p, const int32_t *blocks, int64_t first, int64_t T, int32_t *places) {
    for (int64_t t = first; t < T;) {
        int64_t within = t % p->block_size, n = min64(p->block_size - within, T - t);
        int32_t slot = (int32_t)(blocks[t / p->block_size] * p->block_size + within);
        for (int64_t i = 0; i < n; i++) places[t - first + i] = slot + (int32_t)i;
        t += n;
    }
}

#define GROUP 4  /* heads that share one reading of keys and values */
#define BLOCK 16 /* positions that are handled together: a vector of scores */
#define AHEAD 16 /* positions that are asked for before they are needed */

typedef struct { /* up to GROUP heads of one group */
    const void *q;   /* [n, K], of the pages' dtype */
    float *scores;   /* [n, T] */
    float *out;      /* [n, K]; of bf16 dot products, until finish, split in even and odd places */
    int64_t n, g;
} Heads;

typedef struct { /* one sequence's positions */
    const int32_t *places;
    int64_t T;
    float scale;
    int fetch; /* whether what comes next is to be asked for */
} Span;

static inline int64_t place(const Pages *p, const Span *s, const Heads *h, int64_t t) {
    return ((int64_t)s->places[t] * p->G + h->g) * p->K;
}

ONE void score_plain(const Pages *p, const Span *s, const Heads *h, int64_t t, int64_t end) {
    float query[GROUP * p->K], key[p->K];
    load_row(query, h->q, p->dtype, 0, h->n * p->K);
    for (; t < end; t++) {
        load_row(key, p->keys, p->dtype, place(p, s, h, t), p->K);
        for (int64_t n = 0; n < h->n; n++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < p->K; i++) sum += query[n * p->K + i] * key[i];
            h->scores[n * s->T + t] = sum * s->scale;
        }
    }
}

ONE void value_plain(const Pages *p, const Span *s, const Heads *h, int64_t t, int64_t end) {
    float value[p->K];
    if (t == 0) memset(h->out, 0, h->n * p->K * sizeof(float));
    for (; t < end; t++) {
        load_row(value, p->values, p->dtype, place(p, s, h, t), p->K);
        for (int64_t n = 0; n < h->n; n++)
            for (int64_t i = 0; i < p->K; i++) h->out[n * p->K + i] += h->scores[n * s->T + t] * value[i];
    }
}

ONE void finish_plain(const Pages *p, const Heads *h, const float *factors) {
    for (int64_t n = 0; n < h->n; n++)
        for (int64_t i = 0; i < p->K; i++) h->out[n * p->K + i] *= factors[n];
}

#include "attention_wide.h"
#if BF16_DOT
#include "attention_avx512.h"
#endif

/* score_.. and value_.. for what is known when it is compiled: the number of heads, and K. */
#define HEADS(work, n_, K_)                                                                                            \
    case n_ * 256 + K_: work(p, s, h, n_, K_, t, end); return;
#define EACH(work)                                                                                                     \
    switch (h->n * 256 + p->K) {                                                                                       \
        HEADS(work, 1, 64) HEADS(work, 2, 64) HEADS(work, 3, 64) HEADS(work, 4, 64)                                    \
        HEADS(work, 1, 128) HEADS(work, 2, 128) HEADS(work, 3, 128) HEADS(work, 4, 128)                                \
    }

static void score_block(const Pages *p, const Span *s, const Heads *h, int64_t t, int64_t end) {
#if BF16_DOT
    if (p->dtype == F_BF16) {
        EACH(score_bf16)
    }
#endif
    EACH(score_wide)
    score_plain(p, s, h, t, end);
}

static void value_block(const Pages *p, const Span *s, const Heads *h, int64_t t, int64_t end) {
#if BF16_DOT
    if (p->dtype == F_BF16) {
        EACH(value_bf16)
    }
#endif
    EACH(value_wide)
    value_plain(p, s, h, t, end);
}

static void finish(const Pages *p, const Heads *h, const float *factors) {
#if BF16_DOT
    if (p->dtype == F_BF16 && (p->K == 64 || p->K == 128)) {
        finish_bf16(p, h, factors);
        return;
    }
#endif
    finish_plain(p, h, factors);
}

/* ---- a task: some heads of one sequence's query, or of a few in a row --------------------------------------------------- */

#define RUN 4 /* neighbouring tokens of a prompt that are handled together: keys and values are in the nearest cache then */

/* Heads that one thread takes together. All of them, where there are enough sequences for all threads: then keys and values
   are read as they lie, one position behind the other. But the scores must stay in the cache. With few sequences any number
   (1), so that all threads get as much. */
static int64_t heads_at_once(int64_t R, int64_t H, int64_t G, int64_t longest, int64_t threads) {
    if (R < 2 * threads) return 1;
    return H * longest <= 1 << 16 ? H : H / G;
}

/* Floats of scratch that a thread needs for contexts up to `longest`: scores of `heads`, and the places (int32). */
static int64_t attention_scratch(int64_t heads, int64_t longest) { return (heads + 1) * longest + 16; }

/* Where sequence r's attention begins. */
static int64_t first_seen(const Pages *p, int64_t length) {
    return p->window && length > p->window ? length - p->window : 0;
}

/* How many of the queries from r on are neighbours of one prompt, each seeing one position more than the one before. */
static int64_t run_length(const Pages *p, int64_t r, int64_t R, const int32_t *lengths, const int32_t *tables, int64_t width) {
    int64_t n = 1;
    for (; n < RUN && r + n < R; n++) {
        int64_t length = lengths[r + n], blocks = (length + p->block_size - 1) / p->block_size;
        if (length != lengths[r] + n || first_seen(p, length)) break;
        if (memcmp(tables + r * width, tables + (r + n) * width, blocks * sizeof(int32_t))) break;
    }
    return n;
}

/* Ask for the keys or values of the first of these places: the loops over positions ask for those further on. */
static void fetch_rows(const Pages *p, const void *rows, const int32_t *places, int64_t n) {
    int64_t size = p->G * p->K * (p->dtype == F_F32 ? 4 : 2);
    for (int64_t t = 0; t < min64(n, AHEAD); t++)
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch((const char *)rows + places[t] * size + i);
}

/* Ask for what sequence r begins with: its first keys, and where its new token's go. */
static void fetch_sequence(const Pages *p, const int32_t *blocks, int64_t length, int64_t slot) {
    int32_t places[AHEAD], last = (int32_t)slot;
    int64_t first = first_seen(p, length), n = min64(AHEAD, length - first);
    find_places(p, blocks, first, first + n, places);
    fetch_rows(p, p->keys, places, n), fetch_rows(p, p->keys, &last, 1), fetch_rows(p, p->values, &last, 1);
}

/* Heads first .. last of a query with its scores and its part of y, cut where groups end and where they are too many. */
static int64_t cut_heads(const Pages *p, const Span *s, const char *q, int64_t first, int64_t last, int64_t each,
                         float *scores, float *y, Heads *to) {
    int64_t n = 0, size = p->K * (p->dtype == F_F32 ? 4 : 2);
    for (int64_t h = first; h < last; h += to[n++].n) {
        int64_t end = min64(min64((h / each + 1) * each, last), h + GROUP);
        to[n] = (Heads){q + h * size, scores + (h - first) * s->T, y + h * p->K, end - h, h / each};
    }
    return n;
}

/* y [R, H, K] (float32) for the heads first .. last of the queries r .. r + count, which are a run. */
static void attend_heads(const Pages *p, const void *q, int64_t r, int64_t count, int64_t first, int64_t last, int64_t H,
                         const int32_t *lengths, const int32_t *tables, int64_t width, float scale, float *scratch,
                         float *y) {
    int64_t heads = last - first, all = lengths[r + count - 1], start = first_seen(p, all), T = all - start, n = 0;
    int32_t *places = (int32_t *)scratch;
    int64_t query = H * p->K, size = query * (p->dtype == F_F32 ? 4 : 2);
    Span spans[RUN];
    Heads cut[RUN * heads];
    find_places(p, tables + r * width, start, all, places);
    for (int64_t c = 0; c < count; c++) {
        spans[c] = (Span){places, lengths[r + c] - start, scale, c == 0};
        n = cut_heads(p, &spans[c], (const char *)q + (r + c) * size, first, last, H / p->G, scratch + (1 + c * heads) * T,
                      y + (r + c) * query, cut + c * n);
    }
    for (int64_t t = 0; t < T; t += BLOCK)
        for (int64_t i = 0; i < count * n; i++)
            if (t < spans[i / n].T) score_block(p, &spans[i / n], &cut[i], t, min64(t + BLOCK, spans[i / n].T));
    fetch_rows(p, p->values, places, T);
    float factors[RUN * heads], *factor = factors;
    for (int64_t i = 0; i < count * n; i++)
        for (int64_t h = 0; h < cut[i].n; h++) *factor++ = softmax_(cut[i].scores + h * spans[i / n].T, spans[i / n].T);
    for (int64_t t = 0; t < T; t += BLOCK)
        for (int64_t i = 0; i < count * n; i++)
            if (t < spans[i / n].T) value_block(p, &spans[i / n], &cut[i], t, min64(t + BLOCK, spans[i / n].T));
    factor = factors;
    for (int64_t i = 0; i < count * n; factor += cut[i++].n) finish(p, &cut[i], factor);
}
