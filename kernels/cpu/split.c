// Decode attention: all keys of a row are seen by all its queries, and split over items, whose states are joined.
//
// Spans of keys, and the order in which states are joined, do not depend on threads: results repeat bit for bit.
#include "merge.h"
#include "parallel.h"
#include "tiles.h"
#include <stddef.h>

enum { STEP = 64 };  // keys of a tile of few rows: it and the next one fit the second cache

// Attention over one cache; its launcher's row of numbers, up to the one that is made here.
struct Split {
    const void *q, *k, *v;
    const int32_t *table, *lengths;
    float *parts;
    int64_t batch, tokens, hq, hkv, pages, page, table_width;
    int64_t span, spans, few, heads, chunk;  // an item: `span` keys, `heads` KV heads, `chunk` query tokens
    int64_t q_row, q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head;
    int64_t first;  // items before this cache's
    int64_t type, dim, groups, chunks, group, pad;
    float scale;
};

// Rows of an item are head by head, then token by token, then the query heads of the KV head.
struct Item {
    int64_t row, head, heads, first, tokens, begin, end, rows;  // rows: of one head
    int64_t k[KEYS], v[KEYS];                                   // where keys and values of a tile lie, in elements
    float *queries, *values, *scores, *room;  // [all, pad] scaled, [all, pad], [all, STEP], [LANES, pad]
    float *top, *sum;                         // [all]
};

static int locate(const struct Split *c, const struct Item *it, int64_t key, int64_t count, int64_t *at, int64_t page,
                  int64_t token)
{
    int64_t entry = key / c->page, slot = key % c->page;
    for (int64_t j = 0; j < count; entry++, slot = 0) {
        int64_t found = !c->table ? it->row : entry < c->table_width ? c->table[it->row * c->table_width + entry] : -1;
        if (found < 0 || found >= c->pages || (!c->table && entry))
            return BAD_INDEX;
        for (; j < count && slot < c->page; j++, slot++)
            at[j] = found * page + slot * token;
    }
    return DONE;
}

INLINE int locate_keys(const struct Split *c, struct Item *it, int64_t key, int64_t count)
{
    return locate(c, it, key, count, it->k, c->k_page, c->k_token);
}

INLINE int locate_values(const struct Split *c, struct Item *it, int64_t key, int64_t count)
{
    return locate(c, it, key, count, it->v, c->v_page, c->v_token);
}

// Ask for what an item's heads hold of the tokens `at`, in the second cache: it is a tile away.
INLINE void fetch_tokens(const struct Split *c, const struct Item *it, const void *x, const int64_t *at, int64_t count,
                         int64_t stride)
{
    int64_t size = c->type == FLOAT ? 4 : 2;
    for (int64_t j = 0; j < count; j++) {
        for (int64_t h = 0; h < it->heads; h++) {
            const char *from = (const char *)x + (at[j] + (it->head + h) * stride) * size;
            for (int64_t i = 0; i < c->dim * size; i += 64)
                __builtin_prefetch(from + i, 0, 2);
        }
    }
}

// LANES rows as floats in whole vectors: where they lie if they are that, else in `room`. Past `count` the last again.
INLINE void view(const struct Split *c, float *room, const void *x, const int64_t *at, int64_t count, int64_t head,
                 const float **rows)
{
    for (int64_t j = 0; j < LANES; j++) {
        if (j >= count) {
            rows[j] = rows[j - 1];
        } else if (c->type == FLOAT && c->dim == c->pad) {
            rows[j] = (const float *)x + at[j] + head;
        } else {
            float *to = room + j * c->pad;
            read_scaled(to, x, at[j] + head, c->dim, c->type, 1.0f);
            memset(to + c->dim, 0, (c->pad - c->dim) * sizeof *to);
            rows[j] = to;
        }
    }
}

#if defined(__clang__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (Int){__VA_ARGS__})
#endif

// Lane i of the result: the sum of x[i]'s lanes.
INLINE Vec sums_of(Vec *x)
{
#if LANES == 16
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        x[i] = MIX(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               MIX(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        x[i] = MIX(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               MIX(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        x[i] = MIX(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               MIX(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return MIX(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           MIX(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif LANES == 8
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        x[i] = MIX(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        x[i] = MIX(x[i], x[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) + MIX(x[i], x[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return MIX(x[0], x[1], 0, 8, 2, 10, 4, 12, 6, 14) + MIX(x[0], x[1], 1, 9, 3, 11, 5, 13, 7, 15);
#else
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        x[i] = MIX(x[i], x[i + 2], 0, 1, 4, 5) + MIX(x[i], x[i + 2], 2, 3, 6, 7);
    return MIX(x[0], x[1], 0, 4, 2, 6) + MIX(x[0], x[1], 1, 5, 3, 7);
#endif
}

// scores[r * STEP] of LANES keys: all their dot products advance together, and each key is read once.
INLINE void score(const struct Split *c, const float *queries, int64_t rows, const float **keys, float *scores)
{
    for (int64_t r = 0; r < rows; r++, queries += c->pad, scores += STEP) {
        Vec sum[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++)
            sum[j] = (Vec){0};
        for (int64_t d = 0; d < c->pad; d += LANES) {
            Vec query = load(queries + d);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++)
                sum[j] += query * load(keys[j] + d);
        }
        store(scores, sums_of(sum));
    }
}

// LANES weighted values join `vectors` vectors of `rows` rows.
INLINE void add(const int rows, const int vectors, const float *weights, const float **from, int64_t d, float *to,
                int64_t pad)
{
    Vec sum[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = load(to + r * pad + d + v * LANES);
    for (int j = 0; j < LANES; j++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            Vec value = load(from[j] + d + v * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sum[r][v] += weights[r * STEP + j] * value;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store(to + r * pad + d + v * LANES, sum[r][v]);
}

INLINE void add_values(const struct Split *c, const float *weights, int64_t rows, const float **from, float *to)
{
    int64_t pad = c->pad;
    for (; rows > 0; rows -= 2, weights += 2 * STEP, to += 2 * pad) {
        int64_t d = 0;
        for (; d + 4 * LANES <= pad; d += 4 * LANES)
            rows > 1 ? add(2, 4, weights, from, d, to, pad) : add(1, 4, weights, from, d, to, pad);
        for (; d < pad; d += LANES)
            rows > 1 ? add(2, 1, weights, from, d, to, pad) : add(1, 1, weights, from, d, to, pad);
    }
}

// Few rows read keys and values where they lie. While a tile's keys are read its values are on their way, and while
// those are read the next tile's keys.
static int attend_near(const struct Split *c, struct Item *it)
{
    const float *rows[LANES];
    int64_t all = it->heads * it->rows;
    int failed = locate_keys(c, it, it->begin, least(STEP, it->end - it->begin));
    if (!failed)
        fetch_tokens(c, it, c->k, it->k, least(STEP, it->end - it->begin), c->k_head);
    for (int64_t key = it->begin; !failed && key < it->end; key += STEP) {
        int64_t count = least(STEP, it->end - key), next = least(STEP, it->end - key - count);
        if ((failed = locate_values(c, it, key, count)))
            break;
        for (int64_t j = 0; j < count; j += LANES) {
            fetch_tokens(c, it, c->v, it->v + j, least(LANES, count - j), c->v_head);
            for (int64_t h = 0; h < it->heads; h++) {
                view(c, it->room, c->k, it->k + j, count - j, (it->head + h) * c->k_head, rows);
                score(c, it->queries + h * it->rows * c->pad, it->rows, rows, it->scores + h * it->rows * STEP + j);
            }
        }
        int64_t columns = ceil_div(count, LANES) * LANES;
        for (int64_t r = 0; r < all; r++) {
            float *scores = it->scores + r * STEP, *values = it->values + r * c->pad;
            for (int64_t j = count; j < columns; j++)
                scores[j] = -INFINITY;
            float kept = weigh(scores, columns, it->top + r, it->sum + r);
            for (int64_t d = 0; d < c->pad; d += LANES)
                store(values + d, load(values + d) * kept);
        }
        failed = next ? locate_keys(c, it, key + STEP, next) : DONE;
        for (int64_t j = 0; j < count; j += LANES) {
            if (!failed && j < next)
                fetch_tokens(c, it, c->k, it->k + j, least(LANES, next - j), c->k_head);
            for (int64_t h = 0; h < it->heads; h++) {
                view(c, it->room, c->v, it->v + j, count - j, (it->head + h) * c->v_head, rows);
                add_values(c, it->scores + h * it->rows * STEP + j, it->rows, rows, it->values + h * it->rows * c->pad);
            }
        }
    }
    return failed;
}

// Many rows of one KV head share packed tiles.
static int attend_many(const struct Split *c, struct Item *it, struct Tiles *t)
{
    int64_t rows[TILE], live[TILE], element = c->type == FLOAT ? 4 : 2;
    for (int64_t key = it->begin; key < it->end; key += KEYS) {
        int64_t count = least(KEYS, it->end - key);
        if (locate_keys(c, it, key, count) || locate_values(c, it, key, count))
            return BAD_INDEX;
        t->packed = ceil_div(count, LANES) * LANES;
        for (int64_t j = 0; j < t->packed; j++) {
            const float *from = NULL;
            if (j < count) {
                fetch((const char *)c->v + (it->v[j] + it->head * c->v_head) * element, c->dim * element);
                from = read_row(t->products, c->k, it->k[j] + it->head * c->k_head, c->dim, c->type);
            }
            pack_key(t, j, from);
        }
        for (int64_t j = 0; j < count; j++)
            pack_value(t, j, c->v, it->v[j] + it->head * c->v_head, c->type);
        for (int64_t first = 0; first < it->rows; first += TILE) {
            int64_t n = least(TILE, it->rows - first);
            for (int64_t i = 0; i < n; i++)
                rows[i] = first + i, live[i] = count;
            attend_tile(t, it->queries + first * c->dim, rows, live, n);
        }
    }
    return DONE;
}

static int open_item(const struct Split *c, struct Item *it, struct Tiles *t)
{
    int64_t all = it->heads * it->rows, pad = c->pad, size = c->few ? all * (2 * pad + STEP + 2) + LANES * pad : all * pad;
    it->queries = calloc(size, sizeof *it->queries);
    if (!it->queries || (!c->few && !open_tiles(t, all, c->dim))) {
        free(it->queries);
        return NO_MEMORY;
    }
    if (c->few) {
        it->values = it->queries + all * pad, it->scores = it->values + all * pad, it->room = it->scores + all * STEP;
        it->top = it->room + LANES * pad, it->sum = it->top + all;
        for (int64_t r = 0; r < all; r++)
            it->top[r] = -INFINITY;
    } else {
        it->values = t->values, it->top = t->top, it->sum = t->sum;
    }
    return DONE;
}

struct Call {
    const struct Split *caches;
    int64_t count;
};

static int attend_item(const void *call, int64_t number)
{
    const struct Call *all_caches = call;
    const struct Split *c = all_caches->caches + all_caches->count - 1;
    while (number < c->first)
        c--;
    number -= c->first;
    int64_t part = number % c->spans, group = number / c->spans % c->groups, rest = number / c->spans / c->groups;
    struct Item it = {.row = rest / c->chunks, .head = group * c->heads, .first = rest % c->chunks * c->chunk};
    struct Tiles tiles = {0};
    it.heads = least(c->heads, c->hkv - it.head), it.tokens = least(c->chunk, c->tokens - it.first);
    it.rows = it.tokens * c->group;
    it.begin = part * c->span, it.end = least(it.begin + c->span, c->lengths[it.row]);
    int64_t all = it.heads * it.rows, stride = c->few ? c->pad : c->dim;
    if (open_item(c, &it, &tiles))
        return NO_MEMORY;
    for (int64_t r = 0; r < all; r++) {
        int64_t head = (it.head + r / it.rows) * c->group + r % c->group, token = it.first + r % it.rows / c->group;
        int64_t from = it.row * c->q_row + token * c->q_token + head * c->q_head;
        read_scaled(it.queries + r * stride, c->q, from, c->dim, c->type, c->scale);
    }
    int failed = c->few ? attend_near(c, &it) : attend_many(c, &it, &tiles);
    for (int64_t r = 0; !failed && r < all; r++) {
        int64_t head = (it.head + r / it.rows) * c->group + r % c->group, token = it.first + r % it.rows / c->group;
        int64_t to = (part * c->batch + it.row) * c->tokens + token;
        float *state = c->parts + (to * c->hq + head) * (c->dim + 2);
        state[0] = it.top[r], state[1] = it.sum[r];
        memcpy(state + 2, it.values + r * c->pad, c->dim * sizeof *state);
    }
    free(it.queries);
    free(tiles.values);
    return failed;
}

// The states of one result: parts [spans, rows, dim + 2] become out [rows, dim] and lse [rows], joined in order.
struct Join {
    const float *parts;
    float *out, *lse;
    int64_t rows, spans;
    int64_t first, dim;  // results before this one's rows
};

struct Joins {
    const struct Join *results;
    int64_t count;
};

static int join_item(const void *call, int64_t row)
{
    const struct Joins *all = call;
    const struct Join *c = all->results + all->count - 1;
    while (row < c->first)
        c--;
    row -= c->first;
    const float *states = c->parts + row * (c->dim + 2);
    merge_parts(states, states + 2, c->rows * (c->dim + 2), c->spans, c->dim, c->out + row * c->dim, c->lse + row);
    return DONE;
}

static int attend_caches(struct Split *caches, const int64_t *rows, int64_t count, int64_t type, int64_t dim,
                         double scale, int64_t threads)
{
    int64_t items = 0;
    for (int64_t i = 0; i < count; i++) {
        struct Split *c = caches + i;
        memcpy(c, rows + i * offsetof(struct Split, first) / sizeof *rows, offsetof(struct Split, first));
        c->first = items, c->type = type, c->dim = dim, c->scale = (float)scale;
        c->groups = ceil_div(c->hkv, c->heads), c->chunks = ceil_div(c->tokens, c->chunk), c->group = c->hq / c->hkv;
        c->pad = ceil_div(dim, LANES) * LANES;
        items += c->batch * c->chunks * c->groups * c->spans;
    }
    struct Call call = {.caches = caches, .count = count};
    return parallel(attend_item, &call, items, threads);
}

static int join_results(struct Join *results, const int64_t *rows, int64_t count, int64_t dim, int64_t threads)
{
    int64_t items = 0;
    for (int64_t i = 0; i < count; i++) {
        struct Join *c = results + i;
        memcpy(c, rows + i * offsetof(struct Join, first) / sizeof *rows, offsetof(struct Join, first));
        c->first = items, c->dim = dim;
        items += c->rows;
    }
    struct Joins call = {.results = results, .count = count};
    return parallel(join_item, &call, items, threads);
}

// caches [count] and results [joins]: the leading numbers of `Split` and `Join`. A cache leaves a maximum, a sum and
// weighted values of every span of each row's keys in its parts [spans, batch, tokens, hq, dim + 2]. Without a table
// each row is a page. Few rows take `heads` KV heads an item, many take one.
int split(const int64_t *caches, int64_t count, const int64_t *results, int64_t joins, int64_t type, int64_t dim,
          double scale, int64_t threads, int64_t join_threads)
{
    _Static_assert(sizeof(void *) == sizeof(int64_t), "pointers come as numbers");
    struct Split *all = malloc(count * sizeof *all);
    struct Join *made = malloc(joins * sizeof *made);
    int failed = !all || !made ? NO_MEMORY : attend_caches(all, caches, count, type, dim, scale, threads);
    failed = failed ? failed : join_results(made, results, joins, dim, join_threads);
    free(all);
    free(made);
    return failed;
}
