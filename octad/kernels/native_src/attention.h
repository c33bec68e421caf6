/* Attention of tokens over paged keys and values [blocks, block_size, G, K]. Part of native.c; letters as in parts.h. */

typedef struct {
    const void *keys, *values;
    int64_t dtype, block_size, G, K, window; /* window 0: none */
} Pages;

/* n scores in place to e^(score - the largest); returns the largest, and what they sum to. */
ONE float softmax_(float *scores, int64_t n, float *sum) {
    float most = -INFINITY, total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < n; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < n; t++) {
        scores[t] = exp_(scores[t] - most);
        total += scores[t];
    }
    *sum = total;
    return most;
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
#define CHUNK 256 /* positions whose scores are kept at once, and that one thread takes at once; a multiple of BLOCK */

typedef struct { /* up to GROUP heads of one group */
    const void *q;   /* [n, K], of the pages' dtype */
    float *scores;   /* [n, T] */
    float *out;      /* [n, K]; of bf16 dot products, until finish, split in even and odd places */
    int64_t n, g;
} Heads;

typedef struct { /* some positions of a sequence */
    const int32_t *places;
    int64_t T, there; /* positions, and places: those behind are asked for */
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

/* score_.. and value_.. for what is known when it is compiled: the number of heads, K, and the bytes of a number. */
#define HEADS(work, n_, K_, size_)                                                                                     \
    case n_ * 256 + K_: work(p, s, h, n_, K_, size_, t, end); return;
#define EACH(work, size_)                                                                                              \
    switch (h->n * 256 + p->K) {                                                                                       \
        HEADS(work, 1, 64, size_) HEADS(work, 2, 64, size_) HEADS(work, 3, 64, size_) HEADS(work, 4, 64, size_)        \
        HEADS(work, 1, 128, size_) HEADS(work, 2, 128, size_) HEADS(work, 3, 128, size_) HEADS(work, 4, 128, size_)    \
    }
#if BF16_DOT
#define NARROW(kind) kind##_bf16
#else
#define NARROW(kind) kind##_wide
#endif

static void score_block(const Pages *p, const Span *s, const Heads *h, int64_t t, int64_t end) {
    if (p->dtype == F_F32) {
        EACH(score_wide, 4)
    } else
        EACH(NARROW(score), 2)
    score_plain(p, s, h, t, end);
}

static void value_block(const Pages *p, const Span *s, const Heads *h, int64_t t, int64_t end) {
    if (p->dtype == F_F32) {
        EACH(value_wide, 4)
    } else
        EACH(NARROW(value), 2)
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

/* ---- a task: some heads of a chunk, for one query or a few in a row ----------------------------------------------------- */

#define RUN 4 /* neighbouring tokens of a prompt that are handled together: keys and values are in the nearest cache then */

/* What a chunk of positions gives one query: out [H, K], the values weighted by e^(score - most); most and total [H], the
   largest score and the sum of the weights. Chunks begin at the same positions whoever takes them, and are put together in
   their order: so neither threads nor the way in which a text is cut change a bit. */
typedef struct { float *out, *most, *total; } Part;

static int64_t part_size(int64_t H, int64_t K) { return H * (K + 2); }

static Part part_at(float *parts, int64_t i, int64_t H, int64_t K) {
    float *out = parts + i * part_size(H, K);
    return (Part){out, out + H * K, out + H * K + H};
}

/* Heads first .. last of `to`, and those of the chunk behind it, into `to`. */
ONE void join_parts(Part *to, const Part *next, int64_t first, int64_t last, int64_t K) {
    for (int64_t h = first; h < last; h++) {
        float most = to->most[h] > next->most[h] ? to->most[h] : next->most[h];
        float old = exp_(to->most[h] - most), more = exp_(next->most[h] - most);
        to->most[h] = most, to->total[h] = to->total[h] * old + next->total[h] * more;
        for (int64_t i = h * K; i < (h + 1) * K; i++) to->out[i] = to->out[i] * old + next->out[i] * more;
    }
}

/* The answer of heads first .. last, in out. */
static void finish_part(const Pages *p, Part *part, int64_t first, int64_t last) {
    float factors[last - first];
    for (int64_t h = first; h < last; h++) factors[h - first] = 1.0f / part->total[h];
    Heads all_heads = {0, 0, part->out + first * p->K, last - first, 0};
    finish(p, &all_heads, factors);
}

/* Floats of scratch that a thread needs: scores of so many heads of all queries, and the places (int32). */
static int64_t attention_scratch(int64_t heads) { return (heads + 1) * CHUNK + AHEAD + 16; }

/* Where a sequence's attention begins. */
static int64_t first_seen(const Pages *p, int64_t length) {
    return p->window && length > p->window ? length - p->window : 0;
}

static int64_t chunk_count(const Pages *p, int64_t length) { return (length - first_seen(p, length) + CHUNK - 1) / CHUNK; }

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

/* Ask for the keys that a sequence begins with. */
static void fetch_sequence(const Pages *p, const int32_t *blocks, int64_t length) {
    int32_t places[AHEAD];
    int64_t first = first_seen(p, length), n = min64(AHEAD, length - first);
    find_places(p, blocks, first, first + n, places);
    fetch_rows(p, p->keys, places, n);
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

/* A chunk's part of the answer to `count` queries, which are a run: q [count, H, K], lengths [count]; `blocks` are those of
   the last. Of heads first .. last alone. The queries that do not reach as far get nothing; returns how many those are. */
static int64_t attend_chunk(const Pages *p, const char *q, int64_t count, int64_t chunk, int64_t first, int64_t last,
                            int64_t H, const int32_t *lengths, const int32_t *blocks, float scale, float *scratch,
                            Part *parts) {
    int64_t heads = last - first, start = first_seen(p, lengths[count - 1]) + chunk * CHUNK, n = 0, none = 0;
    int64_t there = min64(lengths[count - 1] - start, CHUNK + AHEAD), T = min64(there, CHUNK);
    int64_t size = H * p->K * (p->dtype == F_F32 ? 4 : 2);
    int32_t *places = (int32_t *)scratch;
    float *scores = scratch + CHUNK + AHEAD;
    Span spans[RUN];
    Heads cut[RUN * heads];
    find_places(p, blocks, start, start + there, places);
    while (lengths[none] <= start) none++;
    for (int64_t c = none; c < count; c++, scores += heads * CHUNK) {
        spans[c - none] = (Span){places, min64(lengths[c] - start, CHUNK), there, scale, c == none};
        n = cut_heads(p, &spans[c - none], q + c * size, first, last, H / p->G, scores, parts[c].out, cut + (c - none) * n);
    }
    int64_t all = (count - none) * n;
    for (int64_t t = 0; t < T; t += BLOCK)
        for (int64_t i = 0; i < all; i++)
            if (t < spans[i / n].T) score_block(p, &spans[i / n], &cut[i], t, min64(t + BLOCK, spans[i / n].T));
    fetch_rows(p, p->values, places, T);
    for (int64_t c = none; c < count; c++)
        for (int64_t h = first; h < last; h++) {
            float *row = cut[(c - none) * n].scores + (h - first) * spans[c - none].T;
            parts[c].most[h] = softmax_(row, spans[c - none].T, &parts[c].total[h]);
        }
    for (int64_t t = 0; t < T; t += BLOCK)
        for (int64_t i = 0; i < all; i++)
            if (t < spans[i / n].T) value_block(p, &spans[i / n], &cut[i], t, min64(t + BLOCK, spans[i / n].T));
    fetch_rows(p, p->keys, places + T, there - T);
    return none;
}
