/* The kernels of an ARM instruction set against the portable ones, without Python: `make test-neon` compiles both into this
   program and runs it under qemu-user. Weights of all packed formats are random bytes of the layout that panels.h describes;
   integer sums are exact, so that what may differ is float32's rounding. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    const uint8_t *data;
    int64_t outputs, inputs, format, group, step;
} Weight;

typedef int Linear(const Weight *, int64_t, const void *, int64_t, int64_t, void **, const float *const *, int64_t);
typedef int Attention(const void *, const void *, const void *, int64_t, const int32_t *, const int32_t *, int64_t, int64_t,
                      int64_t, int64_t, int64_t, int64_t, int64_t, float, void *, int64_t);
Linear octad_portable_linear, octad_neondot_linear, octad_neoni8mm_linear;
Attention octad_portable_paged_attention, octad_neondot_paged_attention, octad_neoni8mm_paged_attention;
int octad_runs(const char *isa);

static uint32_t state = 1;

static uint32_t draw(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

static float number(void) { return (float)draw() / (1 << 23) - 1.0f; } /* -1 .. 1 */

static uint16_t bf16(float f) {
    union {
        float f;
        uint32_t u;
    } v = {f};
    return (uint16_t)(v.u >> 16);
}

/* The largest difference beside the largest value. */
static double off(const float *a, const float *b, int n) {
    double most = 1e-30, apart = 0;
    for (int i = 0; i < n; i++) {
        most = fmax(most, fabs(b[i]));
        apart = fmax(apart, fabs((double)a[i] - b[i]));
        if (a[i] != a[i]) return INFINITY;
    }
    return apart / most;
}

/* A weight of `format` (numbers.h) with K inputs of which `group` share a scale. */
static Weight weight(int format, int64_t outputs, int64_t K, int64_t group) {
    int64_t groups = (K + group - 1) / group, panels = (outputs + 15) / 16, bits = format == 3 ? 8 : 4;
    int64_t integers = format == 3 || format == 4;
    int64_t step = integers ? (groups + groups % 2) / 2 * 64 + groups * group * 16 * bits / 8
                            : groups * group * 16 * (format == 6 ? 4 : 2);
    uint8_t *data = malloc(panels * step);
    for (int64_t i = 0; i < panels * step; i++) data[i] = (uint8_t)draw();
    for (int64_t p = 0; p < panels; p++) {
        uint8_t *at = data + p * step;
        if (!integers)
            for (int64_t i = 0; i < groups * group * 16; i++) {
                if (format == 6) ((float *)at)[i] = number();
                else ((uint16_t *)at)[i] = bf16(number());
            }
        else
            for (int64_t g = 0; g < groups; g += 2, at += 64 + 2 * group * 16 * bits / 8)
                for (int i = 0; i < 32; i++) ((uint16_t *)at)[i] = bf16(number());
    }
    return (Weight){data, outputs, K, format, group, step};
}

static int failures = 0;

static void report(const char *isa, const char *what, double apart) {
    int good = apart < 1e-5;
    failures += !good;
    printf("%-9s %-24s off by %.1e%s\n", isa, what, apart, good ? "" : "  FAILED");
}

static void test_linear(const char *isa, Linear *fast) {
    static const char *const names[] = {"", "", "bfloat16", "8 bits", "4 bits", "bfloat16, wide", "float32"};
    for (int format = 2; format <= 6; format++) {
        int64_t group = format == 3 ? 64 : format == 4 ? 32 : 4;
        double most = 0;
        for (int64_t K = 64; K <= 320; K += 64)
            for (int64_t N = 1; N <= 13; N += 3) {
                Weight w = weight(format, 37, K, group);
                float *x = malloc(N * K * 4), *a = malloc(N * 37 * 4), *b = malloc(N * 37 * 4);
                void *to_a[1] = {a}, *to_b[1] = {b};
                for (int64_t i = 0; i < N * K; i++) x[i] = 127.0f * number();
                fast(&w, 1, x, 0, N, to_a, 0, 1), octad_portable_linear(&w, 1, x, 0, N, to_b, 0, 1);
                most = fmax(most, off(a, b, (int)(N * 37)));
                free((void *)w.data), free(x), free(a), free(b);
            }
        report(isa, names[format], most);
    }
}

static void test_attention(const char *isa, Attention *fast) {
    enum { H = 6, G = 2, K = 64, T = 45, SIZE = 16, BLOCKS = 4 };
    for (int dtype = 0; dtype < 2; dtype++) {
        static float q[H * K], keys[BLOCKS * SIZE * G * K], values[BLOCKS * SIZE * G * K], a[H * K], b[H * K];
        int32_t length = T, table[3] = {2, 0, 3};
        for (int i = 0; i < H * K; i++) q[i] = number();
        for (int i = 0; i < BLOCKS * SIZE * G * K; i++) keys[i] = number(), values[i] = number();
        if (dtype) { /* two halves of each number are bfloat16s: keep the exponents of -1 .. 1 */
            for (int i = 0; i < H * K; i++) ((uint16_t *)q)[2 * i] = ((uint16_t *)q)[2 * i + 1];
            for (int i = 0; i < BLOCKS * SIZE * G * K; i++) {
                ((uint16_t *)keys)[2 * i] = ((uint16_t *)keys)[2 * i + 1];
                ((uint16_t *)values)[2 * i] = ((uint16_t *)values)[2 * i + 1];
            }
        }
        fast(q, keys, values, dtype, &length, table, 1, 3, SIZE, H, G, K, 0, 0.125f, a, 1);
        octad_portable_paged_attention(q, keys, values, dtype, &length, table, 1, 3, SIZE, H, G, K, 0, 0.125f, b, 1);
        if (!dtype) report(isa, "attention, float32", off(a, b, H * K));
        else { /* one place of bfloat16 may round otherwise */
            int apart = 0;
            for (int i = 0; i < H * K; i++) apart += abs((int)((uint16_t *)a)[i] - (int)((uint16_t *)b)[i]) > 1;
            report(isa, "attention, bfloat16", apart);
        }
    }
}

int main(void) {
    if (!octad_runs("neondot") || !octad_runs("neoni8mm")) return puts("this processor has no dot products"), 1;
    test_linear("neondot", octad_neondot_linear), test_attention("neondot", octad_neondot_paged_attention);
    test_linear("neoni8mm", octad_neoni8mm_linear), test_attention("neoni8mm", octad_neoni8mm_paged_attention);
    return failures != 0;
}
