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

/* Where a position's numbers of these heads lie, of `size` bytes each; and eight of them. */
INLINE const char *page_row(const Pages *p, const Heads *h, const void *rows, int32_t place, const int K, const int size) {
    return (const char *)rows + ((int64_t)place * p->G + h->g) * (K * size);
}

INLINE Floats page8(const char *row, int i, const int size) {
    return size == 4 ? load8((const float *)row + i) : load8_bf16((const uint16_t *)row + i);
}

INLINE void fetch_place(const Pages *p, const Span *s, const Heads *h, const void *rows, int64_t t, const int K,
                        const int size) {
    const char *later = page_row(p, h, rows, s->places[min64(t + AHEAD, s->there - 1)], K, size);
#pragma GCC unroll 8
    for (int i = 0; i < K * size; i += 64) __builtin_prefetch(later + i);
}

/* The scores of n heads at the positions t .. end: one sum across the vectors for 8 positions. A few positions share what is
   loaded of the queries, and their sums stay in registers. */
INLINE void score_wide(const Pages *p, const Span *s, const Heads *heads, const int n, const int K, const int size, int64_t t,
                       int64_t end) {
    const int together = n == 1 ? 8 : n == 2 ? 4 : 2;
    float query[GROUP * K];
    load_row(query, heads->q, p->dtype, 0, n * K);
    for (; t < end; t += 8) {
        Floats sums[GROUP][8];
        const char *key[8];
        int64_t count = min64(8, end - t);
        for (int j = 0; j < 8; j++) key[j] = page_row(p, heads, p->keys, s->places[min64(t + j, end - 1)], K, size);
        for (int j = 0; j < 8; j += together) {
            Floats sum[GROUP][8];
            for (int l = 0; s->fetch && l < together; l++) fetch_place(p, s, heads, p->keys, t + j + l, K, size);
            for (int h = 0; h < n; h++)
                for (int l = 0; l < together; l++) sum[h][l] = all(0);
            for (int i = 0; i < K; i += 8) {
                Floats of_query[GROUP];
                for (int h = 0; h < n; h++) of_query[h] = load8(query + h * K + i);
                for (int l = 0; l < together; l++) {
                    Floats x = page8(key[j + l], i, size);
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
INLINE void value_wide(const Pages *p, const Span *s, const Heads *heads, const int n, const int K, const int size, int64_t t,
                       int64_t end) {
    const int columns = n == 1 ? 8 : n <= 3 ? 4 : 2;
    for (int i = 0; i < K; i += 8 * columns) {
        Floats sum[GROUP][8];
        for (int h = 0; h < n; h++)
            for (int c = 0; c < columns; c++) sum[h][c] = t ? load8(heads->out + h * K + i + 8 * c) : all(0);
        for (int64_t j = t; j < end; j++) {
            const char *value = page_row(p, heads, p->values, s->places[j], K, size);
            if (i == 0 && s->fetch) fetch_place(p, s, heads, p->values, j, K, size);
            Floats weight[GROUP];
            for (int h = 0; h < n; h++) weight[h] = all(heads->scores[h * s->T + j]);
            for (int c = 0; c < columns; c++) {
                Floats x = page8(value, i + 8 * c, size);
                for (int h = 0; h < n; h++) sum[h][c] += x * weight[h];
            }
        }
        for (int h = 0; h < n; h++)
            for (int c = 0; c < columns; c++) store8(heads->out + h * K + i + 8 * c, sum[h][c]);
    }
}
