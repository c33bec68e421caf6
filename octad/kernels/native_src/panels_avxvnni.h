/* Integer panels by 256-bit dot products of bytes. Part of panels.h. */

#define VECTOR_INT 1
#define TWO_PANELS 0

#include "panels_256.h"

/* sum += the products of w (unsigned) and x (signed), four by four. */
INLINE __m256i dot4(__m256i sum, __m256i w, __m256i x) {
    return _mm256_dpbusd_avx_epi32(sum, w, x);
}

INLINE void panel_int(const uint8_t *const *data, const int P, const int bits, int64_t groups, int64_t group,
                      int64_t ahead, const Row *x, const int n, float *out) {
    (void)P; /* one panel */
    const __m256i nibble = _mm256_set1_epi8(15);
    const uint8_t *w = data[0];
    const uint16_t *scales = (const uint16_t *)w;
    for (int64_t g = 0; g < groups; g++) {
        __m256i total[2][VECTOR_ROWS];
        if (g % 2 == 0) scales = (const uint16_t *)w, w += 64;
        for (int r = 0; r < n; r++) total[0][r] = total[1][r] = _mm256_set1_epi32(x[r].start[g]);
        for (int64_t k = g * group; k < (g + 1) * group; k += 32 / bits, w += 64) {
            __builtin_prefetch(w + ahead, 0, 2);
            for (int h = 0; h < 2; h++) {
                __m256i b = half_of(w, h);
                __m256i low = bits == 8 ? b : _mm256_and_si256(b, nibble);
                __m256i high = _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble);
                for (int r = 0; r < n; r++) {
                    const int8_t *q = (const int8_t *)x[r].x + k;
                    total[h][r] = dot4(total[h][r], low, all4(q));
                    if (bits == 4) total[h][r] = dot4(total[h][r], high, all4(q + 4));
                }
            }
        }
        for (int h = 0; h < 2; h++) {
            __m256 scale = scales8(scales + g % 2 * PANEL + 8 * h);
            for (int r = 0; r < n; r++) {
                float *to = out + r * PANEL + 8 * h;
                __m256 before = g ? _mm256_loadu_ps(to) : _mm256_setzero_ps();
                __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(x[r].scale[g]));
                _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[h][r]), factor, before));
            }
        }
    }
}
