/* Panels with 512-bit dot products: integers by VNNI, bfloat16 by BF16. Part of panels.h. */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

#define VECTOR_INT 1
#define TWO_PANELS 1

static inline __m512 scales16(const uint16_t *s) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)s)), 16));
}

static inline __m512i broadcast4(const int8_t *q) {
    int32_t v;
    memcpy(&v, q, 4);
    return _mm512_set1_epi32(v);
}

/* sum += the products of w (unsigned) and x (signed), four by four. As instructions of their own, the two products here and
   below stay in their registers: given the compiler's builtin, GCC 12 copies sums and loads the weights again for each row. */
static inline __m512i dot4(__m512i sum, __m512i w, __m512i x) {
#if defined(EMULATED) /* by the tests */
    return _mm512_dpbusd_epi32(sum, w, x);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
#endif
}

/* One or two panels (P) at once: with two, each broadcast of x serves twice, so that there are no more loads than
   products. Where that leaves fewer than four sums in flight, two take turns (b), so that they do not wait for the
   instruction's latency. */
INLINE void panel_int(const uint8_t *const *data, const int P, const int bits, int64_t groups, int64_t group,
                      int64_t ahead, const Row *x, const int n, float *out) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t *w[2] = {data[0], data[P - 1]}, *scales[2] = {w[0], w[1]};
    __m512 f[2][VECTOR_ROWS];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < n; r++) f[p][r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512i a[2][VECTOR_ROWS], b[2][VECTOR_ROWS];
        for (int p = 0; p < P; p++) {
            if (g % 2 == 0) scales[p] = w[p], w[p] += 64;
            for (int r = 0; r < n; r++) {
                a[p][r] = _mm512_set1_epi32(x[r].start[g]);
                b[p][r] = _mm512_setzero_si512();
            }
        }
        for (int64_t k = g * group; k < (g + 1) * group; k += 8) {
            __m512i w0[2], w1[2];
            for (int p = 0; p < P; p++, w[p - 1] += 16 * bits) {
                w0[p] = _mm512_loadu_si512(w[p]);
                __builtin_prefetch(w[p] + ahead, 0, 2);
                if (bits == 8) w1[p] = _mm512_loadu_si512(w[p] + 64), __builtin_prefetch(w[p] + ahead + 64, 0, 2);
                else w1[p] = _mm512_and_si512(_mm512_srli_epi16(w0[p], 4), low), w0[p] = _mm512_and_si512(w0[p], low);
            }
            for (int r = 0; r < n; r++) {
                __m512i x0 = broadcast4((const int8_t *)x[r].x + k), x1 = broadcast4((const int8_t *)x[r].x + k + 4);
                for (int p = 0; p < P; p++) {
                    a[p][r] = dot4(a[p][r], w0[p], x0);
                    if (P * n < 4) b[p][r] = dot4(b[p][r], w1[p], x1);
                    else a[p][r] = dot4(a[p][r], w1[p], x1);
                }
            }
        }
        for (int p = 0; p < P; p++) {
            __m512 scale = scales16((const uint16_t *)scales[p] + g % 2 * PANEL);
            for (int r = 0; r < n; r++) {
                __m512 sum = _mm512_cvtepi32_ps(P * n < 4 ? _mm512_add_epi32(a[p][r], b[p][r]) : a[p][r]);
                f[p][r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(x[r].scale[g])), f[p][r]);
            }
        }
    }
    for (int p = 0; p < P; p++)
        for (int r = 0; r < n; r++) _mm512_storeu_ps(out + (p * ROWS + r) * PANEL, f[p][r]);
}

#endif

#if BF16_DOT

static inline __m512 dot2(__m512 sum, __m512i w, __m512i x) {
#if defined(EMULATED)
    return _mm512_dpbf16_ps(sum, w, x);
#else
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
#endif
}

/* 32 bf16 numbers as two float vectors: those at even places, those at odd ones. */
INLINE __m512 evens(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }

INLINE __m512 odds(__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }

#endif

#if BF16_DOT && !TILES

INLINE void panel_p16(const uint8_t *const *data, const int P, int64_t K, int64_t ahead, const Row *x, const int n,
                      float *out) {
    const uint8_t *w[2] = {data[0], data[P - 1]};
    __m512 a[2][VECTOR_ROWS], b[2][VECTOR_ROWS];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < n; r++) a[p][r] = b[p][r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 4) {
        __m512i w0[2], w1[2];
        for (int p = 0; p < P; p++, w[p - 1] += 128) {
            w0[p] = _mm512_loadu_si512(w[p]), w1[p] = _mm512_loadu_si512(w[p] + 64);
            __builtin_prefetch(w[p] + ahead, 0, 2), __builtin_prefetch(w[p] + ahead + 64, 0, 2);
        }
        for (int r = 0; r < n; r++) {
            const int8_t *at = (const int8_t *)x[r].x + 2 * k;
            __m512i x0 = broadcast4(at), x1 = broadcast4(at + 4);
            for (int p = 0; p < P; p++) {
                a[p][r] = dot2(a[p][r], w0[p], x0);
                b[p][r] = dot2(b[p][r], w1[p], x1); /* always: a row's sum must not depend on its company */
            }
        }
    }
    for (int p = 0; p < P; p++)
        for (int r = 0; r < n; r++)
            _mm512_storeu_ps(out + (p * ROWS + r) * PANEL, _mm512_add_ps(a[p][r], b[p][r]));
}

#endif
