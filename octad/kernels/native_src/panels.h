/* Panels of weights: 16 outputs times a few rows, where the time goes. Part of native.c.

   A weight W [O, K] is stored in panels of 16 outputs, one after another (O and K padded with zeros):
     F_P16   bf16 [K/2][16][2]; the rows of x are rounded to bf16
     F_W16   the same weights, widened; the rows of x are float32
     F_P32   float32 [K][16]
     F_Q8    for two groups at a time: scales bf16 [2][16], then u8 [2][G/4][16][4], value + 128
     F_Q4    the same with u8 [2][G/8][16][4], value + 8: low nibble the first 4 inputs, high nibble the next 4
             (an odd last group stands alone, behind 64 bytes of scales all the same)
     F_F32, F_BF16   plain rows [O, K], not padded
   so that a panel is read strictly in order: a jump of a few cache lines costs the hardware's prefetcher its stream.
   Unsigned weights because the dot-product instruction multiplies unsigned by signed; the offset is taken off by starting
   the sum at -offset * sum(x).

   Letters: N tokens, O outputs, K inputs, G inputs a group. */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "panels_avx512.h"
#elif defined(__AVXVNNI__)
#include "panels_avxvnni.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "panels_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "panels_neon.h"
#else
#include "panels_plain.h"
#endif
#if TILES
#include "panels_amx.h"
#else
#define tiles_end() (void)0
#endif
#include "panels_wide.h"
#if !BF16_DOT
#define panel_p16(...) (void)0
#endif

ONE void panel_f32(const float *w, int64_t K, int outs, const Row *x, int n, float *out) {
    for (int o = 0; o < outs; o++)
        for (int r = 0; r < n; r++) {
            const float *a = w + o * K, *b = (const float *)x[r].x;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < K; k++) sum += a[k] * b[k];
            out[r * PANEL + o] = sum;
        }
}

ONE void panel_bf16(const uint16_t *w, int64_t K, int outs, const Row *x, int n, float *out) {
    for (int o = 0; o < outs; o++)
        for (int r = 0; r < n; r++) {
            const uint16_t *a = w + o * K, *b = (const uint16_t *)x[r].x;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < K; k++) sum += from_bf16(a[k]) * from_bf16(b[k]);
            out[r * PANEL + o] = sum;
        }
}

static inline const uint8_t *panel_at(const Weight *w, int64_t p) { return w->data + p * w->step; }

static inline int panel_outputs(const Weight *w, int64_t p) { return (int)min64(PANEL, w->outputs - p * PANEL); }

static inline int64_t panel_count(const Weight *w) { return (w->outputs + PANEL - 1) / PANEL; }

/* Whether the format's kernel takes two panels at once. */
static inline int takes_two(int64_t format) {
    return TWO_PANELS && (format == F_Q8 || format == F_Q4 || (format == F_P16 && BF16_DOT));
}

/* out[i][r][0..15] = rows x[r] times panel data[i], for P <= 2 panels of the shape of w and n <= ROWS rows. What lies
   `ahead` bytes behind is fetched meanwhile: the weights that come next. 0 says that these panels have just been read, for
   other rows. From memory one panel at a time is quickest, whatever the number of rows: two streams that lie so near each
   other reach two thirds of its bandwidth. From the cache it is both at once where the kernel can, since they share the loads of x. */
static void panels(const Weight *w, const uint8_t *const *data, const int *outs, int P, int64_t ahead, const Row *x, int n,
                   float *out) {
    if (w->format <= F_BF16) {
        for (int i = 0; i < P; i++) {
            if (w->format == F_F32) panel_f32((const float *)data[i], w->inputs, outs[i], x, n, out + i * ROWS * PANEL);
            else panel_bf16((const uint16_t *)data[i], w->inputs, outs[i], x, n, out + i * ROWS * PANEL);
        }
        return;
    }
#if TILES
    if (n > VECTOR_ROWS) {
        if (P == 2 && ahead) {
            panels(w, data, outs, 1, ahead, x, n, out), panels(w, data + 1, outs + 1, 1, ahead, x, n, out + ROWS * PANEL);
        } else if (suits_many(w, x, n)) {
            panel_many(w, data, P, ahead, x, n, out);
        } else
            for (int r = 0; r < n; r += VECTOR_ROWS)
                panels(w, data, outs, P, r ? 0 : ahead, x + r, (int)min64(VECTOR_ROWS, n - r), out + r * PANEL);
        return;
    }
#endif
    if (P == 2 && (ahead || !takes_two(w->format))) {
        panels(w, data, outs, 1, ahead, x, n, out);
        panels(w, data + 1, outs + 1, 1, ahead, x, n, out + ROWS * PANEL);
        return;
    }
    int64_t groups = (w->inputs + w->group - 1) / w->group;
#define CASE(n_)                                                                                                       \
    case n_:                                                                                                           \
        if (w->format == F_Q8) panel_int(data, 1, 8, groups, w->group, ahead, x, n_, out);                             \
        else if (w->format == F_Q4) panel_int(data, 1, 4, groups, w->group, ahead, x, n_, out);                        \
        else if (w->format == F_P32) panel_wide(data[0], 4, groups * w->group, ahead, x, n_, out);                     \
        else if (w->format == F_P16 && BF16_DOT) panel_p16(data, 1, groups * w->group, ahead, x, n_, out);             \
        else panel_wide(data[0], 2, groups * w->group, ahead, x, n_, out);                                             \
        break;
#define CASE_OF_TWO(n_)                                                                                                \
    case n_:                                                                                                           \
        if (w->format == F_Q8) panel_int(data, 2, 8, groups, w->group, ahead, x, n_, out);                             \
        else if (w->format == F_Q4) panel_int(data, 2, 4, groups, w->group, ahead, x, n_, out);                        \
        else panel_p16(data, 2, groups * w->group, ahead, x, n_, out);                                                 \
        break;
    if (P == 1) switch (n) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    }
#if TWO_PANELS
    else switch (n) {
        CASE_OF_TWO(1) CASE_OF_TWO(2) CASE_OF_TWO(3) CASE_OF_TWO(4) CASE_OF_TWO(5) CASE_OF_TWO(6)
    }
#endif
}
