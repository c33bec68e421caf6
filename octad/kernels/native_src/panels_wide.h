/* Panels in float32: weights of float32 (F_P32) or of bfloat16, widened (F_W16, and F_P16 without bf16 products), times
   float32 rows. Part of panels.h.

   Every output has two sums, of the even and of the odd inputs, whatever the number of rows: what a row becomes must not
   depend on its company. Up to three rows take both halves of a panel at once, which reads it as it lies; more take one
   after the other, so that the sums stay in sixteen registers. */

/* Two inputs of 8 outputs. */
INLINE void wide_pair(const uint8_t *w, const int size, const int half, Floats *even, Floats *odd) {
    if (size == 2) {
        Words both = words8(w + 32 * half);
        *even = (Floats)(both << 16), *odd = (Floats)(both & 0xffff0000u);
    } else *even = load8((const float *)w + 8 * half), *odd = load8((const float *)w + PANEL + 8 * half);
}

/* Halves first .. last of a panel for n rows; size: bytes of a weight. */
INLINE void wide_halves(const uint8_t *w, const int size, const int first, const int last, int64_t K, int64_t ahead,
                        const Row *x, const int n, float *out) {
    Floats even[2][VECTOR_ROWS], odd[2][VECTOR_ROWS];
    for (int h = first; h < last; h++)
        for (int r = 0; r < n; r++) even[h][r] = odd[h][r] = all(0);
    for (int64_t k = 0; k < K; k += 2, w += 2 * PANEL * size) {
        if (first == 0) {
            __builtin_prefetch(w + ahead, 0, 2);
            if (size == 4) __builtin_prefetch(w + ahead + 64, 0, 2);
        }
        for (int h = first; h < last; h++) {
            Floats e, o;
            wide_pair(w, size, h, &e, &o);
            for (int r = 0; r < n; r++) {
                const float *v = (const float *)x[r].x + k;
                even[h][r] += e * all(v[0]), odd[h][r] += o * all(v[1]);
            }
        }
    }
    for (int h = first; h < last; h++)
        for (int r = 0; r < n; r++) store8(out + r * PANEL + 8 * h, even[h][r] + odd[h][r]);
}

INLINE void panel_wide(const uint8_t *w, const int size, int64_t K, int64_t ahead, const Row *x, const int n, float *out) {
    if (n <= 3) wide_halves(w, size, 0, 2, K, ahead, x, n, out);
    else {
        wide_halves(w, size, 0, 1, K, ahead, x, n, out);
        wide_halves(w, size, 1, 2, K, ahead, x, n, out);
    }
}
