/* Integer panels in plain C, for processors that no other file knows. Part of panels.h. */

#define VECTOR_INT 0
#define TWO_PANELS 0

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

