/* Integer panels with 256-bit vectors. Part of panels.h.

   Without dot products of bytes there is maddubs, which multiplies unsigned by signed bytes and adds two neighbours, in 16
   bits. Weights are taken apart into their halves of 4 bits, so that nothing overflows: 8 bits are 16 * high + low, and a
   byte of two 4-bit weights is just that. A sum of two products is then at most 2 * 15 * 127 = 3810, and eight of them fit
   16 bits. Like the wide panels, few rows take both halves of a panel at once, more one after the other. */

#define VECTOR_INT 1
#define TWO_PANELS 0

INLINE __m256 scales8(const uint16_t *s) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)s)), 16));
}

INLINE __m256i four(const int8_t *q) { /* the same four bytes eight times */
    int32_t v;
    memcpy(&v, q, 4);
    return _mm256_set1_epi32(v);
}

/* sum += the products of w (unsigned) and x (signed), two by two. Two instructions that stay together, in this order: given
   the builtins, GCC loads all the rows' x first, and is left without registers for the sums. */
INLINE void add16(__m256i *sum, __m256i w, __m256i x) {
    __m256i product;
    __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(w), "x"(x));
}

/* GCC would keep everything in registers that it has not, and spill what the inner loop needs: what is used once a group
   is kept in memory, behind this. */
#define IN_MEMORY(place) __asm__ volatile("" : : "r"(place) : "memory")

/* total [n, 16] += the products of the inputs k .. k + count, which are 32 at most. */
INLINE const uint8_t *int_inputs(const uint8_t *w, const int bits, const int first, const int last, int64_t k,
                                 int64_t count, int64_t ahead, const Row *x, const int n, int32_t *total) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[2][ROWS], high[2][ROWS];
    IN_MEMORY(total);
    for (int h = first; h < last; h++)
        for (int r = 0; r < n; r++) low[h][r] = high[h][r] = _mm256_setzero_si256();
    for (int64_t end = k + count; k < end; k += 32 / bits, w += 64) {
        if (first == 0) __builtin_prefetch(w + ahead, 0, 2);
        for (int h = first; h < last; h++) {
            __m256i b = _mm256_loadu_si256((const __m256i *)(w + 32 * h));
            __m256i l = _mm256_and_si256(b, nibble), u = _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble);
            for (int r = 0; r < n; r++) {
                const int8_t *q = (const int8_t *)x[r].x + k;
                __m256i v = four(q);
                add16(&low[h][r], l, v);
                add16(bits == 8 ? &high[h][r] : &low[h][r], u, bits == 8 ? v : four(q + 4));
            }
        }
    }
    for (int h = first; h < last; h++)
        for (int r = 0; r < n; r++) {
            __m256i *to = (__m256i *)(total + r * PANEL + 8 * h), sum = _mm256_madd_epi16(low[h][r], _mm256_set1_epi16(1));
            if (bits == 8) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high[h][r], _mm256_set1_epi16(16)));
            _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sum));
        }
    IN_MEMORY(total);
    return w;
}

/* Halves first .. last of a panel for n rows, out [n, 16]. */
INLINE void int_halves(const uint8_t *w, const int bits, const int first, const int last, int64_t groups, int64_t group,
                       int64_t ahead, const Row *x, const int n, float *out) {
    int32_t total[ROWS * PANEL];
    const uint16_t *scales = (const uint16_t *)w;
    for (int64_t g = 0; g < groups; g++) {
        if (g % 2 == 0) scales = (const uint16_t *)w, w += 64;
        for (int h = first; h < last; h++)
            for (int r = 0; r < n; r++)
                _mm256_storeu_si256((__m256i *)(total + r * PANEL + 8 * h), _mm256_set1_epi32(x[r].start[g]));
        for (int64_t k = 0; k < group; k += 32)
            w = int_inputs(w, bits, first, last, g * group + k, min64(32, group - k), ahead, x, n, total);
        for (int h = first; h < last; h++) {
            __m256 scale = scales8(scales + g % 2 * PANEL + 8 * h);
            for (int r = 0; r < n; r++) {
                int at = r * PANEL + 8 * h;
                __m256 sum = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(total + at)));
                __m256 before = g ? _mm256_loadu_ps(out + at) : _mm256_setzero_ps();
                _mm256_storeu_ps(out + at, _mm256_fmadd_ps(sum, _mm256_mul_ps(scale, _mm256_set1_ps(x[r].scale[g])), before));
            }
        }
        IN_MEMORY(out);
    }
}

INLINE void panel_int(const uint8_t *const *data, const int P, const int bits, int64_t groups, int64_t group,
                      int64_t ahead, const Row *x, const int n, float *out) {
    (void)P; /* one panel */
    if (n <= (bits == 8 ? 2 : 3)) int_halves(data[0], bits, 0, 2, groups, group, ahead, x, n, out);
    else {
        int_halves(data[0], bits, 0, 1, groups, group, ahead, x, n, out);
        int_halves(data[0], bits, 1, 2, groups, group, ahead, x, n, out);
    }
}
