/* Numbers: dtypes, bfloat16, vectors of eight, and the functions of one number. Everything else includes this first. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

enum { F_F32 = 0, F_BF16 = 1, F_P16 = 2, F_Q8 = 3, F_Q4 = 4, F_W16 = 5, F_P32 = 6 }; /* panels.h has the last five */

#define INLINE static inline __attribute__((always_inline))

/* What sums floats in an order that the compiler chooses stays one function, so that every caller gets the same bits. */
#define ONE static __attribute__((noinline))

INLINE float from_bf16(uint16_t v) {
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE uint16_t to_bf16(float f) { /* round to nearest even; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)rounded;
}

/* ---- vectors of eight: the compiler makes of them what the instruction set has ------------------------------- */

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

INLINE Floats all(float x) { return (Floats){x, x, x, x, x, x, x, x}; }

INLINE Floats load8(const float *p) {
    Floats v;
    memcpy(&v, p, 32);
    return v;
}

INLINE void store8(float *p, Floats v) { memcpy(p, &v, 32); }

INLINE Words words8(const void *p) {
    Words v;
    memcpy(&v, p, 32);
    return v;
}

INLINE Floats load8_bf16(const uint16_t *p) {
    Halves v;
    memcpy(&v, p, 16);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

/* ---- rows ----------------------------------------------------------------------------------------------------- */

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

/* ---- functions ------------------------------------------------------------------------------------------------- */

INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return fmaf(a, b, c);
#else
    return a * b + c; /* without the instruction, fmaf is a slow call */
#endif
}

/* e^x in float32, relative error about 2e-7, written so that compilers vectorise it (Cephes' polynomial). */
INLINE float exp_(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(x * 1.44269504f);
    float r = multiply_add(n, -0.693359375f, x);
    r = multiply_add(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = multiply_add(p, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float two_n;
    memcpy(&two_n, &bits, 4);
    return x == x ? p * two_n : x;
}

INLINE float silu(float x) { return x / (1.0f + exp_(-x)); }

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
