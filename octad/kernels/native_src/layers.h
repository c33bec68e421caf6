/* Whole decoder layers for one new token a sequence, in one parallel region. Part of native.c.

   The composed modules are the slow twin, and bit for bit the same: whatever they store between two modules is rounded to
   `dtype` here too, so that a sequence's text does not depend on which of the two ways its company needs.

   Between two weights lies little work, but each handing-over from one thread to the other costs about as much as reading
   20 kB of weights. So with few rows (FEW) every thread does that work for itself, and only the five results that all the
   threads make together (q k v, attention, its output, the hidden values, the experts' sum) are waited for.

   Letters as in parts.h; L layers. */

typedef struct { /* a layer's experts where some are on the disk */
    int64_t layer;
    const uint8_t *here;     /* [E]: whether an expert is in memory */
    const uint8_t *guessing; /* whether to tell `fetch` what the next layer may want */
    /* brings `count` experts of the layer, all of which are there when it returns, and may begin with `more` of the next */
    void (*fetch)(int64_t layer, const int64_t *experts, int64_t count, const int64_t *next, int64_t more);
} Store;

typedef struct { /* a DecoderLayer's weights and numbers */
    const Weight *qkv, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *o_bias; /* or null */
    const void *input_norm, *post_norm, *q_norm, *k_norm; /* the last two per head, or null */
    const float *router;                                  /* [E, D], or null: the experts are always given */
    int64_t E, normalise, D, H, G, K, window;
    float norm_eps, head_eps, scale;
    const Store *store; /* or null: all experts are in memory */
} Block;

typedef struct { /* what a step's tokens share in all layers */
    int64_t dtype, R, width, block_size, start, given; /* given: weights and experts hold the routing already */
    const int64_t *positions, *slots;                  /* positions null: R is 1 and the position is start */
    const int32_t *lengths, *tables;
    const float *cosines, *sines;
} Step;

typedef struct { /* a whole step of decoding: what stands before the layers and behind them, and what comes out */
    const int64_t *tokens;              /* [R] */
    const void *embedding, *norm;       /* [V, D] of embedding_dtype, [D] of the step's dtype */
    const Weight *head;
    void *logits;                       /* [R, V] of the step's dtype */
    int64_t *likeliest;                 /* [R]: of the largest logits the first; -1 where that is no number */
    int64_t *speakers;                  /* [R]: the experts with the most weight over the layers; and their shares */
    double *shares;                     /* [R] */
    int64_t embedding_dtype;
    float eps;
} Ends;

/* ---- memory ---------------------------------------------------------------------------------------------------- */

typedef struct { /* one thread's */
    float *h, *row, *scores;       /* h [R, D]: what runs through the layers */
    float *weights;                /* [R, A], how the rows are routed; and experts */
    int64_t *experts;
    Rows in, mixed, post[2], last; /* prepared for qkv, o, the experts, and the head */
    Slots slots;
    float *most;                   /* [R]: the largest logit of this thread's part of the vocabulary, */
    int64_t *place;                /* [R]: and where it stands; -1 where one of them is not a number */
} Own;

typedef struct { /* what the threads make together */
    float *memory, *parts, *part, *sum, *q, *k, *v, *hidden;
    int64_t *chunks; /* [R + 1]: where each sequence's parts of attention begin */
    Rows mid[2];             /* prepared for the experts' second half */
    const Block *first;      /* whose weights have the first kind of each two */
    Own *own;
    const Weight *head; /* or null: the layers alone */
} Work;

/* Layers may have their experts' weights in two forms, which want their rows in two. */
static int kind_of(const Weight *w, const Weight *first) { return w->format != first->format || w->group != first->group; }

static const Block *other_kind(const Block *const *blocks, int64_t L, int down) {
    for (int64_t l = 1; l < L; l++)
        if (down ? kind_of(blocks[l]->down, blocks[0]->down) : kind_of(blocks[l]->gate, blocks[0]->gate)) return blocks[l];
    return 0;
}

static int work_alloc(Work *w, const Block *const *blocks, int64_t L, const Step *s, const Weight *head, int64_t A,
                      int64_t threads) {
    const Block *b = blocks[0], *gates = other_kind(blocks, L, 0), *downs = other_kind(blocks, L, 1);
    int64_t N = s->R, D = b->D, HK = b->H * b->K, GK = b->G * b->K, F = b->gate->outputs, pairs = N * A;
    Pages pages = {0, 0, s->dtype, s->block_size, b->G, b->K, 0}; /* a layer with a window has no more chunks */
    w->chunks = malloc((N + 1) * sizeof(int64_t));
    if (!w->chunks) return 1;
    w->chunks[0] = 0;
    for (int64_t r = 0; r < N; r++) w->chunks[r + 1] = w->chunks[r] + chunk_count(&pages, s->lengths[r]);
    int64_t parts = w->chunks[N] * part_size(b->H, b->K);
    int64_t each = N * D + D + part_size(b->H, b->K) + attention_scratch(b->H) + pairs + N + 64;
    w->head = head, w->first = b;
    w->own = calloc(threads, sizeof(Own));
    w->memory = malloc((N * (2 * (D + GK) + HK) + parts + pairs * F + threads * each + 64) * sizeof(float));
    if (!w->own || !w->memory) return 1;
    w->parts = w->memory, w->part = w->parts + parts, w->sum = w->part + N * D, w->q = w->sum + N * D;
    w->k = w->q + N * HK, w->v = w->k + N * GK, w->hidden = w->v + N * GK;
    float *next = w->hidden + pairs * F;
    for (int64_t t = 0; t < threads; t++, next += each) {
        Own *own = &w->own[t];
        own->h = next, own->row = own->h + N * D, own->weights = own->row + D + part_size(b->H, b->K) + 32;
        own->most = own->weights + pairs;
        own->scores = own->most + N;
        own->experts = malloc((pairs + N + 1) * sizeof(int64_t));
        if (!own->experts) return 1;
        own->place = own->experts + pairs;
        for (int64_t n = 0; n < N; n++) own->most[n] = -INFINITY, own->place[n] = 0; /* there may be fewer threads */
        if (slots_alloc(&own->slots, pairs, b->E)) return 1;
        if (t > 0 && N > FEW) continue; /* the first one's rows are everybody's */
        if (rows_alloc(&own->in, N, b->qkv) || rows_alloc(&own->mixed, N, b->o) || rows_alloc(&own->post[0], N, b->gate))
            return 1;
        if (gates && rows_alloc(&own->post[1], N, gates->gate)) return 1;
        if (head && rows_alloc(&own->last, N, head)) return 1;
    }
    return rows_alloc(&w->mid[0], pairs, b->down) || (downs && rows_alloc(&w->mid[1], pairs, downs->down));
}

static void work_free(Work *w, int64_t threads) {
    for (int64_t t = 0; w->own && t < threads; t++) {
        Own *own = &w->own[t];
        rows_free(&own->in), rows_free(&own->mixed), rows_free(&own->post[0]), rows_free(&own->post[1]), rows_free(&own->last);
        slots_free(&own->slots), free(own->experts);
    }
    rows_free(&w->mid[0]), rows_free(&w->mid[1]), free(w->own), free(w->memory), free(w->chunks);
}

/* ---- a layer --------------------------------------------------------------------------------------------------- */

static void norm_heads(const Block *b, const Step *s, void *x, int64_t first, int64_t heads, const void *weight,
                       float *scratch) {
    for (int64_t h = first; weight && h < first + heads; h++) {
        load_row(scratch, x, s->dtype, h * b->K, b->K);
        norm_row(scratch, b->K, weight, s->dtype, b->head_eps, scratch);
        store_row(x, s->dtype, h * b->K, scratch, b->K);
    }
}

/* The rest of attention's input for token n and group g: head norms, rotation, key and value into their slot. */
static void place_group(const Block *b, const Step *s, int64_t n, int64_t g, const Work *w, void *keys, void *values,
                        float *scratch) {
    int64_t K = b->K, each = b->H / b->G, size = s->dtype == F_F32 ? 4 : 2;
    int64_t q = n * b->H + g * each, k = n * b->G + g, slot = s->slots[n] * b->G + g;
    int64_t position = (s->positions ? s->positions[n] : s->start) * K;
    norm_heads(b, s, w->q, q, each, b->q_norm, scratch);
    norm_heads(b, s, w->k, k, 1, b->k_norm, scratch);
    rope_row(w->q, s->dtype, q * K, each, K, s->cosines + position, s->sines + position);
    rope_row(w->k, s->dtype, k * K, 1, K, s->cosines + position, s->sines + position);
    memcpy((char *)keys + slot * K * size, (const char *)w->k + k * K * size, K * size);
    memcpy((char *)values + slot * K * size, (const char *)w->v + k * K * size, K * size);
}

/* How many heads of a chunk of T positions come before so much work, which is counted in positions times heads. */
static int64_t heads_before(int64_t work, int64_t T, int64_t H) { return work <= 0 ? 0 : min64((work + T - 1) / T, H); }

/* The parts of attention of the q, k and v in w: every thread takes as many positions of keys and values. */
static void attention_part(const Block *b, const Step *s, const Pages *p, const Team *t, Work *w, Own *mine, void *keys,
                           void *values) {
    int64_t H = b->H, total = 0, done = 0, size = H * b->K * (s->dtype == F_F32 ? 4 : 2);
    for (int64_t i = share(t, t->thread, s->R * b->G); i < share(t, t->thread + 1, s->R * b->G); i++)
        place_group(b, s, i / b->G, i % b->G, w, keys, values, mine->row);
    meet(t);
    for (int64_t n = 0; n < s->R; n++) total += (s->lengths[n] - first_seen(p, s->lengths[n])) * H;
    int64_t begin = share(t, t->thread, total), end = share(t, t->thread + 1, total);
    for (int64_t n = 0; n < s->R; n++) {
        const int32_t *blocks = s->tables + n * s->width;
        int64_t left = s->lengths[n] - first_seen(p, s->lengths[n]);
        for (int64_t c = 0; left > 0; c++, left -= CHUNK) {
            int64_t T = min64(left, CHUNK), first = heads_before(begin - done, T, H), last = heads_before(end - done, T, H);
            Part part = part_at(w->parts, w->chunks[n] + c, H, b->K);
            done += T * H;
            if (first == last) continue;
            if (left <= CHUNK && done < end) fetch_sequence(p, blocks + s->width, s->lengths[n + 1]);
            attend_chunk(p, (const char *)w->q + n * size, 1, c, first, last, H, s->lengths + n, blocks, b->scale,
                         mine->scores, &part);
        }
    }
    if (s->R <= SHARED) fetch_part(t, b->o, 1);
    meet(t);
}

/* What attention answers to sequence n, of the parts: [H, K] in row, which has room for a part. */
static void attended_row(const Step *s, const Pages *p, const Work *w, int64_t n, int64_t H, float *row) {
    int64_t chunks = chunk_count(p, s->lengths[n]);
    Part whole = part_at(row, 0, H, p->K);
    memcpy(row, part_at(w->parts, w->chunks[n], H, p->K).out, part_size(H, p->K) * sizeof(float));
    for (int64_t c = 1; c < chunks; c++) {
        Part more = part_at(w->parts, w->chunks[n] + c, H, p->K);
        join_parts(&whole, &more, 0, H, p->K);
    }
    finish_part(p, &whole, 0, H);
}

/* x + y where both were stored in `dtype` before. */
static void add_row(float *x, const float *y, int64_t dtype, int64_t n) {
    if (dtype == F_F32)
        for (int64_t i = 0; i < n; i++) x[i] += y[i];
    else
        for (int64_t i = 0; i < n; i++) x[i] = from_bf16(to_bf16(x[i] + from_bf16(to_bf16(y[i]))));
}

/* Whether all of a layer's experts are in memory, so that there is nothing to guess. */
static int whole(const Block *b) {
    int64_t here = 0;
    for (int64_t e = 0; e < b->E; e++) here += b->store->here[e];
    return here == b->E;
}

static int all_here(const Store *store, const int64_t *experts, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!__atomic_load_n(&store->here[experts[i]], __ATOMIC_ACQUIRE)) return 0;
    return 1;
}

/* The experts of this layer into memory, by one thread. h [R, D] is what goes into them; with few rows the next layer's router
   says of it which experts that layer will probably want: most of what it will see is there already. */
static void experts_here(const Block *b, const Step *s, const float *h, const int64_t *experts, int64_t A, const Block *next) {
    int64_t N = s->R, more = 0, guess[FEW * A];
    float row[b->D], weights[A];
    if (!s->given && N <= FEW && *b->store->guessing && next && next->store && next->router && !whole(next)) {
        for (int64_t n = 0; n < N; n++) {
            norm_row(h + n * b->D, b->D, next->post_norm, s->dtype, b->norm_eps, row);
            route_row(row, b->D, next->router, next->E, A, 0, weights, guess + n * A);
        }
        if (!all_here(next->store, guess, N * A)) more = N * A;
    }
    if (more || !all_here(b->store, experts, N * A)) b->store->fetch(b->store->layer, experts, N * A, guess, more);
}

/* h = DecoderLayer(h), h [R, D] in `own`, which is `mine` or, where the rows are shared out, everybody's. weights and
   experts [R, A]: the routing, which comes or goes. next: the layer behind it, or null. */
static void layer_part(const Block *b, const Step *s, const Team *t, Work *w, Own *own, Own *mine, void *keys, void *values,
                       float *weights, int64_t *experts, int64_t A, const Block *next) {
    int64_t N = s->R, D = b->D, HK = b->H * b->K;
    const float *biases[3] = {b->q_bias, b->k_bias, b->v_bias}, *o_bias[1] = {b->o_bias};
    void *qkv[3] = {w->q, w->k, w->v}, *to_part[1] = {w->part};
    Pages pages = {keys, values, s->dtype, s->block_size, b->G, b->K, b->window};
    Rows *post = &own->post[kind_of(b->gate, w->first->gate)], *mid = &w->mid[kind_of(b->down, w->first->down)];
    float *row = mine->row;
    for (int64_t n = t->first; n < N; n += t->step) {
        norm_row(own->h + n * D, D, b->input_norm, s->dtype, b->norm_eps, row);
        round_row(row, s->dtype, D);
        rows_set(&own->in, n, row);
    }
    if (!t->alone) meet(t);
    linear_part(t, b->qkv, 3, &own->in, N, qkv, s->dtype, biases);
    attention_part(b, s, &pages, t, w, mine, keys, values);
    for (int64_t n = t->first; n < N; n += t->step) {
        attended_row(s, &pages, w, n, b->H, row);
        round_row(row, s->dtype, HK);
        rows_set(&own->mixed, n, row);
    }
    for (int64_t i = share(t, t->thread, N * D); i < share(t, t->thread + 1, N * D); i++) w->sum[i] = 0;
    if (!t->alone) meet(t);
    linear_part(t, b->o, 1, &own->mixed, N, to_part, F_F32, o_bias);
    for (int64_t n = t->first; n < N; n += t->step) {
        add_row(own->h + n * D, w->part + n * D, s->dtype, D);
        norm_row(own->h + n * D, D, b->post_norm, s->dtype, b->norm_eps, row);
        round_row(row, s->dtype, D);
        rows_set(post, n, row);
        if (s->given) continue;
        route_row(row, D, b->router, b->E, A, b->normalise, own->weights + n * A, own->experts + n * A);
    }
    if (!t->alone) meet(t);
    if (!s->given && t->thread == 0) {
        memcpy(weights, own->weights, N * A * sizeof(float));
        memcpy(experts, own->experts, N * A * sizeof(int64_t));
    }
    if (b->store) {
        if (t->thread == 0) experts_here(b, s, own->h, s->given ? experts : own->experts, A, next);
        meet(t);
    }
    slots_fill(&mine->slots, s->given ? experts : own->experts, s->given ? weights : own->weights, N, A, b->E);
    experts_part(t, b->gate, b->up, b->down, post, 0, &mine->slots, N * A, w->hidden, mid, w->sum);
    if (N <= SHARED && next) fetch_part(t, next->qkv, 3);
    else if (N <= SHARED && w->head) fetch_part(t, w->head, 1);
    meet(t);
    for (int64_t n = t->first; n < N; n += t->step) add_row(own->h + n * D, w->sum + n * D, s->dtype, D);
}

/* ---- a whole step ------------------------------------------------------------------------------------------------ */

/* The largest of the values first .. end of a row, and its place, the first of equal ones; -1 where one is not a number. */
static void largest(const void *row, int64_t dtype, int64_t first, int64_t end, float *most, int64_t *place) {
    float x[4 * 64];
    *most = -INFINITY, *place = first;
    for (int64_t at = first; at < end && *place >= 0; at += 4 * 64) {
        int64_t n = min64(4 * 64, end - at);
        float here = -INFINITY;
        int broken = 0;
        load_row(x, row, dtype, at, n);
#pragma omp simd reduction(max : here) reduction(| : broken)
        for (int64_t i = 0; i < n; i++) here = x[i] > here ? x[i] : here, broken |= x[i] != x[i];
        if (broken) *place = -1;
        else if (here > *most) {
            *most = here, *place = at;
            while (x[*place - at] != here) ++*place;
        }
    }
}

/* Norm and head of the rows h; each thread looks for the largest logits in its part of the vocabulary. */
static void head_part(const Ends *e, const Step *s, const Team *t, Own *own, Own *mine, int64_t D) {
    int64_t V = e->head->outputs;
    void *logits[1] = {e->logits};
    for (int64_t n = t->first; n < s->R; n += t->step) {
        norm_row(own->h + n * D, D, e->norm, s->dtype, e->eps, mine->row);
        round_row(mine->row, s->dtype, D);
        rows_set(&own->last, n, mine->row);
    }
    if (!t->alone) meet(t);
    linear_part(t, e->head, 1, &own->last, s->R, logits, s->dtype, 0);
    for (int64_t n = 0; n < s->R; n++) {
        const char *row = (const char *)e->logits + n * V * (s->dtype == F_F32 ? 4 : 2);
        largest(row, s->dtype, share(t, t->thread, V), share(t, t->thread + 1, V), mine->most + n, mine->place + n);
    }
}

/* Row n's likeliest token, of what the threads found. */
static int64_t likeliest(const Own *own, int64_t threads, int64_t n) {
    float most = -INFINITY;
    int64_t place = -1;
    for (int64_t t = 0; t < threads; t++) {
        if (own[t].place[n] < 0) return -1;
        if (own[t].most[n] > most) most = own[t].most[n], place = own[t].place[n];
    }
    return most <= 3.4028235e38f ? place : -1;
}

/* Row n's speaker and its share, of weights and experts [L, R, A]. */
static void find_speaker(const float *weights, const int64_t *experts, int64_t L, int64_t R, int64_t A, int64_t E, int64_t n,
                         int64_t *speaker, double *share) {
    double sums[E], total = 0;
    *speaker = 0;
    for (int64_t e = 0; e < E; e++) sums[e] = 0;
    for (int64_t l = 0; l < L; l++)
        for (int64_t i = (l * R + n) * A; i < (l * R + n + 1) * A; i++) sums[experts[i]] += weights[i];
    for (int64_t e = 0; e < E; e++) {
        total += sums[e];
        if (sums[e] > sums[*speaker]) *speaker = e;
    }
    *share = total ? sums[*speaker] / total : 0;
}
