/* AMX's tiles in plain C: eight of 16 rows of 64 bytes, a thread's own. Part of emulated.h. What the manual calls a fault
   ends the program: tiles of shapes that do not go together, or before their shapes are known.

   Letters as in the manual: C [M, N] += A [M, K] B [K, N]. */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16]; /* bytes a row */
    uint8_t rows[16];
} TileShapes;

static _Thread_local struct {
    TileShapes shapes;
    uint8_t tile[8][16][64];
} amx;

EMULATION void amx_fault(const char *what) {
    fprintf(stderr, "emulated AMX: %s\n", what);
    abort();
}

EMULATION void amx_load_shapes(const void *p) {
    memcpy(&amx.shapes, p, sizeof amx.shapes);
    memset(amx.tile, 0, sizeof amx.tile);
    if (amx.shapes.palette > 1) amx_fault("an unknown palette");
    for (int i = 0; i < 14; i++)
        if (amx.shapes.reserved[i]) amx_fault("a reserved byte of the shapes is not zero");
    for (int t = 0; t < 16; t++) {
        if (t >= 8 && (amx.shapes.rows[t] || amx.shapes.colsb[t])) amx_fault("there is no such tile");
        if (amx.shapes.rows[t] > 16 || amx.shapes.colsb[t] > 64) amx_fault("a tile is too large");
        if (!amx.shapes.rows[t] != !amx.shapes.colsb[t]) amx_fault("a tile with rows and no columns");
    }
}

EMULATION void amx_release(void) { memset(&amx, 0, sizeof amx); }

EMULATION void amx_known(int t) {
    if (amx.shapes.palette != 1 || !amx.shapes.rows[t]) amx_fault("a tile without a shape");
}

EMULATION void amx_zero(int t) { amx_known(t), memset(amx.tile[t], 0, sizeof amx.tile[t]); }

EMULATION void amx_load(int t, const void *base, int64_t stride) {
    amx_zero(t);
    for (int r = 0; r < amx.shapes.rows[t]; r++)
        memcpy(amx.tile[t][r], (const char *)base + r * stride, amx.shapes.colsb[t]);
}

EMULATION void amx_store(int t, void *base, int64_t stride) {
    amx_known(t);
    for (int r = 0; r < amx.shapes.rows[t]; r++) memcpy((char *)base + r * stride, amx.tile[t][r], amx.shapes.colsb[t]);
}

EMULATION void amx_together(int c, int a, int b) { /* C [M, N], A [M, K], B [K, N], of 4 bytes each */
    const TileShapes *s = &amx.shapes;
    amx_known(c), amx_known(a), amx_known(b);
    if (c == a || c == b || a == b) amx_fault("one tile twice");
    if (s->colsb[c] % 4 || s->colsb[a] % 4 || s->colsb[b] % 4) amx_fault("columns of other than 4 bytes");
    if (s->rows[c] != s->rows[a] || s->colsb[c] != s->colsb[b] || s->colsb[a] / 4 != s->rows[b])
        amx_fault("shapes do not go together");
}

EMULATION void amx_dot_bytes(int c, int a, int b, int a_signed, int b_signed) {
    amx_together(c, a, b);
    for (int m = 0; m < amx.shapes.rows[c]; m++)
        for (int k = 0; k < amx.shapes.rows[b]; k++)
            for (int n = 0; n < amx.shapes.colsb[c] / 4; n++)
                for (int j = 0; j < 4; j++) {
                    uint8_t x = amx.tile[a][m][4 * k + j], y = amx.tile[b][k][4 * n + j];
                    uint32_t sum;
                    memcpy(&sum, &amx.tile[c][m][4 * n], 4);
                    sum += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
                    memcpy(&amx.tile[c][m][4 * n], &sum, 4);
                }
}

EMULATION void amx_dot_bf16(int c, int a, int b) { /* sums of the even and of the odd places, then both, then C */
    amx_together(c, a, b);
    for (int m = 0; m < amx.shapes.rows[c]; m++)
        for (int n = 0; n < amx.shapes.colsb[c] / 4; n++) {
            float sum[2] = {0, 0}, was;
            for (int k = 0; k < amx.shapes.rows[b]; k++)
                for (int j = 0; j < 2; j++) {
                    uint16_t x, y;
                    memcpy(&x, &amx.tile[a][m][4 * k + 2 * j], 2), memcpy(&y, &amx.tile[b][k][4 * n + 2 * j], 2);
                    sum[j] = bf16_fma(sum[j], x, y);
                }
            memcpy(&was, &amx.tile[c][m][4 * n], 4);
            was = flushed(flushed(was) + flushed(sum[0] + sum[1]));
            memcpy(&amx.tile[c][m][4 * n], &was, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) amx_load_shapes(p)
#define _tile_release() amx_release()
#define _tile_loadd(t, base, stride) amx_load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) amx_load(t, base, stride)
#define _tile_stored(t, base, stride) amx_store(t, base, stride)
#define _tile_zero(t) amx_zero(t)
#define _tile_dpbssd(c, a, b) amx_dot_bytes(c, a, b, 1, 1)
#define _tile_dpbsud(c, a, b) amx_dot_bytes(c, a, b, 1, 0)
#define _tile_dpbusd(c, a, b) amx_dot_bytes(c, a, b, 0, 1)
#define _tile_dpbuud(c, a, b) amx_dot_bytes(c, a, b, 0, 0)
#define _tile_dpbf16ps(c, a, b) amx_dot_bf16(c, a, b)
