/* Panels of weights: 16 outputs times a few rows, where the time goes. Part of native.c.

   A weight W [O, K] is stored in panels of 16 outputs, one after another (O and K padded with zeros):
     F_P16   bf16 [K/2][16][2]
     F_Q8    for two groups at a time: scales bf16 [2][16], then u8 [2][G/4][16][4], value + 128
     F_Q4    the same with u8 [2][G/8][16][4], value + 8: low nibble the first 4 inputs, high nibble the next 4
             (an odd last group stands alone, behind 64 bytes of scales all the same)
     F_F32, F_BF16   plain rows [O, K], not padded
   so that a panel is read strictly in order: a jump of a few cache lines costs the hardware's prefetcher its stream.
   Unsigned weights because the dot-product instruction multiplies unsigned by signed; the offset is taken off by starting
   the sum at -offset * sum(x).

   Letters: N tokens, O outputs, K inputs, G inputs a group. */

/* ---- integers ------------------------------------------------------------------------- */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

#define VECTOR_INT 1
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
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

/* One or two panels (P) at once: with two, each broadcast of x serves twice, and the loads no longer outnumber the
   products. Where that leaves fewer than four sums in flight, two take turns (b), so that they do not wait for the
   instruction's latency. */
static inline __attribute__((always_inline)) void panel_int(const uint8_t *const *data, const int P, const int bits,
                                                            int64_t groups, int64_t group, int64_t ahead,
                                                            const Row *x, const int n, float *out) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t *w[2] = {data[0], data[P - 1]}, *scales[2] = {w[0], w[1]};
    __m512 f[2][ROWS];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < n; r++) f[p][r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512i a[2][ROWS], b[2][ROWS];
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

#else

#define VECTOR_INT 0
static void panel_int(const uint8_t *const *data, int P, int bits, int64_t groups, int64_t group, int64_t ahead,
                      const Row *x, int n, float *out) {
    (void)ahead;
    for (int i = 0; i < P * n; i++) {
        int r = i % n;
        const int8_t *q = (const int8_t *)x[r].x;
        const uint8_t *p = data[i / n];
        const uint16_t *s = (const uint16_t *)p;
        float *to = out + (i / n * ROWS + r) * PANEL;
        memset(to, 0, PANEL * sizeof(float));
        for (int64_t g = 0; g < groups; g++) {
            int32_t acc[PANEL];
            if (g % 2 == 0) s = (const uint16_t *)p, p += 64;
            for (int o = 0; o < PANEL; o++) acc[o] = x[r].start[g];
            for (int64_t k = g * group; k < (g + 1) * group; k += 8)
                for (int half = 0; half < 2; half++) {
                    const int8_t *xq = q + k + 4 * half;
                    for (int o = 0; o < PANEL; o++)
                        for (int j = 0; j < 4; j++) {
                            int v = bits == 8 ? p[4 * o + j] : (half ? p[4 * o + j] >> 4 : p[4 * o + j] & 15);
                            acc[o] += v * xq[j];
                        }
                    if (bits == 8 || half) p += 64;
                }
            for (int o = 0; o < PANEL; o++)
                to[o] += (float)acc[o] * (from_bf16(s[g % 2 * PANEL + o]) * x[r].scale[g]);
        }
    }
}

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

#if defined(__AVX512BF16__)

static inline __m512 dot2(__m512 sum, __m512i w, __m512i x) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

static inline __attribute__((always_inline)) void panel_p16(const uint8_t *const *data, const int P, int64_t K,
                                                            int64_t ahead, const Row *x, const int n, float *out) {
    const uint8_t *w[2] = {data[0], data[P - 1]};
    __m512 a[2][ROWS], b[2][ROWS];
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

#else

static void panel_p16(const uint8_t *const *data, int P, int64_t K, int64_t ahead, const Row *x, int n, float *out) {
    (void)ahead;
    for (int i = 0; i < P * n; i++) {
        const uint16_t *q = (const uint16_t *)x[i % n].x, *w = (const uint16_t *)data[i / n];
        float sum[PANEL] = {0};
        for (int64_t k = 0; k < K; k++)
            for (int o = 0; o < PANEL; o++) sum[o] += from_bf16(w[(k / 2 * PANEL + o) * 2 + k % 2]) * from_bf16(q[k]);
        memcpy(out + (i / n * ROWS + i % n) * PANEL, sum, sizeof sum);
    }
}

#endif

static inline const uint8_t *panel_at(const Weight *w, int64_t p) { return w->data + p * w->step; }

static inline int panel_outputs(const Weight *w, int64_t p) { return (int)min64(PANEL, w->outputs - p * PANEL); }

static inline int64_t panel_count(const Weight *w) { return (w->outputs + PANEL - 1) / PANEL; }

/* out[i][r][0..15] = rows x[r] times panel data[i], for P <= 2 panels of the shape of w and n <= ROWS rows. What lies
   `ahead` bytes behind is fetched meanwhile: the weights that come next. 0 says that these panels have just been read, for
   other rows. From memory one panel at a time is quickest, whatever the number of rows: two streams that lie so near each
   other reach two thirds of its bandwidth. From the cache it is both at once, which share the loads of x. */
static void panels(const Weight *w, const uint8_t *const *data, const int *outs, int P, int64_t ahead, const Row *x, int n,
                   float *out) {
    if (w->format <= F_BF16) {
        for (int i = 0; i < P; i++) {
            if (w->format == F_F32) panel_f32((const float *)data[i], w->inputs, outs[i], x, n, out + i * ROWS * PANEL);
            else panel_bf16((const uint16_t *)data[i], w->inputs, outs[i], x, n, out + i * ROWS * PANEL);
        }
        return;
    }
    if (P == 2 && ahead) {
        panels(w, data, outs, 1, ahead, x, n, out);
        panels(w, data + 1, outs + 1, 1, ahead, x, n, out + ROWS * PANEL);
        return;
    }
    int64_t groups = (w->inputs + w->group - 1) / w->group;
#define CASE(P_, n_)                                                                                                   \
    case P_ * 16 + n_:                                                                                                 \
        if (w->format == F_Q8) panel_int(data, P_, 8, groups, w->group, ahead, x, n_, out);                            \
        else if (w->format == F_Q4) panel_int(data, P_, 4, groups, w->group, ahead, x, n_, out);                       \
        else panel_p16(data, P_, groups * w->group, ahead, x, n_, out);                                                \
        break;
    switch (P * 16 + n) {
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6)
        CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(2, 5) CASE(2, 6)
    }
}
