/* Integer panels by ARM's dot products of bytes. Part of panels.h.

   A vector holds 4 inputs of 4 outputs, so that a panel's 64 bytes are four of them. With i8mm weights are unsigned, as
   everywhere; without, both factors are signed: 8-bit weights lose their offset, and with it the row's start, and 4-bit
   ones are small enough as they are. */

#include <arm_neon.h>

#define VECTOR_INT 1
#define TWO_PANELS 0

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define SIGNED 0
INLINE int32x4_t dot4(int32x4_t sum, uint8x16_t w, int8x16_t x) { return vusdotq_s32(sum, w, x); }
#else
#define SIGNED 1
INLINE int32x4_t dot4(int32x4_t sum, uint8x16_t w, int8x16_t x) { return vdotq_s32(sum, vreinterpretq_s8_u8(w), x); }
#endif

INLINE int8x16_t four(const int8_t *q) { /* the same four bytes four times */
    int32_t v;
    memcpy(&v, q, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
}

/* Four scales of bf16. */
INLINE float32x4_t scales4(const uint16_t *s) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(s), 16)); }

INLINE void panel_int(const uint8_t *const *data, const int P, const int bits, int64_t groups, int64_t group,
                      int64_t ahead, const Row *x, const int n, float *out) {
    (void)P; /* one panel */
    const uint8_t *w = data[0];
    const uint16_t *scales = (const uint16_t *)w;
    float32x4_t f[VECTOR_ROWS][4];
    for (int r = 0; r < n; r++)
        for (int i = 0; i < 4; i++) f[r][i] = vdupq_n_f32(0);
    for (int64_t g = 0; g < groups; g++) {
        int32x4_t total[VECTOR_ROWS][4];
        if (g % 2 == 0) scales = (const uint16_t *)w, w += 64;
        for (int r = 0; r < n; r++)
            for (int i = 0; i < 4; i++) total[r][i] = vdupq_n_s32(SIGNED && bits == 8 ? 0 : x[r].start[g]);
        for (int64_t k = g * group; k < (g + 1) * group; k += 32 / bits, w += 64) {
            __builtin_prefetch(w + ahead, 0, 2);
            for (int i = 0; i < 4; i++) {
                uint8x16_t b = vld1q_u8(w + 16 * i);
                if (bits == 8 && SIGNED) b = veorq_u8(b, vdupq_n_u8(0x80));
                uint8x16_t low = bits == 8 ? b : vandq_u8(b, vdupq_n_u8(15)), high = vshrq_n_u8(b, 4);
                for (int r = 0; r < n; r++) {
                    const int8_t *q = (const int8_t *)x[r].x + k;
                    total[r][i] = dot4(total[r][i], low, four(q));
                    if (bits == 4) total[r][i] = dot4(total[r][i], high, four(q + 4));
                }
            }
        }
        for (int i = 0; i < 4; i++) {
            float32x4_t scale = scales4(scales + g % 2 * PANEL + 4 * i);
            for (int r = 0; r < n; r++)
                f[r][i] = vfmaq_f32(f[r][i], vcvtq_f32_s32(total[r][i]), vmulq_n_f32(scale, x[r].scale[g]));
        }
    }
    for (int r = 0; r < n; r++)
        for (int i = 0; i < 4; i++) vst1q_f32(out + r * PANEL + 4 * i, f[r][i]);
}
