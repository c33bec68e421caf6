/* Instruction sets that the processor at hand does not have, in plain C: what tests run their kernels with.

       cc -mavx2 -mfma -mf16c -include tests/kernels/emulated.h -DEMULATED=4 -DISA=avx2 ... octad/kernels/native.c

   Included before anything else, it brings the compiler's own intrinsics of AVX2, then claims the instruction sets of
   EMULATED (below) and puts functions in the place of their intrinsics, as Intel's manual describes each (Intel 64 and
   IA-32 Architectures Software Developer's Manual, volume 2; the intrinsics guide). emulated_tiles.h has the tiles. */


#ifndef EMULATED_H
#define EMULATED_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* EMULATED: 1 AVX-VNNI, 2 AVX-512 (F, DQ, BW, VL), 3 with VNNI, 4 with BF16, 5 with AMX */
#if EMULATED == 1
#define __AVXVNNI__ 1
#endif
#if EMULATED >= 2
#define __AVX512F__ 1
#define __AVX512DQ__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#endif
#if EMULATED >= 3
#define __AVX512VNNI__ 1
#endif
#if EMULATED >= 4
#define __AVX512BF16__ 1
#endif
#if EMULATED >= 5
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#endif

#define EMULATION static inline __attribute__((unused))

typedef union {
    __m512 ps;
    __m512i si;
    __m512d pd;
    float f[16];
    double d[8];
    int32_t i32[16];
    uint32_t u32[16];
    uint16_t u16[32];
    int8_t i8[64];
    uint8_t u8[64];
} Zmm;

#define OVER(n) for (int i = 0; i < (n); i++)

/* ---- AVX-512: memory and constants -------------------------------------------------------------------------------- */

EMULATION __m512i z_load(const void *p) {
    Zmm z;
    memcpy(&z, p, 64);
    return z.si;
}

EMULATION __m512 z_load_ps(const void *p) {
    Zmm z = {.si = z_load(p)};
    return z.ps;
}

EMULATION void z_store_ps(void *p, __m512 v) { memcpy(p, &v, 64); }

EMULATION void z_store(void *p, __m512i v) { memcpy(p, &v, 64); }

EMULATION __m512i z_maskz_load(__mmask16 mask, const void *p) { /* what is masked is not touched */
    Zmm z = {.si = {0}};
    OVER(16) if (mask >> i & 1) memcpy(&z.i32[i], (const char *)p + 4 * i, 4);
    return z.si;
}

EMULATION __m512 z_maskz_load_ps(__mmask16 mask, const void *p) {
    Zmm z = {.si = z_maskz_load(mask, p)};
    return z.ps;
}

EMULATION void z_mask_store_ps(void *p, __mmask16 mask, __m512 v) {
    Zmm z = {.ps = v};
    OVER(16) if (mask >> i & 1) memcpy((char *)p + 4 * i, &z.f[i], 4);
}

EMULATION void z_mask_store_low_bytes(void *p, __mmask16 mask, __m512i v) {
    Zmm z = {.si = v};
    OVER(16) if (mask >> i & 1) ((uint8_t *)p)[i] = (uint8_t)z.u32[i];
}

EMULATION __m512 z_all_ps(float x) {
    Zmm z;
    OVER(16) z.f[i] = x;
    return z.ps;
}

EMULATION __m512i z_all_32(int32_t x) {
    Zmm z;
    OVER(16) z.i32[i] = x;
    return z.si;
}

EMULATION __m512i z_all_8(char x) {
    Zmm z;
    OVER(64) z.i8[i] = x;
    return z.si;
}

/* ---- arithmetic ---------------------------------------------------------------------------------------------------- */

#define Z_EACH(name, type, width, expression)                                                                          \
    EMULATION type name(type x, type y) {                                                                              \
        Zmm a, b, z;                                                                                                   \
        memcpy(&a, &x, 64), memcpy(&b, &y, 64);                                                                        \
        OVER(width) expression;                                                                                        \
        type answer;                                                                                                   \
        memcpy(&answer, &z, 64);                                                                                       \
        return answer;                                                                                                 \
    }

Z_EACH(z_add_ps, __m512, 16, z.f[i] = a.f[i] + b.f[i])
Z_EACH(z_mul_ps, __m512, 16, z.f[i] = a.f[i] * b.f[i])
Z_EACH(z_add_32, __m512i, 16, z.u32[i] = a.u32[i] + b.u32[i])
Z_EACH(z_max_32, __m512i, 16, z.i32[i] = a.i32[i] > b.i32[i] ? a.i32[i] : b.i32[i])
Z_EACH(z_and, __m512i, 16, z.u32[i] = a.u32[i] & b.u32[i])

EMULATION __m512 z_fmadd(__m512 x, __m512 y, __m512 c) {
    Zmm a = {.ps = x}, b = {.ps = y}, z = {.ps = c};
    OVER(16) z.f[i] = fmaf(a.f[i], b.f[i], z.f[i]);
    return z.ps;
}

EMULATION __m512i z_shift_left_32(__m512i x, unsigned bits) {
    Zmm z = {.si = x};
    OVER(16) z.u32[i] <<= bits;
    return z.si;
}

EMULATION __m512i z_shift_right_16(__m512i x, unsigned bits) {
    Zmm z = {.si = x};
    OVER(32) z.u16[i] = (uint16_t)(z.u16[i] >> bits);
    return z.si;
}

EMULATION int32_t z_sum_32(__m512i x) {
    Zmm z = {.si = x};
    uint32_t sum = 0;
    OVER(16) sum += z.u32[i];
    return (int32_t)sum;
}

EMULATION int32_t z_most_32(__m512i x) {
    Zmm z = {.si = x};
    int32_t most = z.i32[0];
    OVER(16) most = z.i32[i] > most ? z.i32[i] : most;
    return most;
}

/* ---- conversions and permutations ----------------------------------------------------------------------------------- */

EMULATION __m512 z_from_32(__m512i x) {
    Zmm z = {.si = x};
    OVER(16) z.f[i] = (float)z.i32[i];
    return z.ps;
}

EMULATION __m512i z_to_32(__m512 x) { /* to the nearest, ties to even; what does not fit is the smallest number */
    Zmm z = {.ps = x};
    OVER(16) z.i32[i] = fabsf(z.f[i]) < 0x1p31f ? (int32_t)rintf(z.f[i]) : INT32_MIN;
    return z.si;
}

EMULATION __m512i z_widen_u16(__m256i x) {
    uint16_t from[16];
    Zmm z;
    memcpy(from, &x, 32);
    OVER(16) z.u32[i] = from[i];
    return z.si;
}

/* Of each 128 bits: the first or the second halves of a and b, alternately; `size` numbers at a time. */
EMULATION __m512i z_unpack(__m512i x, __m512i y, int high, int size) {
    Zmm a = {.si = x}, b = {.si = y}, z;
    for (int lane = 0; lane < 16; lane += 4)
        for (int j = 0; j < 4; j++) {
            const Zmm *from = j / size % 2 ? &b : &a;
            z.u32[lane + j] = from->u32[lane + (high ? 2 : 0) + (size == 1 ? j / 2 : j % 2)];
        }
    return z.si;
}

EMULATION __m512 z_unpack_ps(__m512 x, __m512 y, int high) {
    return (__m512)z_unpack((__m512i)x, (__m512i)y, high, 1);
}

EMULATION __m512d z_unpack_pd(__m512d x, __m512d y, int high) {
    return (__m512d)z_unpack((__m512i)x, (__m512i)y, high, 2);
}

EMULATION __m512 z_shuffle_lanes(__m512 x, __m512 y, int control) { /* two of the first's 128 bits, two of the second's */
    Zmm a = {.ps = x}, b = {.ps = y}, z;
    OVER(16) {
        int from = control >> (2 * (i / 4)) & 3;
        z.f[i] = (i < 8 ? &a : &b)->f[4 * from + i % 4];
    }
    return z.ps;
}

EMULATION __m512 z_permute_two(__m512 x, __m512i index, __m512 y) {
    Zmm a = {.ps = x}, b = {.ps = y}, n = {.si = index}, z;
    OVER(16) z.f[i] = (n.u32[i] & 16 ? &b : &a)->f[n.u32[i] & 15];
    return z.ps;
}

#undef _mm512_castps_pd
#undef _mm512_castpd_ps
#undef _mm512_castsi512_ps
#undef _mm512_shuffle_f32x4
#define _mm512_loadu_si512(p) z_load(p)
#define _mm512_loadu_ps(p) z_load_ps(p)
#define _mm512_storeu_ps(p, v) z_store_ps(p, v)
#define _mm512_storeu_si512(p, v) z_store(p, v)
#define _mm512_store_si512(p, v) z_store(p, v)
#define _mm512_maskz_loadu_epi32(mask, p) z_maskz_load(mask, p)
#define _mm512_maskz_loadu_ps(mask, p) z_maskz_load_ps(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) z_mask_store_ps(p, mask, v)
#define _mm512_mask_cvtepi32_storeu_epi8(p, mask, v) z_mask_store_low_bytes(p, mask, v)
#define _mm512_set1_ps(x) z_all_ps(x)
#define _mm512_set1_epi32(x) z_all_32((int32_t)(x))
#define _mm512_set1_epi8(x) z_all_8((char)(x))
#define _mm512_setzero_ps() z_all_ps(0)
#define _mm512_setzero_si512() z_all_32(0)
#define _mm512_setr_epi32(...) z_load((const int32_t[16]){__VA_ARGS__})
#define _mm512_add_ps(x, y) z_add_ps(x, y)
#define _mm512_mul_ps(x, y) z_mul_ps(x, y)
#define _mm512_fmadd_ps(x, y, c) z_fmadd(x, y, c)
#define _mm512_add_epi32(x, y) z_add_32(x, y)
#define _mm512_max_epi32(x, y) z_max_32(x, y)
#define _mm512_and_si512(x, y) z_and(x, y)
#define _mm512_slli_epi32(x, bits) z_shift_left_32(x, bits)
#define _mm512_srli_epi16(x, bits) z_shift_right_16(x, bits)
#define _mm512_reduce_add_epi32(x) z_sum_32(x)
#define _mm512_reduce_max_epi32(x) z_most_32(x)
#define _mm512_cvtepi32_ps(x) z_from_32(x)
#define _mm512_cvtps_epi32(x) z_to_32(x)
#define _mm512_cvtepu16_epi32(x) z_widen_u16(x)
#define _mm512_castps_pd(x) ((__m512d)(x))
#define _mm512_castpd_ps(x) ((__m512)(x))
#define _mm512_castsi512_ps(x) ((__m512)(x))
#define _mm512_unpacklo_ps(x, y) z_unpack_ps(x, y, 0)
#define _mm512_unpackhi_ps(x, y) z_unpack_ps(x, y, 1)
#define _mm512_unpacklo_pd(x, y) z_unpack_pd(x, y, 0)
#define _mm512_unpackhi_pd(x, y) z_unpack_pd(x, y, 1)
#define _mm512_shuffle_f32x4(x, y, control) z_shuffle_lanes(x, y, control)
#define _mm512_permutex2var_ps(x, index, y) z_permute_two(x, index, y)

/* ---- VNNI: unsigned times signed bytes, four products each ------------------------------------------------------------ */

EMULATION void dot_bytes(uint32_t *sum, const uint8_t *a, const int8_t *b, int width) {
    OVER(width) for (int j = 0; j < 4; j++) sum[i] += (uint32_t)((int32_t)a[4 * i + j] * (int32_t)b[4 * i + j]);
}

EMULATION __m512i z_dot_bytes(__m512i sum, __m512i x, __m512i y) {
    Zmm a = {.si = x}, b = {.si = y}, z = {.si = sum};
    dot_bytes(z.u32, a.u8, b.i8, 16);
    return z.si;
}

EMULATION __m256i y_dot_bytes(__m256i sum, __m256i x, __m256i y) {
    uint32_t z[8];
    uint8_t a[32];
    int8_t b[32];
    memcpy(z, &sum, 32), memcpy(a, &x, 32), memcpy(b, &y, 32);
    dot_bytes(z, a, b, 8);
    return _mm256_loadu_si256((const __m256i *)z);
}

#define _mm512_dpbusd_epi32(sum, x, y) z_dot_bytes(sum, x, y)
#define _mm256_dpbusd_avx_epi32(sum, x, y) y_dot_bytes(sum, x, y)

/* ---- BF16: products of bfloat16 in float32; numbers below 2^-126 count as zero ----------------------------------------- */

EMULATION float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

EMULATION float bf16_value(uint16_t x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return flushed(f);
}

EMULATION float bf16_fma(float sum, uint16_t a, uint16_t b) {
    return flushed(fmaf(bf16_value(a), bf16_value(b), flushed(sum)));
}

EMULATION uint16_t bf16_nearest(float x) {
    uint32_t u;
    x = flushed(x);
    memcpy(&u, &x, 4);
    if (x != x) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

EMULATION __m512 z_dot_bf16(__m512 sum, __m512i x, __m512i y) { /* the odd one first */
    Zmm a = {.si = x}, b = {.si = y}, z = {.ps = sum};
    OVER(16) for (int j = 1; j >= 0; j--) z.f[i] = bf16_fma(z.f[i], a.u16[2 * i + j], b.u16[2 * i + j]);
    return z.ps;
}

EMULATION __m256i z_to_bf16(__m512 x) {
    Zmm a = {.ps = x};
    uint16_t to[16];
    OVER(16) to[i] = bf16_nearest(a.f[i]);
    return _mm256_loadu_si256((const __m256i *)to);
}

#define _mm512_dpbf16_ps(sum, x, y) z_dot_bf16(sum, (__m512i)(x), (__m512i)(y))
#define _mm512_cvtneps_pbh(x) z_to_bf16(x)

#include "emulated_tiles.h"

#endif
