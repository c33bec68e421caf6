/* Attention in vectors of eight float32, over pages of float32 or of bfloat16, widened. Part of attention.h. */

/* The sums of 8 vectors, as one vector: three steps, each adding halves of neighbours. */
INLINE Floats sums8(const Floats *v) {
    Floats a[4], b[2];
    for (int i = 0; i < 4; i++)
        a[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(b[0], b[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(b[0], b[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

/* Eight numbers of a page. */
INLINE Floats page8(const Pages *p, const void *rows, int64_t at) {
    return p->dtype == F_F32 ? load8((const float *)rows + at) : load8_bf16((const uint16_t *)rows + at);
}

INLINE void fetch_place(const Pages *p, const Span *s, const Heads *h, const void *rows, int64_t t) {
    if (!s->fetch) return;
    int64_t size = p->dtype == F_F32 ? 4 : 2;
    const char *later = (const char *)rows + place(p, s, h, min64(t + AHEAD, s->there - 1)) * size;
    for (int64_t i = 0; i < p->K * size; i += 64) __builtin_prefetch(later + i);
}

/* The scores of n heads at the positions t .. end: one sum across the vectors for 8 positions. A few positions share what is
   loaded of the queries, and their sums stay in registers. */
INLINE void score_wide(const Pages *p, const Span *s, const Heads *heads, const int n, const int K, int64_t t, int64_t end) {
    const int together = n == 1 ? 8 : n <= 3 ? 4 : 2;
    float query[GROUP * K];
    load_row(query, heads->q, p->dtype, 0, n * K);
    for (; t < end; t += 8) {
        Floats sums[GROUP][8];
        int64_t count = min64(8, end - t);
        for (int j = 0; j < 8; j += together) {
            int64_t key[8];
            Floats sum[GROUP][8];
            for (int l = 0; l < together; l++) {
                key[l] = place(p, s, heads, min64(t + j + l, end - 1));
                fetch_place(p, s, heads, p->keys, t + j + l);
                for (int h = 0; h < n; h++) sum[h][l] = all(0);
            }
            for (int i = 0; i < K; i += 8) {
                Floats of_query[GROUP];
                for (int h = 0; h < n; h++) of_query[h] = load8(query + h * K + i);
                for (int l = 0; l < together; l++) {
                    Floats x = page8(p, p->keys, key[l] + i);
                    for (int h = 0; h < n; h++) sum[h][l] += x * of_query[h];
                }
            }
            for (int h = 0; h < n; h++)
                for (int l = 0; l < together; l++) sums[h][j + l] = sum[h][l];
        }
        for (int h = 0; h < n; h++) {
            Floats score = sums8(sums[h]) * all(s->scale);
            memcpy(heads->scores + h * s->T + t, &score, count * sizeof(float));
        }
    }
}

/* out += the values at the positions t .. end, weighted; a few columns at a time, whose sums stay in registers. */
INLINE void value_wide(const Pages *p, const Span *s, const Heads *heads, const int n, const int K, int64_t t, int64_t end) {
    const int columns = n == 1 ? 8 : n <= 3 ? 4 : 2;
    for (int i = 0; i < K; i += 8 * columns) {
        Floats sum[GROUP][8];
        for (int h = 0; h < n; h++)
            for (int c = 0; c < columns; c++) sum[h][c] = t ? load8(heads->out + h * K + i + 8 * c) : all(0);
        for (int64_t j = t; j < end; j++) {
            int64_t value = place(p, s, heads, j) + i;
            if (i == 0) fetch_place(p, s, heads, p->values, j);
            for (int c = 0; c < columns; c++) {
                Floats x = page8(p, p->values, value + 8 * c);
                for (int h = 0; h < n; h++) sum[h][c] += x * all(heads->scores[h * s->T + j]);
            }
        }
        for (int h = 0; h < n; h++)
            for (int c = 0; c < columns; c++) store8(heads->out + h * K + i + 8 * c, sum[h][c]);
    }
}
