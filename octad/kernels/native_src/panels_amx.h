/* Panels by tiles (AMX): 16 rows times 16 outputs in one instruction. Part of panels.h.

   Weights lie in a panel as a tile takes them: 64 bytes a row of a tile, of each of 16 outputs 4 inputs of bytes or 2 of
   bfloat16. A tile's 16 rows are 64 inputs at 8 bits, a usual group, and 32 of bfloat16; 4 bits are spread out to bytes
   first, a group of 32 to half a tile. A tile of x is as many inputs of up to 16 rows, which must lie equally far apart.

   Few rows are left to vectors. Integer sums are exact, so that both give the same bits. Tiles of bfloat16 sum up the even
   and the odd ones of 32 inputs and add both to what was there; vectors follow them in that, so that what a row becomes
   does not depend on its company. (Tiles take numbers below 2^-126 for zero, vectors do not.)

   Only ever run on emulated instructions, which tests compare with other instruction sets' results. */

#define BLOCK_INPUTS 32 /* of bfloat16, in a tile */
#define FENCE __asm__ volatile("" ::: "memory") /* compilers may not know that tiles read and write memory */

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* a row */
    uint8_t rows[16];
} Shapes;

static _Thread_local int shaped; /* what this thread's tiles are shaped for, or 0 */

/* Tiles 0 to 3 for sums, 4 and 5 for x, of which `bytes` a row, 6 and 7 for weights. */
static void tiles_begin(int rows, int bytes) {
    if (shaped == rows * 128 + bytes) return;
    Shapes s;
    memset(&s, 0, sizeof s);
    s.palette = 1;
    for (int t = 0; t < 8; t++) {
        s.rows[t] = (uint8_t)(t < 6 ? rows : bytes / 4);
        s.bytes[t] = (uint16_t)(t == 4 || t == 5 ? bytes : 64);
    }
    __asm__ volatile("" ::"r"(&s) : "memory");
    _tile_loadconfig(&s);
    shaped = rows * 128 + bytes;
}

/* The system need not keep the tiles of a thread that is done with them. */
static void tiles_end(void) {
    if (shaped) _tile_release();
    shaped = 0;
}

/* Whether tiles take these weights and rows; see panels(). */
static int suits_many(const Weight *w, const Row *x, int n) {
    if (w->format != F_P16 && !(w->format == F_Q8 && w->group == 64) && !(w->format == F_Q4 && w->group == 32)) return 0;
    for (int r = 2; r < n; r++)
        if ((const char *)x[r].x - (const char *)x[r - 1].x != (const char *)x[1].x - (const char *)x[0].x) return 0;
    return 1;
}

static inline int64_t apart(const Row *x) { return (const char *)x[1].x - (const char *)x[0].x; }

INLINE void fetch_ahead(const uint8_t *from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* ---- integers ----------------------------------------------------------------------------------------------------- */

/* A group of 32 inputs of 4 bits as bytes. */
INLINE void spread(const uint8_t *w, uint8_t *to) {
    for (int i = 0; i < 4; i++, to += 128) {
        __m512i b = _mm512_loadu_si512(w + 64 * i), low = _mm512_set1_epi8(15);
        _mm512_storeu_si512(to, _mm512_and_si512(b, low));
        _mm512_storeu_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(b, 4), low));
    }
}

/* to [rows of x][16] = the products of the rows in tile a and of the weights at `from`. */
#define TILE_OF_GROUP(sum, a, b, from, to)                                                                             \
    do {                                                                                                               \
        _tile_zero(sum);                                                                                               \
        _tile_loadd(b, from, 64);                                                                                      \
        _tile_dpbsud(sum, a, b);                                                                                       \
        _tile_stored(sum, to, 64);                                                                                     \
    } while (0)

/* out [n][16] += the sums of group g, which is the pair's first or second, scaled; the same arithmetic as in vectors. */
INLINE void add_group(const int32_t (*sums)[PANEL], const uint16_t *scales, int64_t g, const Row *x, int n, float *out) {
    __m512 scale = scales16(scales + g % 2 * PANEL);
    for (int r = 0; r < n; r++) {
        __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(sums[r]), _mm512_set1_epi32(x[r].start[g]));
        __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x[r].scale[g]));
        __m512 before = g ? _mm512_loadu_ps(out + r * PANEL) : _mm512_setzero_ps();
        _mm512_storeu_ps(out + r * PANEL, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, before));
    }
}

INLINE void tiles_int(const uint8_t *const *data, int P, const int bits, int64_t groups, int64_t ahead, const Row *x, int n,
                      float *out) {
    const int64_t group = bits == 8 ? 64 : 32, size = 2 * group * bits, stride = apart(x);
    const int8_t *q = x[0].x;
    int32_t sums[4][ROWS][PANEL] __attribute__((aligned(64)));
    uint8_t bytes[2][512] __attribute__((aligned(64)));
    tiles_begin(n, (int)group);
    for (int64_t g = 0; g < groups; g += 2) {
        int both = g + 1 < groups;
        _tile_loadd(4, q + g * group, stride);
        if (both) _tile_loadd(5, q + (g + 1) * group, stride);
        for (int p = 0; p < P; p++) {
            const uint8_t *scales = data[p] + g / 2 * (64 + 2 * size), *w[2] = {scales + 64, scales + 64 + size};
            if (ahead) fetch_ahead(scales + ahead, 64 + 2 * size);
            for (int j = 0; bits == 4 && j <= both; j++) spread(w[j], bytes[j]), w[j] = bytes[j];
            FENCE;
            if (p == 0) TILE_OF_GROUP(0, 4, 6, w[0], sums[0]);
            else TILE_OF_GROUP(1, 4, 6, w[0], sums[1]);
            if (both && p == 0) TILE_OF_GROUP(2, 5, 7, w[1], sums[2]);
            else if (both) TILE_OF_GROUP(3, 5, 7, w[1], sums[3]);
            FENCE;
            for (int j = 0; j <= both; j++)
                add_group(sums[2 * j + p], (const uint16_t *)scales, g + j, x, n, out + p * ROWS * PANEL);
        }
    }
}

/* ---- bfloat16 ------------------------------------------------------------------------------------------------------ */

/* to[r] += the products of the inputs k .. end, a tile's at most, summed up as a tile does. */
INLINE void pairs(const uint8_t *w, int64_t k, int64_t end, int64_t ahead, const Row *x, const int n, __m512 *to) {
    __m512 even[VECTOR_ROWS], odd[VECTOR_ROWS];
    for (int r = 0; r < n; r++) even[r] = odd[r] = _mm512_setzero_ps();
    for (; k < end; k += 2) {
        __m512i both = _mm512_loadu_si512(w + 2 * PANEL * k);
        __builtin_prefetch(w + 2 * PANEL * k + ahead, 0, 2);
        for (int r = 0; r < n; r++) {
            __m512i values = broadcast4((const int8_t *)x[r].x + 2 * k);
            even[r] = _mm512_fmadd_ps(evens(both), evens(values), even[r]);
            odd[r] = _mm512_fmadd_ps(odds(both), odds(values), odd[r]);
        }
    }
    for (int r = 0; r < n; r++) to[r] = _mm512_add_ps(to[r], _mm512_add_ps(even[r], odd[r]));
}

/* Few rows: every other block of 32 inputs into a sum of its own, as below. */
INLINE void panel_p16(const uint8_t *const *data, const int P, int64_t K, int64_t ahead, const Row *x, const int n,
                      float *out) {
    for (int p = 0; p < P; p++) {
        __m512 sums[2][VECTOR_ROWS];
        for (int r = 0; r < n; r++) sums[0][r] = sums[1][r] = _mm512_setzero_ps();
        for (int64_t k = 0; k < K; k += 2 * BLOCK_INPUTS) {
            pairs(data[p], k, min64(k + BLOCK_INPUTS, K), ahead, x, n, sums[0]);
            if (k + BLOCK_INPUTS < K) pairs(data[p], k + BLOCK_INPUTS, min64(k + 2 * BLOCK_INPUTS, K), ahead, x, n, sums[1]);
        }
        for (int r = 0; r < n; r++)
            _mm512_storeu_ps(out + (p * ROWS + r) * PANEL, _mm512_add_ps(sums[0][r], sums[1][r]));
    }
}

/* sum += the products of the rows in tile a and of the weights at `from`. */
#define TILE_OF_BLOCK(sum, a, b, from)                                                                                 \
    do {                                                                                                               \
        _tile_loadd(b, from, 64);                                                                                      \
        _tile_dpbf16ps(sum, a, b);                                                                                     \
    } while (0)

/* Many rows: the whole blocks by tiles, two sums a panel that take turns, and what is left by vectors. */
static void tiles_p16(const uint8_t *const *data, int P, int64_t K, int64_t ahead, const Row *x, int n, float *out) {
    float sums[2][2][ROWS][PANEL] __attribute__((aligned(64))); /* [panel][turn] */
    const uint8_t *w0 = data[0], *w1 = data[P - 1];
    const char *v = x[0].x;
    int64_t whole = K / BLOCK_INPUTS, stride = apart(x), size = 2 * PANEL * BLOCK_INPUTS;
    tiles_begin(n, 64);
    FENCE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < whole; b++) {
        if (ahead) fetch_ahead(w0 + b * size + ahead, size);
        if (ahead && P == 2) fetch_ahead(w1 + b * size + ahead, size);
        if (b % 2 == 0) {
            _tile_loadd(4, v + 64 * b, stride);
            TILE_OF_BLOCK(0, 4, 6, w0 + b * size);
            if (P == 2) TILE_OF_BLOCK(2, 4, 7, w1 + b * size);
        } else {
            _tile_loadd(5, v + 64 * b, stride);
            TILE_OF_BLOCK(1, 5, 6, w0 + b * size);
            if (P == 2) TILE_OF_BLOCK(3, 5, 7, w1 + b * size);
        }
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    if (P == 2) {
        _tile_stored(2, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }
    FENCE;
    for (int p = 0; p < P; p++)
        for (int r = 0; r < n; r++) {
            __m512 turn[2] = {_mm512_loadu_ps(sums[p][0][r]), _mm512_loadu_ps(sums[p][1][r])};
            if (K % BLOCK_INPUTS) pairs(data[p], whole * BLOCK_INPUTS, K, 0, x + r, 1, turn + whole % 2);
            _mm512_storeu_ps(out + (p * ROWS + r) * PANEL, _mm512_add_ps(turn[0], turn[1]));
        }
}

/* out [panel][n][16] of more rows than vectors take at once; see panels(). */
static void panel_many(const Weight *w, const uint8_t *const *data, int P, int64_t ahead, const Row *x, int n, float *out) {
    int64_t groups = (w->inputs + w->group - 1) / w->group;
    if (w->format == F_Q8) tiles_int(data, P, 8, groups, ahead, x, n, out);
    else if (w->format == F_Q4) tiles_int(data, P, 4, groups, ahead, x, n, out);
    else tiles_p16(data, P, groups * w->group, ahead, x, n, out);
}
