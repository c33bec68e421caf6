/* Weights as they lie in memory, and rows of activations in the form that a weight's format multiplies. panels.h has the
   formats.

   Letters: N rows, K inputs, G inputs a group. */

#define PANEL 16
#define VECTOR_ROWS 6 /* rows of x that share one load of the weights: 2 panels x 6 rows x 2 sums fit 32 registers */

/* Rows that one call of panels takes at most: as many as a tile has. */
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES 1
#define ROWS 16
#else
#define TILES 0
#define ROWS VECTOR_ROWS
#endif

typedef struct {
    const uint8_t *data;
    int64_t outputs, inputs, format;
    int64_t group; /* inputs that share a scale; K is padded to a multiple of it */
    int64_t step;  /* bytes from one panel to the next; gate and up panels lie alternately, so that one stream reads both */
} Weight;

/* One row of x in the form that a weight format multiplies. */
typedef struct {
    const void *x;        /* int8, bf16 or float: row_value says which */
    const float *scale;   /* per group */
    const int32_t *start; /* per group, what the sum of the products starts at: -offset * sum of the int8 values */
} Row;

/* Whether the products of F_P16 are the processor's own, of bf16 by bf16. */
#if defined(__AVX512BF16__)
#define BF16_DOT 1
#else
#define BF16_DOT 0
#endif

/* ---- rows of activations ------------------------------------------------------------------------------------- */

typedef struct { /* N rows prepared for one weight format, and the memory behind them */
    Row *rows;
    char *memory;
    int64_t inputs, padded, group, groups, format, stride; /* stride: bytes a row */
} Rows;

static int is_quantised(int64_t format) { return format == F_Q8 || format == F_Q4; }

/* Bytes of a value in a row. Where bf16 products are made of float32, a row of bf16 values is float32, too. */
static int64_t row_value(int64_t format) {
    if (is_quantised(format)) return 1;
    if (format == F_P16) return BF16_DOT ? 2 : 4;
    return format == F_BF16 ? 2 : 4;
}

static int rows_alloc(Rows *r, int64_t n, const Weight *w) {
    r->inputs = w->inputs, r->format = w->format, r->group = w->group;
    int quantised = is_quantised(w->format);
    r->padded = round_up(w->inputs, w->group);
    r->groups = quantised ? r->padded / w->group : 0;
    int64_t size = row_value(w->format);
    r->stride = round_up(r->padded * size + r->groups * 8, 64);
    r->rows = malloc(n * sizeof(Row) + 64);
    r->memory = malloc(n * r->stride + 64);
    if (!r->rows || !r->memory) return 1;
    char *base = (char *)(((uintptr_t)r->memory + 63) & ~(uintptr_t)63);
    for (int64_t i = 0; i < n; i++) {
        char *p = base + i * r->stride;
        r->rows[i].x = p;
        r->rows[i].scale = (const float *)(p + r->padded * size);
        r->rows[i].start = (const int32_t *)(p + r->padded * size + r->groups * 4);
    }
    return 0;
}

static void rows_free(Rows *r) {
    free(r->rows);
    free(r->memory);
}

/* A group's values, as integers: the bits of the largest magnitude (floats keep their order so, and NaN is above all),
   and x * inverse rounded to q, with its sum. */
#if defined(__AVX512F__)
static inline int32_t largest_bits(const float *x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 there = (__mmask16)(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(there, x + i), magnitude));
    }
    return _mm512_reduce_max_epi32(most);
}

static inline int32_t round_group(const float *x, int64_t n, float inverse, int8_t *q) {
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 there = (__mmask16)(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
        __m512 product = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, x + i), _mm512_set1_ps(inverse));
        __m512i v = _mm512_cvtps_epi32(product);
        _mm512_mask_cvtepi32_storeu_epi8(q + i, there, v);
        total = _mm512_add_epi32(total, v);
    }
    return _mm512_reduce_add_epi32(total);
}
#else
static int32_t largest_bits(const float *x, int64_t n) {
    int32_t bits = 0;
#pragma omp simd reduction(max : bits)
    for (int64_t i = 0; i < n; i++) {
        int32_t b;
        memcpy(&b, x + i, 4);
        b &= 0x7fffffff;
        bits = b > bits ? b : bits;
    }
    return bits;
}

static int32_t round_group(const float *x, int64_t n, float inverse, int8_t *q) {
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        int32_t v = (int32_t)rintf(x[i] * inverse);
        q[i] = (int8_t)v;
        total += v;
    }
    return total;
}
#endif

/* n values in symmetric 8 bits; returns their sum. One that is not a number, or infinite, makes the whole group not a
   number. */
static inline int32_t quantise_group(const float *x, int64_t n, int64_t group, int8_t *q, float *scale) {
    int32_t bits = largest_bits(x, n), total = 0;
    float most;
    memcpy(&most, &bits, 4);
    int usable = most > 1e-30f && most <= 3.4e38f;
    if (!usable || n < group) memset(q, 0, group);
    if (usable) total = round_group(x, n, 127.0f / most, q);
    else if (!(most <= 3.4e38f)) most = NAN;
    *scale = most / 127.0f;
    return total;
}

/* The values start .. start + n of x (a float row of `inputs`) into row i, from the beginning of a group to the end of one,
   or to the end of the row. */
static void rows_set_part(Rows *r, int64_t i, int64_t start, int64_t n, const float *x) {
    Row *row = &r->rows[i];
    int64_t end = start + n, padded = end == r->inputs ? r->padded : end;
    if (!is_quantised(r->format)) {
        int64_t size = row_value(r->format);
        store_row((void *)row->x, size == 4 ? F_F32 : F_BF16, start, x, n);
        if (r->format == F_P16 && size == 4) round_row((float *)row->x + start, F_BF16, n);
        memset((char *)row->x + end * size, 0, (padded - end) * size);
    } else
        for (int64_t k = start; k < end; k += r->group) {
            int64_t g = k / r->group;
            int32_t sum = quantise_group(x + k - start, min64(r->group, end - k), r->group, (int8_t *)row->x + k,
                                         (float *)row->scale + g);
            ((int32_t *)row->start)[g] = -(r->format == F_Q8 ? 128 : 8) * sum;
        }
}

/* Row i becomes row n of others of the same format. */
static inline void rows_copy(Rows *r, int64_t i, const Rows *from, int64_t n) {
    memcpy((void *)r->rows[i].x, from->rows[n].x, r->stride);
}

/* x (float, `inputs` values) into row i. */
static inline void rows_set(Rows *r, int64_t i, const float *x) { rows_set_part(r, i, 0, r->inputs, x); }
