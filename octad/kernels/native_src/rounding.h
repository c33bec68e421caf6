/* A group of weights rounded to integers and one scale: to 8 bits, and to 4, where inputs may have costs. Part of native.c.

   packed.py's _round8 and _round4 to the bit, for finite weights; packing.h says how. Where inputs have costs sums are taken
   in float32, and in another order than the twin's. */

/* One group's largest magnitude with its sign, of equal ones the negative. 1 if a value is not finite. */
static int extremes(const float *x, int64_t n, float *low, float *high) {
    float least = x[0], most = x[0], zero = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : zero)
    for (int64_t i = 0; i < n; i++) {
        least = x[i] < least ? x[i] : least, most = x[i] > most ? x[i] : most;
        zero += x[i] * 0.0f; /* not a number where x is not finite */
    }
    *low = least, *high = most;
    return !(zero == 0);
}

/* The next bfloat16 not below x >= 0. */
static uint16_t upward_bf16(float x) {
    uint16_t v = to_bf16(x);
    return from_bf16(v) < x ? v + 1 : v;
}

static int round8(const float *x, int64_t n, uint8_t *raw, uint16_t *scale) {
    float low, high;
    int failed = extremes(x, n, &low, &high);
    *scale = upward_bf16(fabsf(high > -low ? high : low) / 127.0f);
    float step = from_bf16(*scale);
    step = step < 1e-30f ? 1e-30f : step;
    if (failed) return 1;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) raw[i] = (uint8_t)((int32_t)rintf(x[i] / step) + 128);
    return 0;
}

INLINE float nearest4(float x, float step) {
    float q = rintf(x / step);
    return q < -8.0f ? -8.0f : (q > 7.0f ? 7.0f : q);
}

static float step4(uint16_t scale) {
    float step = from_bf16(scale);
    return step == 0 ? 1.0f : step;
}

static double error4(const float *x, int64_t n, uint16_t scale) {
    float step = step4(scale), times = from_bf16(scale);
    double lanes[8] = {0};
    for (int64_t i = 0; i < n; i += 8) {
#pragma omp simd
        for (int j = 0; j < 8; j++) {
            double off = nearest4(x[i + j], step) * times - x[i + j];
            lanes[j] += off * off;
        }
    }
    for (int width = 4; width; width /= 2)
        for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
    return lanes[0];
}

static int round4(const float *x, int64_t n, uint8_t *raw, uint16_t *scale) {
    static const float shrink[4] = {1.0f, 0.95f, 0.9f, 0.85f};
    float low, high;
    if (extremes(x, n, &low, &high)) return 1;
    float most = (high > -low ? high : low) / -8.0f;
    double best = INFINITY;
    for (int i = 0; i < 4; i++) {
        uint16_t tried = to_bf16(most * shrink[i]);
        double error = error4(x, n, tried);
        if (i == 0 || error < best) best = error, *scale = tried;
    }
    if (!(*scale & 0x7fff)) *scale = 0; /* one zero, not two */
    float step = step4(*scale);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) raw[i] = (uint8_t)((int32_t)nearest4(x[i], step) + 8);
    return 0;
}

enum { TRIED = 8 };

/* What rounding a group to each of some scales costs: the error of each input squared, times its cost. One pass for all of
   them: a sum alone would wait for its last addition. */
static void dear4(const float *x, const float *cost, int64_t n, const uint16_t *scales, double *sums) {
    float steps[TRIED], inverse[TRIED], lanes[TRIED][8] = {{0}};
    for (int s = 0; s < TRIED; s++) steps[s] = step4(scales[s]), inverse[s] = 1.0f / steps[s];
    for (int64_t i = 0; i < n; i += 8)
        for (int s = 0; s < TRIED; s++) {
#pragma omp simd
            for (int j = 0; j < 8; j++) {
                float times = x[i + j] * inverse[s], q = rintf(times);
                float off = (q < -8.0f ? -8.0f : (q > 7.0f ? 7.0f : q)) - times;
                lanes[s][j] += cost[i + j] * (off * off);
            }
        }
    for (int s = 0; s < TRIED; s++) {
        for (int width = 4; width; width /= 2)
            for (int j = 0; j < width; j++) lanes[s][j] += lanes[s][j + width];
        sums[s] = (double)lanes[s][0] * steps[s] * steps[s];
    }
}

/* round4 where inputs have costs: the largest value may be cut for the others' sake. */
static int round4_dear(const float *x, const float *cost, int64_t n, uint8_t *raw, uint16_t *scale) {
    static const float shrink[TRIED] = {1.0f, 1.05f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
    float low, high;
    uint16_t tried[TRIED];
    double sums[TRIED];
    if (extremes(x, n, &low, &high)) return 1;
    float most = (high > -low ? high : low) / -8.0f;
    for (int i = 0; i < TRIED; i++) tried[i] = to_bf16(most * shrink[i]);
    dear4(x, cost, n, tried, sums);
    int best = 0;
    for (int i = 1; i < TRIED; i++)
        if (sums[i] < sums[best]) best = i;
    *scale = tried[best];
    if (!(*scale & 0x7fff)) *scale = 0;
    float step = step4(*scale);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) raw[i] = (uint8_t)((int32_t)nearest4(x[i], step) + 8);
    return 0;
}
