/* One token's attention over paged keys and values [blocks, block_size, G, K]. Part of native.c; letters as in parts.h. */

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
