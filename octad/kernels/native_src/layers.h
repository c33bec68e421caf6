/* Whole decoder layers for one new token a sequence, in one parallel region. Part of native.c.

   The composed modules are the slow twin, and bit for bit the same: whatever they store between two modules is rounded to
   `dtype` here too, so that a sequence's text does not depend on which of the two ways its company needs.

   Between two weights lies little work, but each handing-over from one thread to the other costs about as much as reading
   20 kB of weights. So with few rows (FEW) every thread does that work for itself, and only the five results that all the
   threads make together (q k v, attention, its output, the hidden values, the experts' sum) are waited for.

   Letters as in parts.h; L layers. */

typedef struct { /* a layer's experts where some are on the disk */
    int64_t layer;
    const uint8_t *here; /* [E]: whether an expert is in memory */
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

/* ---- memory ---------------------------------------------------------------------------------------------------- */

typedef struct { /* one thread's */
    float *h, *row, *scores;       /* h [R, D]: what runs through the layers */
    float *weights;                /* [R, A], how the rows are routed; and experts */
    int64_t *experts;
    Rows in, mixed, post;          /* prepared for qkv, o, and the experts */
    Slots slots;
} Own;

typedef struct { /* what the threads make together */
    float *memory, *attended, *part, *sum, *q, *k, *v, *hidden;
    int64_t longest, heads; /* of the contexts; that attention takes at once */
    Rows mid;                /* prepared for the experts' second half */
    Own *own;
} Work;

static int work_alloc(Work *w, const Block *b, const Step *s, int64_t A, int64_t threads) {
    int64_t N = s->R, D = b->D, HK = b->H * b->K, GK = b->G * b->K, F = b->gate->outputs, pairs = N * A;
    w->longest = 1;
    for (int64_t r = 0; r < N; r++) w->longest = s->lengths[r] > w->longest ? s->lengths[r] : w->longest;
    w->heads = heads_at_once(N, b->H, b->G, w->longest, threads);
    int64_t most = w->heads == b->H ? b->H : b->H / b->G, scores = attention_scratch(most, w->longest);
    int64_t each = N * D + D + HK + scores + pairs + 64;
    w->own = calloc(threads, sizeof(Own));
    w->memory = malloc((N * 2 * (D + HK + GK) + pairs * F + threads * each + 64) * sizeof(float));
    if (!w->own || !w->memory) return 1;
    w->attended = w->memory, w->part = w->attended + N * HK, w->sum = w->part + N * D, w->q = w->sum + N * D;
    w->k = w->q + N * HK, w->v = w->k + N * GK, w->hidden = w->v + N * GK;
    float *next = w->hidden + pairs * F;
    for (int64_t t = 0; t < threads; t++, next += each) {
        Own *own = &w->own[t];
        own->h = next, own->row = own->h + N * D, own->weights = own->row + D + HK + 32, own->scores = own->weights + pairs;
        own->experts = malloc((pairs + 1) * sizeof(int64_t));
        if (!own->experts) return 1;
        if (slots_alloc(&own->slots, pairs, b->E)) return 1;
        if (t > 0 && N > FEW) continue; /* the first one's rows are everybody's */
        if (rows_alloc(&own->in, N, b->qkv) || rows_alloc(&own->mixed, N, b->o) || rows_alloc(&own->post, N, b->gate))
            return 1;
    }
    return rows_alloc(&w->mid, pairs, b->down);
}

static void work_free(Work *w, int64_t threads) {
    for (int64_t t = 0; w->own && t < threads; t++) {
        Own *own = &w->own[t];
        rows_free(&own->in), rows_free(&own->mixed), rows_free(&own->post);
        slots_free(&own->slots), free(own->experts);
    }
    rows_free(&w->mid), free(w->own), free(w->memory);
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

/* Where this thread's part of attention begins: tasks of some heads of one sequence, shared out by positions to read. */
static int64_t share_positions(const Team *t, int64_t thread, const Step *s, int64_t parts) {
    int64_t total = 0, done = 0, task = 0;
    for (int64_t r = 0; r < s->R; r++) total += s->lengths[r] * parts;
    while (task < s->R * parts && done * t->threads < total * thread) done += s->lengths[task++ / parts];
    return task;
}

/* attended [R, H, K] of the q, k and v in w. */
static void attention_part(const Block *b, const Step *s, const Team *t, Work *w, Own *mine, void *keys, void *values) {
    Pages pages = {keys, values, s->dtype, s->block_size, b->G, b->K, b->window};
    int64_t H = b->H, each = H / b->G, parts = H / w->heads, end = share_positions(t, t->thread + 1, s, parts);
    int split = w->heads < each; /* several threads may need a group */
    for (int64_t i = share(t, t->thread, s->R * b->G); split && i < share(t, t->thread + 1, s->R * b->G); i++)
        place_group(b, s, i / b->G, i % b->G, w, keys, values, mine->row);
    if (split) meet(t);
    for (int64_t task = share_positions(t, t->thread, s, parts), next; task < end; task = next) {
        int64_t n = task / parts, h = task % parts * w->heads, last = w->heads == H ? H : (h / each + 1) * each;
        next = min64(n * parts + last / w->heads, end), last = (next - n * parts) * w->heads;
        if (next < end && next / parts > n)
            fetch_sequence(&pages, s->tables + (n + 1) * s->width, s->lengths[n + 1], s->slots[n + 1]);
        for (int64_t g = h / each; !split && g < last / each; g++) place_group(b, s, n, g, w, keys, values, mine->row);
        attend_heads(&pages, w->q, n, 1, h, last, H, s->lengths, s->tables, s->width, b->scale, mine->scores, w->attended);
    }
    if (s->R <= SHARED) fetch_part(t, b->o, 1);
    meet(t);
}

/* x + y where both were stored in `dtype` before. */
static void add_row(float *x, const float *y, int64_t dtype, int64_t n) {
    if (dtype == F_F32)
        for (int64_t i = 0; i < n; i++) x[i] += y[i];
    else
        for (int64_t i = 0; i < n; i++) x[i] = from_bf16(to_bf16(x[i] + from_bf16(to_bf16(y[i]))));
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
    if (!s->given && N <= FEW && next && next->store && next->router) {
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
    float *row = mine->row;
    for (int64_t n = t->first; n < N; n += t->step) {
        norm_row(own->h + n * D, D, b->input_norm, s->dtype, b->norm_eps, row);
        round_row(row, s->dtype, D);
        rows_set(&own->in, n, row);
    }
    if (!t->alone) meet(t);
    linear_part(t, b->qkv, 3, &own->in, N, qkv, s->dtype, biases);
    attention_part(b, s, t, w, mine, keys, values);
    for (int64_t n = t->first; n < N; n += t->step) {
        memcpy(row, w->attended + n * HK, HK * sizeof(float));
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
        rows_set(&own->post, n, row);
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
    experts_part(t, b->gate, b->up, b->down, &own->post, 0, &mine->slots, N * A, w->hidden, &w->mid, w->sum);
    if (N <= SHARED && next) fetch_part(t, next->qkv, 3);
    meet(t);
    for (int64_t n = t->first; n < N; n += t->step) add_row(own->h + n * D, w->sum + n * D, s->dtype, D);
}
