/* Attention over bfloat16 pages by 512-bit dot products of bfloat16. Part of attention.h. */

/* The sums of 16 vectors, as one vector: four steps, each adding halves of neighbours. */
INLINE __m512 sums16(__m512 *v) {
    for (int i = 0; i < 16; i += 2)
        v[i / 2] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 1]), _mm512_unpackhi_ps(v[i], v[i + 1]));
    for (int i = 0; i < 8; i += 2) {
        __m512d a = _mm512_castps_pd(v[i]), b = _mm512_castps_pd(v[i + 1]);
        v[i / 2] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int n = 4; n > 1; n /= 2)
        for (int i = 0; i < n; i += 2)
            v[i / 2] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 1], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 1], 0xdd));
    return v[0];
}

/* One sum across the vectors for 16 positions; K = 32 parts. */
INLINE void score_bf16(const Pages *p, const Span *s, const Heads *heads, const int n, const int K, const int size, int64_t t,
                       int64_t end) {
    (void)size;
    const int parts = K / 32;
    __m512 sums[GROUP][BLOCK];
    for (int j = 0; j < BLOCK; j++) {
        const uint16_t *key = (const uint16_t *)p->keys + place(p, s, heads, min64(t + j, end - 1));
        const uint16_t *later = (const uint16_t *)p->keys + place(p, s, heads, min64(t + j + AHEAD, s->there - 1));
        for (int i = 0; s->fetch && i < parts; i++) __builtin_prefetch(later + 32 * i);
        for (int h = 0; h < n; h++) sums[h][j] = _mm512_setzero_ps();
        for (int i = 0; i < parts; i++) {
            __m512i x = _mm512_loadu_si512(key + 32 * i);
            for (int h = 0; h < n; h++)
                sums[h][j] = dot2(sums[h][j], x, _mm512_loadu_si512((const uint16_t *)heads->q + h * p->K + 32 * i));
        }
    }
    for (int h = 0; h < n; h++)
        _mm512_mask_storeu_ps(heads->scores + h * s->T + t, (__mmask16)((1 << (end - t)) - 1),
                              _mm512_mul_ps(sums16(sums[h]), _mm512_set1_ps(s->scale)));
}

INLINE void value_bf16(const Pages *p, const Span *s, const Heads *heads, const int n, const int K, const int size, int64_t t,
                       int64_t end) {
    (void)size;
    const int parts = K / 32;
    __m512 a[GROUP][4], b[GROUP][4]; /* the sums at even places, at odd places */
    for (int h = 0; h < n; h++)
        for (int i = 0; i < parts; i++) {
            const float *from = heads->out + h * p->K + 32 * i;
            a[h][i] = t ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
            b[h][i] = t ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
        }
    for (; t < end; t++) {
        const uint16_t *value = (const uint16_t *)p->values + place(p, s, heads, t);
        const uint16_t *later = (const uint16_t *)p->values + place(p, s, heads, min64(t + AHEAD, s->there - 1));
        for (int i = 0; s->fetch && i < parts; i++) __builtin_prefetch(later + 32 * i);
        for (int i = 0; i < parts; i++) {
            __m512i x = _mm512_loadu_si512(value + 32 * i);
            for (int h = 0; h < n; h++) {
                __m512 weight = _mm512_set1_ps(heads->scores[h * s->T + t]);
                a[h][i] = _mm512_fmadd_ps(evens(x), weight, a[h][i]), b[h][i] = _mm512_fmadd_ps(odds(x), weight, b[h][i]);
            }
        }
    }
    for (int h = 0; h < n; h++)
        for (int i = 0; i < parts; i++) {
            float *to = heads->out + h * p->K + 32 * i;
            _mm512_storeu_ps(to, a[h][i]), _mm512_storeu_ps(to + 16, b[h][i]);
        }
}

static void finish_bf16(const Pages *p, const Heads *h, const float *factors) {
    const __m512i front = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < h->n * p->K; i += 32) {
        __m512 a = _mm512_loadu_ps(h->out + i), b = _mm512_loadu_ps(h->out + i + 16);
        __m512 factor = _mm512_set1_ps(factors[i / p->K]);
        _mm512_storeu_ps(h->out + i, _mm512_mul_ps(_mm512_permutex2var_ps(a, front, b), factor));
        _mm512_storeu_ps(h->out + i + 16, _mm512_mul_ps(_mm512_permutex2var_ps(a, back, b), factor));
    }
}
