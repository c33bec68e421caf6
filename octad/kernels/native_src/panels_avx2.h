/* Integer panels with 256-bit vectors. Part of panels.h.

   Without dot products of bytes there is maddubs, which multiplies unsigned by signed bytes and adds two neighbours, in 16
   bits, and madd, which adds two of those in 32. 8-bit weights lose their offset and hand their sign to x: then two
   products are at most 2 * 128 * 127 = 32512, which fits. (16-bit integers and madd alone, with rows prepared for it, run
   at the same rate.) 4-bit weights are unsigned as they are: eight sums of two products, 2 * 15 * 127 = 3810 each, fit 16
   bits before they are widened.

   Three rows at most take a panel at once, so that all sums stay in sixteen registers; the sums over groups lie in `out`. */

#define VECTOR_INT 1
#define TWO_PANELS 0
#define AT_ONCE 3
#define FITS 32 /* inputs whose products with 4-bit weights are summed up in 16 bits */

#include "panels_256.h"

/* sum += the products of the signed weights w, whose magnitudes are m, and x. */
INLINE __m256i add8(__m256i sum, __m256i m, __m256i w, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(m, _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1)));
}

/* total [half of the panel][n] = the products of `group` inputs from k on. */
INLINE void group8(const uint8_t *w, int64_t k, const int64_t group, int64_t ahead, const Row *x, const int n,
                   __m256i (*total)[AT_ONCE]) {
    for (int r = 0; r < n; r++) total[0][r] = total[1][r] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int64_t i = 0; i < group; i += 4, k += 4, w += 64) {
        __m256i v[2], m[2];
        __builtin_prefetch(w + ahead, 0, 2);
        for (int h = 0; h < 2; h++) {
            v[h] = _mm256_xor_si256(half_of(w, h), _mm256_set1_epi8((char)0x80));
            m[h] = _mm256_abs_epi8(v[h]);
        }
        for (int r = 0; r < n; r++) {
            __m256i q = all4((const int8_t *)x[r].x + k);
            for (int h = 0; h < 2; h++) total[h][r] = add8(total[h][r], m[h], v[h], q);
        }
    }
}

INLINE void group4(const uint8_t *w, int64_t k, const int64_t group, int64_t ahead, const Row *x, const int n, int64_t g,
                   __m256i (*total)[AT_ONCE]) {
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    for (int64_t from = 0; from < group; from += FITS) {
        __m256i sum[2][AT_ONCE];
        for (int r = 0; r < n; r++) sum[0][r] = sum[1][r] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int64_t i = from; i < min64(from + FITS, group); i += 8, k += 8, w += 64) {
            __m256i low[2], high[2];
            __builtin_prefetch(w + ahead, 0, 2);
            for (int h = 0; h < 2; h++) {
                __m256i b = half_of(w, h);
                low[h] = _mm256_and_si256(b, nibble), high[h] = _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble);
            }
            for (int r = 0; r < n; r++) {
                const int8_t *q = (const int8_t *)x[r].x + k;
                __m256i first = all4(q), second = all4(q + 4);
                for (int h = 0; h < 2; h++) sum[h][r] = _mm256_add_epi16(sum[h][r], _mm256_maddubs_epi16(low[h], first));
                for (int h = 0; h < 2; h++) sum[h][r] = _mm256_add_epi16(sum[h][r], _mm256_maddubs_epi16(high[h], second));
            }
        }
        for (int r = 0; r < n; r++) {
            __m256i start = all4(x[r].start + g);
            for (int h = 0; h < 2; h++) {
                __m256i wide = _mm256_madd_epi16(sum[h][r], one);
                total[h][r] = _mm256_add_epi32(wide, from ? total[h][r] : start);
            }
        }
    }
}

/* A panel for n <= AT_ONCE rows, whose results are summed up in `out`. */
INLINE void int_rows(const uint8_t *w, const int bits, int64_t groups, const int64_t group, int64_t ahead, const Row *x,
                     const int n, float *out) {
    const uint16_t *scales = (const uint16_t *)w;
    for (int64_t g = 0; g < groups; g++) {
        __m256i total[2][AT_ONCE];
        if (g % 2 == 0) scales = (const uint16_t *)w, w += 64;
        if (bits == 8) group8(w, g * group, group, ahead, x, n, total);
        else group4(w, g * group, group, ahead, x, n, g, total);
        w += group * bits * 2;
        for (int h = 0; h < 2; h++) {
            __m256 scale = scales8(scales + g % 2 * PANEL + 8 * h);
            for (int r = 0; r < n; r++) {
                float *to = out + r * PANEL + 8 * h;
                __m256 factor = _mm256_mul_ps(scale, _mm256_broadcast_ss(x[r].scale + g));
                __m256 before = g ? _mm256_loadu_ps(to) : _mm256_setzero_ps();
                _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[h][r]), factor, before));
            }
        }
    }
}

INLINE void int_panel(const uint8_t *w, const int bits, int64_t groups, const int64_t group, int64_t ahead, const Row *x,
                      const int n, float *out) {
    const int first = n < AT_ONCE ? n : AT_ONCE;
    int_rows(w, bits, groups, group, ahead, x, first, out);
    if (n > first) int_rows(w, bits, groups, group, 0, x + first, n - first, out + first * PANEL);
}

INLINE void panel_int(const uint8_t *const *data, const int P, const int bits, int64_t groups, int64_t group,
                      int64_t ahead, const Row *x, const int n, float *out) {
    (void)P; /* one panel */
    const int64_t usual = bits == 8 ? 64 : 32;
    if (group == usual) int_panel(data[0], bits, groups, usual, ahead, x, n, out);
    else int_panel(data[0], bits, groups, group, ahead, x, n, out);
}
