/* What both kinds of integer panels with 256-bit vectors load: half a panel at a time. Part of panels.h. */

INLINE __m256 scales8(const uint16_t *s) { /* of bf16 */
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)s)), 16));
}

INLINE __m256i all4(const void *p) { /* the same four bytes eight times */
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

INLINE __m256i half_of(const uint8_t *w, int h) { return _mm256_loadu_si256((const __m256i *)(w + 32 * h)); }
