/* Drawing a token of a row of logits: temperature, min-p, top-k, top-p. Part of native.c.

   A row's weights are e^((logit - the largest) / temperature), of which the largest is 1. A token is drawn among those that
   min-p and top-k keep; if the likelier ones fill the nucleus (top-p) by themselves, once more among these alone, with
   another number. So nothing is sorted. sampling.py has the slow twin.

   Letters: R rows, V vocabulary. */

#define DRAWN 64 /* weights that are summed up at once */
#define LEAST 0x1p-100f /* weights below this are nothing beside the largest */

typedef struct { /* how each row is drawn; arrays of R */
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k; /* 0: all */
} Draws;

ONE void soften(const void *row, int64_t dtype, int64_t V, float temperature, float *weights) {
    float most = -INFINITY;
    load_row(weights, row, dtype, 0, V);
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < V; i++) most = weights[i] > most ? weights[i] : most;
    for (int64_t i = 0; i < V; i++) {
        float x = (weights[i] - most) / temperature;
        weights[i] = x < -87.0f ? 0.0f : exp_(x);
    }
}

/* The k-th largest weight, by its bits, which keep the order of numbers that are not negative. */
static float kth_of_all(const float *weights, int64_t V, int64_t k) {
    uint32_t found = 0, known = 0;
    for (int shift = 22; shift >= 0; shift -= shift == 22 ? 12 : 10) {
        int64_t counts[1 << 12] = {0};
        uint32_t mask = (1u << (shift == 10 ? 12 : 10)) - 1, bits;
        for (int64_t i = 0; i < V; i++) {
            memcpy(&bits, weights + i, 4);
            counts[(bits >> shift) & mask] += (bits & known) == found;
        }
        uint32_t part = mask;
        while (part > 0 && counts[part] < k) k -= counts[part--];
        found |= part << shift, known |= mask << shift;
    }
    float value;
    memcpy(&value, &found, 4);
    return value;
}

/* The k-th largest weight: only blocks whose own largest is among the k first can hold it. `some` has room for V. */
static float kth_largest(const float *weights, int64_t V, int64_t k, float *some) {
    int64_t whole = V / DRAWN, n = 0;
    if (k > whole / 4) return kth_of_all(weights, V, k);
    float largest[whole];
    for (int64_t b = 0; b < whole; b++) {
        float most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = b * DRAWN; i < (b + 1) * DRAWN; i++) most = weights[i] > most ? weights[i] : most;
        largest[b] = most;
    }
    float least = kth_of_all(largest, whole, k);
    for (int64_t b = 0; b < whole; b++)
        for (int64_t i = b * DRAWN; largest[b] >= least && i < (b + 1) * DRAWN; i++)
            if (weights[i] >= least) some[n++] = weights[i];
    for (int64_t i = whole * DRAWN; i < V; i++) some[n++] = weights[i];
    return kth_of_all(some, n, k);
}

/* The sum of those of n weights that are at least `least`. */
ONE float sum_kept(const float *weights, int64_t n, float least) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += weights[i] >= least ? weights[i] : 0.0f;
    return sum;
}

/* The sum of all that are at least `least`; upto [V / DRAWN, rounded up] where that stands after each block, or null. */
static double total_kept(const float *weights, int64_t V, float least, double *upto) {
    double total = 0;
    for (int64_t at = 0; at < V; at += DRAWN) {
        total += sum_kept(weights + at, min64(DRAWN, V - at), least);
        if (upto) upto[at / DRAWN] = total;
    }
    return total;
}

/* The token where the running sum of these weights passes the number's share of their total, which it returns. */
static double pick(const float *weights, int64_t V, float least, double number, int64_t *token) {
    int64_t blocks = (V + DRAWN - 1) / DRAWN, b = 0;
    double upto[blocks], total = total_kept(weights, V, least, upto), target = number * total, sum = 0;
    while (b + 1 < blocks && !(upto[b] > target)) b++;
    while (b > 0 && !(upto[b] > upto[b - 1])) b--; /* the number was a hair below 1 */
    double before = b ? upto[b - 1] : 0;
    for (int64_t i = b * DRAWN; i < min64(V, (b + 1) * DRAWN) && !(sum > target - before); i++)
        if (weights[i] >= least) *token = i, sum += weights[i];
    return total;
}

/* Whether the tokens likelier than this one fill the nucleus. */
static int is_outside(const float *weights, int64_t V, int64_t token, double nucleus) {
    if (nucleus == INFINITY) return 0;
    double mass = total_kept(weights, V, nextafterf(weights[token], INFINITY), 0);
    return mass > 0 && mass >= nucleus;
}

static void draw_row(const void *row, int64_t dtype, int64_t V, const Draws *d, int64_t r, double number, float *weights,
                     float *some, double *nucleus, int64_t *token, int64_t *outside) {
    float least = d->min_p[r] > LEAST ? d->min_p[r] : LEAST;
    soften(row, dtype, V, d->temperature[r], weights);
    if (d->top_k[r] > 0 && d->top_k[r] < V) {
        float kth = kth_largest(weights, V, d->top_k[r], some);
        least = kth > least ? kth : least;
    }
    *token = 0;
    double total = pick(weights, V, least, number, token);
    *nucleus = d->top_p[r] < 1 ? d->top_p[r] * total : INFINITY;
    *outside = is_outside(weights, V, *token, *nucleus);
}
