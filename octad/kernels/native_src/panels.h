/* Numbers, rows of activations, and panels of weights: 16 outputs times a few rows. Part of native.c.

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

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

enum { F_F32 = 0, F_BF16 = 1, F_P16 = 2, F_Q8 = 3, F_Q4 = 4 };
#define PANEL 16
#define ROWS 6 /* rows of x that share one load of the weights: 2 panels x 6 rows x 2 sums fit 32 registers */

typedef struct {
    const uint8_t *data;
    int64_t outputs, inputs, format;
    int64_t group; /* inputs that share a scale; K is padded to a multiple of it */
    int64_t step;  /* bytes from one panel to the next; gate and up panels lie alternately, so that one stream reads both */
} Weight;

/* One row of x in the form that a weight format multiplies. */
typedef struct {
    const void *x;        /* int8, bf16 or float */
    const float *scale;   /* per group */
    const int32_t *sum;   /* per group, sum of the int8 values */
} Row;

/* ---- numbers ------------------------------------------------------------------------------------------------- */

static inline float from_bf16(uint16_t v) {
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t to_bf16(float f) { /* round to nearest even; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)rounded;
}

static inline float load1(const void *p, int64_t dtype, int64_t i) {
    return dtype == F_F32 ? ((const float *)p)[i] : from_bf16(((const uint16_t *)p)[i]);
}

static inline void store1(void *p, int64_t dtype, int64_t i, float v) {
    if (dtype == F_F32) ((float *)p)[i] = v;
    else ((uint16_t *)p)[i] = to_bf16(v);
}

/* What sums floats in an order that the compiler chooses stays one function, so that every caller gets the same bits. */
#define ONE static __attribute__((noinline))

static void load_row(float *to, const void *from, int64_t dtype, int64_t start, int64_t n) {
    if (dtype == F_F32) {
        memcpy(to, (const float *)from + start, n * sizeof(float));
        return;
    }
    const uint16_t *p = (const uint16_t *)from + start;
    for (int64_t i = 0; i < n; i++) to[i] = from_bf16(p[i]);
}

static void store_row(void *to, int64_t dtype, int64_t start, const float *from, int64_t n) {
    if (dtype == F_F32) {
        memcpy((float *)to + start, from, n * sizeof(float));
        return;
    }
    uint16_t *p = (uint16_t *)to + start;
    for (int64_t i = 0; i < n; i++) p[i] = to_bf16(from[i]);
}

/* As if stored in `dtype` and loaded again. */
static void round_row(float *x, int64_t dtype, int64_t n) {
    if (dtype == F_BF16)
        for (int64_t i = 0; i < n; i++) x[i] = from_bf16(to_bf16(x[i]));
}

/* e^x in float32, relative error about 2e-7, written so that compilers vectorise it (Cephes' polynomial). */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float two_n;
    memcpy(&two_n, &bits, 4);
    return x == x ? p * two_n : x;
}

static inline float silu(float x) { return x / (1.0f + exp_(-x)); }

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- rows of activations ------------------------------------------------------------------------------------- */

typedef struct { /* N rows prepared for one weight format, and the memory behind them */
    Row *rows;
    char *memory;
    int64_t inputs, padded, group, groups, format, stride; /* stride: bytes a row */
} Rows;

static int rows_alloc(Rows *r, int64_t n, const Weight *w) {
    r->inputs = w->inputs, r->format = w->format, r->group = w->group;
    int quantised = w->format >= F_Q8;
    r->padded = round_up(w->inputs, w->group);
    r->groups = quantised ? r->padded / w->group : 0;
    int64_t size = quantised ? 1 : (w->format == F_F32 ? 4 : 2);
    r->stride = round_up(r->padded * size + r->groups * 8, 64);
    r->rows = malloc(n * sizeof(Row) + 64);
    r->memory = malloc(n * r->stride + 64);
    if (!r->rows || !r->memory) return 1;
    char *base = (char *)(((uintptr_t)r->memory + 63) & ~(uintptr_t)63);
    for (int64_t i = 0; i < n; i++) {
        char *p = base + i * r->stride;
        r->rows[i].x = p;
        r->rows[i].scale = (const float *)(p + r->padded * size);
        r->rows[i].sum = (const int32_t *)(p + r->padded * size + r->groups * 4);
    }
    return 0;
}

static void rows_free(Rows *r) {
    free(r->rows);
    free(r->memory);
}

/* n values in symmetric 8 bits. One that is not a number, or infinite, makes the whole group not a number. */
static void quantise_group(const float *x, int64_t n, int64_t group, int8_t *q, float *scale, int32_t *sum) {
    int32_t bits = 0; /* of the largest magnitude: as integers, floats keep their order and NaN is above all */
#pragma omp simd reduction(max : bits)
    for (int64_t i = 0; i < n; i++) {
        int32_t b;
        memcpy(&b, x + i, 4);
        b &= 0x7fffffff;
        bits = b > bits ? b : bits;
    }
    float most;
    memcpy(&most, &bits, 4);
    int32_t total = 0;
    memset(q, 0, group);
    if (most > 1e-30f && most <= 3.4e38f) {
        float inverse = 127.0f / most;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; i++) {
            int32_t v = (int32_t)rintf(x[i] * inverse);
            q[i] = (int8_t)v;
            total += v;
        }
    } else if (!(most <= 3.4e38f)) most = NAN;
    *scale = most / 127.0f, *sum = total;
}

/* x (float, `inputs` values) into row i. */
static void rows_set(Rows *r, int64_t i, const float *x) {
    Row *row = &r->rows[i];
    if (r->format == F_F32) memcpy((void *)row->x, x, r->inputs * 4);
    else if (r->format <= F_P16) {
        store_row((void *)row->x, F_BF16, 0, x, r->inputs);
        for (int64_t k = r->inputs; k < r->padded; k++) ((uint16_t *)row->x)[k] = 0;
    } else
        for (int64_t g = 0; g < r->groups; g++) {
            int64_t start = g * r->group;
            quantise_group(x + start, min64(r->group, r->inputs - start), r->group, (int8_t *)row->x + start,
                           (float *)row->scale + g, (int32_t *)row->sum + g);
        }
}

/* ---- panels: 16 outputs x up to 8 rows ----------------------------------------------------------------------- */

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

/* One or two panels (P) at once: with two, each broadcast of x serves twice. Where that leaves fewer than four sums in
   flight, two take turns (b), so that they do not wait for the instruction's latency. */
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
                a[p][r] = _mm512_set1_epi32(-(1 << (bits - 1)) * x[r].sum[g]);
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
                    a[p][r] = _mm512_dpbusd_epi32(a[p][r], w0[p], x0);
                    if (P * n < 4) b[p][r] = _mm512_dpbusd_epi32(b[p][r], w1[p], x1);
                    else a[p][r] = _mm512_dpbusd_epi32(a[p][r], w1[p], x1);
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
            for (int o = 0; o < PANEL; o++) acc[o] = -(1 << (bits - 1)) * x[r].sum[g];
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

static inline __attribute__((always_inline)) void panel_p16(const uint8_t *const *data, const int P, int64_t K,
                                                            int64_t ahead, const Row *x, const int n, float *out) {
    const uint8_t *w[2] = {data[0], data[P - 1]};
    __m512 a[2][ROWS], b[2][ROWS];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < n; r++) a[p][r] = b[p][r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 4) {
        __m512bh w0[2], w1[2];
        for (int p = 0; p < P; p++, w[p - 1] += 128) {
            w0[p] = (__m512bh)_mm512_loadu_si512(w[p]), w1[p] = (__m512bh)_mm512_loadu_si512(w[p] + 64);
            __builtin_prefetch(w[p] + ahead, 0, 2), __builtin_prefetch(w[p] + ahead + 64, 0, 2);
        }
        for (int r = 0; r < n; r++) {
            const int8_t *at = (const int8_t *)x[r].x + 2 * k;
            __m512bh x0 = (__m512bh)broadcast4(at), x1 = (__m512bh)broadcast4(at + 4);
            for (int p = 0; p < P; p++) {
                a[p][r] = _mm512_dpbf16_ps(a[p][r], w0[p], x0);
                b[p][r] = _mm512_dpbf16_ps(b[p][r], w1[p], x1); /* always: a row's sum must not depend on its company */
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

/* Rows a step: as many as the registers hold beside the weights. */
static inline int64_t rows_at_once(const Weight *w) { return w->format == F_Q4 ? 4 : ROWS; }

static inline const uint8_t *panel_at(const Weight *w, int64_t p) { return w->data + p * w->step; }

static inline int panel_outputs(const Weight *w, int64_t p) { return (int)min64(PANEL, w->outputs - p * PANEL); }

static inline int64_t panel_count(const Weight *w) { return (w->outputs + PANEL - 1) / PANEL; }

/* out[i][r][0..15] = rows x[r] times panel data[i], for P <= 2 panels of the shape of w and n <= ROWS rows. What lies
   `ahead` bytes behind is fetched meanwhile: the weights that come next, or nothing new (0). The hardware foresees one
   stream at a time, and none beyond a page. */
static void panels(const Weight *w, const uint8_t *const *data, const int *outs, int P, int64_t ahead, const Row *x, int n,
                   float *out) {
    if (w->format <= F_BF16) {
        for (int i = 0; i < P; i++) {
            if (w->format == F_F32) panel_f32((const float *)data[i], w->inputs, outs[i], x, n, out + i * ROWS * PANEL);
            else panel_bf16((const uint16_t *)data[i], w->inputs, outs[i], x, n, out + i * ROWS * PANEL);
        }
        return;
    }
    if (P == 2 && n < rows_at_once(w)) { /* few rows are bound by memory: one stream at a time */
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
        CASE(2, 4) CASE(2, 6) /* full steps only */
    }
}
