// Packed tiles of keys and values, and the rows whose running softmax they join.
//
// A row keeps a maximum, a sum and weighted values. A value that is not finite may reach rows of its tile that do not
// see it.
#pragma once
#include "simd.h"

enum { TILE = 8 * ROWS, KEYS = 512 };  // rows and keys of one tile of scores
enum { SCORES = KEYS + LANES };        // row length of the scores: rows must not meet in the same cache sets

struct Tiles {
    int64_t dim, pad;                    // pad: dim in whole vectors
    int64_t packed;                      // columns of the packed keys
    float *values, *top, *sum;           // [rows, pad], [rows], [rows]: the running softmax
    float *keys, *block;                 // packed keys and values of the tile at hand
    float *queries, *scores, *products;  // [TILE, dim], [TILE, SCORES], [TILE, pad]
};

// Memory for the softmax of `rows` rows, all empty. Free `values` afterwards.
INLINE int open_tiles(struct Tiles *t, int64_t rows, int64_t dim)
{
    int64_t pad = ceil_div(dim, LANES) * LANES, panels = ceil_div(dim, WIDTH) * WIDTH, total = 0;
    float **parts[] = {&t->values, &t->top, &t->sum, &t->keys, &t->block, &t->queries, &t->scores, &t->products};
    int64_t sizes[] = {rows * pad, rows, rows, KEYS * dim, KEYS * panels, TILE * dim, TILE * SCORES, TILE * pad};
    for (int i = 0; i < 8; i++)
        total += sizes[i];
    float *next = malloc(total * sizeof *next);
    if (!next)
        return 0;
    for (int i = 0; i < 8; next += sizes[i++])
        *parts[i] = next;
    t->dim = dim, t->pad = pad;
    memset(t->values, 0, rows * pad * sizeof *t->values);
    for (int64_t i = 0; i < rows; i++)
        t->top[i] = -INFINITY, t->sum[i] = 0.0f;
    return 1;
}

// Key `j` of a tile of `packed` columns becomes a column, in panels of WIDTH; NULL: zeros, which fill up the last panel.
INLINE void pack_key(const struct Tiles *t, int64_t j, const float *from)
{
    int64_t first = j / WIDTH * WIDTH, width = least(WIDTH, t->packed - first), dim = t->dim;
    float *column = t->keys + first * dim + (j - first);
    for (int64_t d = 0; d < dim; d++)
        column[d * width] = from ? from[d] : 0.0f;
}

// Value `j` of a tile, at element `at` of `v`, becomes a row of the panels of WIDTH columns.
INLINE void pack_value(const struct Tiles *t, int64_t j, const void *v, int64_t at, int64_t type)
{
    for (int64_t first = 0; first < t->dim; first += WIDTH) {
        int64_t width = least(WIDTH, t->pad - first), live = least(width, t->dim - first);
        float *row = t->block + first * KEYS + j * width;
        read_scaled(row, v, at + first, live, type, 1.0f);
        memset(row + live, 0, (width - live) * sizeof *row);
    }
}

// Rows `rows[i]` take in the first `live[i]` keys of the tile by their scores, of which `columns` are there.
INLINE void join_tile(const struct Tiles *t, const int64_t *rows, const int64_t *live, int64_t count, int64_t keys,
                      int64_t columns)
{
    float kept[TILE];
    for (int64_t i = 0; i < count; i++) {
        float *scores = t->scores + i * SCORES;
        for (int64_t j = live[i]; j < columns; j++)
            scores[j] = -INFINITY;
        kept[i] = weigh(scores, columns, t->top + rows[i], t->sum + rows[i]);
    }
    product(count, t->pad / LANES, t->scores, SCORES, t->block, KEYS, keys, t->products, t->pad);
    for (int64_t i = 0; i < count; i++) {
        float *to = t->values + rows[i] * t->pad, *from = t->products + i * t->pad;
        for (int64_t d = 0; d < t->pad; d += LANES)
            store(to + d, load(to + d) * kept[i] + load(from + d));
    }
}

// Rows `rows[i]`, whose scaled queries are `queries [count, dim]`, attend the first `live[i]` keys of the packed tile.
INLINE void attend_tile(const struct Tiles *t, const float *queries, const int64_t *rows, const int64_t *live,
                        int64_t count)
{
    int64_t keys = 0;
    for (int64_t i = 0; i < count; i++) {
        fetch(t->values + rows[i] * t->pad, t->pad * sizeof(float));
        keys = most(keys, live[i]);
    }
    int64_t columns = least(ceil_div(keys, WIDTH) * WIDTH, t->packed);  // whole panels
    product(count, columns / LANES, queries, t->dim, t->keys, t->dim, t->dim, t->scores, SCORES);
    join_tile(t, rows, live, count, keys, columns);
}

// out [dim] and lse of a row.
INLINE void finish_row(const struct Tiles *t, int64_t row, float *out, float *lse)
{
    float sum = t->sum[row], share = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < t->dim; d++)
        out[d] = t->values[row * t->pad + d] * share;
    *lse = t->top[row] + logf(sum);
}
