// Exact causal attention of rows picked out of requests: row i sees the keys up to its position.
//
// Rows come sorted by position, so a unit of them walks the tiles of keys once: rows at the front drop out, and only
// the tile that a row's position is in looks at it. Every row sums tiles in rising order, in spans of keys that do not
// depend on threads, and spans are merged in order: results repeat bit for bit, whatever the threads.
#include "merge.h"
#include "parallel.h"
#include "tiles.h"
#include "turn.h"

enum { AHEAD = 8, TOGETHER = 4 };  // how far ahead gathered rows are asked for; values that are added together

// Sorted rows [begin, end) of a request, none of which sees key `reach`; they go over `span` keys at a time. Few rows
// read keys where they lie, all heads in one item. Where there are more spans than one, states go to rows `part` on.
struct Unit {
    int32_t seq, begin, end, reach, span, few, part;
};

struct Selective {
    const void *q, *k, *v;
    const int32_t *table, *positions, *order, *cu_q, *lengths, *items;
    const int64_t *starts;
    const float *cos, *sin;
    const struct Unit *units;
    float *out, *lse, *parts;
    int64_t type, count, hq, hkv, dim, pages, page, table_width, pairs, interleaved;  // count: units
    int64_t q_row, q_head, k_page, k_token, k_head, v_page, v_token, v_head;
    float scale;
};

// Rows of a unit, for KV heads [head, head + heads): a row is a sorted query and a query head, heads slowest.
struct Item {
    struct Unit unit;
    int64_t head, heads, group, begin, end, rows;  // keys [begin, end); rows of one head
    int64_t k[KEYS], v[KEYS];                      // where the keys and values of the tile at hand lie, in elements
    float *queries, *scores;                       // [heads * rows, dim], scaled; [heads * rows, SCORES] of few rows
    struct Tiles tiles;
};

INLINE int64_t row_at(const struct Selective *c, const struct Item *it, int64_t row)
{
    return c->order[c->cu_q[it->unit.seq] + it->unit.begin + row / it->group];
}

// How many keys the row sees; those past the request's end are never walked.
INLINE int64_t limit_of(const struct Selective *c, const struct Item *it, int64_t row)
{
    return (int64_t)c->positions[row_at(c, it, row)] + 1;
}

static int locate(const struct Selective *c, struct Item *it, int64_t key, int64_t count)
{
    int64_t seq = it->unit.seq;
    for (int64_t j = 0; j < count; j++) {
        int64_t page = 0, token = c->starts[seq] + key + j;
        if (c->table) {
            int64_t at = (key + j) / c->page;
            page = at < c->table_width ? c->table[seq * c->table_width + at] : -1, token = (key + j) % c->page;
        }
        if (page < 0 || page >= c->pages || token < 0 || token >= c->page)
            return BAD_INDEX;
        it->k[j] = page * c->k_page + token * c->k_token;
        it->v[j] = page * c->v_page + token * c->v_token;
    }
    return DONE;
}

INLINE void fetch_row(const struct Selective *c, const void *x, int64_t at)
{
    int64_t element = c->type == FLOAT ? 4 : 2;
    fetch((const char *)x + at * element, c->dim * element);
}

// Key `j` of the tile, which begins at `key`, as it is attended.
INLINE const float *key_at(const struct Selective *c, const struct Item *it, int64_t key, int64_t j, int64_t head)
{
    float *room = it->tiles.products;
    int64_t at = it->k[j] + head * c->k_head, angle = (c->starts[it->unit.seq] + key + j) * c->pairs;
    if (!c->cos)
        return read_row(room, c->k, at, c->dim, c->type);
    read_scaled(room, c->k, at, c->dim, c->type, 1.0f);
    turn(room, c->cos + angle, c->sin + angle, c->pairs, c->interleaved, c->type);
    return room;
}

static void pack_tile(const struct Selective *c, struct Item *it, int64_t key, int64_t count)
{
    int64_t head = it->head;
    struct Tiles *t = &it->tiles;
    t->packed = ceil_div(count, LANES) * LANES;
    for (int64_t j = 0; j < t->packed; j++) {
        if (j + AHEAD < count)
            fetch_row(c, c->k, it->k[j + AHEAD] + head * c->k_head);
        if (j < count)
            fetch_row(c, c->v, it->v[j] + head * c->v_head);
        pack_key(t, j, j < count ? key_at(c, it, key, j, head) : NULL);
    }
    for (int64_t j = 0; j < count; j++)
        pack_value(t, j, c->v, it->v[j] + head * c->v_head, c->type);
}

// The rows of a head which see the packed tile.
static void attend_rows(const struct Selective *c, const struct Item *it, int64_t key, int64_t count, int64_t first)
{
    int64_t rows[TILE], live[TILE];
    for (; first < it->rows; first += TILE) {
        int64_t n = least(TILE, it->rows - first);
        for (int64_t i = 0; i < n; i++) {
            rows[i] = first + i;
            live[i] = least(count, limit_of(c, it, first + i) - key);
        }
        attend_tile(&it->tiles, it->queries + first * c->dim, rows, live, n);
    }
}

// Few rows attend keys where they lie: each key and value is read once, heads next to each other.
static void attend_near(const struct Selective *c, const struct Item *it, int64_t key, int64_t count)
{
    const struct Tiles *t = &it->tiles;
    int64_t dim = c->dim, all = it->heads * it->rows, columns = ceil_div(count, LANES) * LANES;
    for (int64_t j = 0; j < count; j++) {
        for (int64_t head = 0; head < it->heads; head++) {
            if (j + AHEAD < count)
                fetch_row(c, c->k, it->k[j + AHEAD] + head * c->k_head);
            const float *from = key_at(c, it, key, j, head);
            for (int64_t row = head * it->rows; row < (head + 1) * it->rows; row++)
                it->scores[row * SCORES + j] = dot(it->queries + row * dim, from, dim);
        }
    }
    for (int64_t row = 0; row < all; row++) {
        float *scores = it->scores + row * SCORES, *values = t->values + row * t->pad;
        for (int64_t j = most(least(count, limit_of(c, it, row % it->rows) - key), 0); j < columns; j++)
            scores[j] = -INFINITY;
        float kept = weigh(scores, columns, t->top + row, t->sum + row);
        for (int64_t d = 0; d < dim; d++)
            values[d] *= kept;
    }
    for (int64_t j = 0; j < count; j += TOGETHER) {
        for (int64_t head = 0; head < it->heads; head++) {
            const float *v[TOGETHER];
            for (int64_t i = 0; i < TOGETHER; i++) {
                if (j + i + AHEAD < count)
                    fetch_row(c, c->v, it->v[j + i + AHEAD] + head * c->v_head);
                // What stands in for values past the end has the weight 0.
                int64_t at = it->v[least(j + i, count - 1)] + head * c->v_head;
                v[i] = read_row(t->products + i * dim, c->v, at, dim, c->type);
            }
            for (int64_t row = head * it->rows; row < (head + 1) * it->rows; row++) {
                float *values = t->values + row * t->pad;
                const float *w = it->scores + row * SCORES + j;
                for (int64_t d = 0; d < dim; d++)
                    values[d] = values[d] + w[0] * v[0][d] + w[1] * v[1][d] + w[2] * v[2][d] + w[3] * v[3][d];
            }
        }
    }
}

static int attend_keys(const struct Selective *c, struct Item *it)
{
    for (int64_t key = it->begin, first = 0; key < it->end; key += KEYS) {
        int64_t count = least(KEYS, it->end - key);
        if (locate(c, it, key, count))
            return BAD_INDEX;
        if (it->unit.few) {
            attend_near(c, it, key, count);
            continue;
        }
        while (first < it->rows && limit_of(c, it, first) <= key)
            first += it->group;
        pack_tile(c, it, key, count);
        attend_rows(c, it, key, count, first);
    }
    return DONE;
}

static int attend_item(const void *call, int64_t number)
{
    const struct Selective *c = call;
    int64_t at = part_of(c->items, c->count, number), part = number - c->items[at];
    struct Item it = {.unit = c->units[at], .heads = 1, .group = c->hq / c->hkv};
    const struct Unit *u = &it.unit;
    if (u->few)
        it.heads = c->hkv;
    else
        it.head = part % c->hkv, part /= c->hkv;
    it.rows = (u->end - u->begin) * it.group;
    it.begin = part * u->span, it.end = least(it.begin + u->span, least(u->reach, c->lengths[u->seq]));
    int64_t all = it.rows * it.heads;
    it.queries = malloc(all * (c->dim + (u->few ? SCORES : 0)) * sizeof *it.queries);
    if (!it.queries || !open_tiles(&it.tiles, all, c->dim)) {
        free(it.queries);
        return NO_MEMORY;
    }
    it.scores = it.queries + all * c->dim;
    for (int64_t row = 0; row < all; row++) {
        int64_t head = (it.head + row / it.rows) * it.group + row % it.group;
        int64_t from = row_at(c, &it, row % it.rows) * c->q_row + head * c->q_head;
        read_scaled(it.queries + row * c->dim, c->q, from, c->dim, c->type, c->scale);
    }
    int failed = attend_keys(c, &it);
    for (int64_t row = 0; !failed && row < all; row++) {
        int64_t head = (it.head + row / it.rows) * it.group + row % it.group, local = row % it.rows;
        if (u->span < u->reach) {
            int64_t to = (u->part + part * (u->end - u->begin) + local / it.group) * c->hq + head;
            float *state = c->parts + to * (c->dim + 2);
            state[0] = it.tiles.top[row], state[1] = it.tiles.sum[row];
            memcpy(state + 2, it.tiles.values + row * it.tiles.pad, c->dim * sizeof *state);
        } else {
            int64_t to = row_at(c, &it, local) * c->hq + head;
            finish_row(&it.tiles, row, c->out + to * c->dim, c->lse + to);
        }
    }
    free(it.queries);
    free(it.tiles.values);
    return failed;
}

// The states that a unit's rows have of each span, for one query head, become their output.
static int merge_item(const void *call, int64_t number)
{
    const struct Selective *c = call;
    const struct Unit *u = c->units + number / c->hq;
    int64_t n = u->end - u->begin, spans = ceil_div(u->reach, u->span), size = c->dim + 2;
    for (int64_t i = 0; spans > 1 && i < n; i++) {
        const float *states = c->parts + ((u->part + i) * c->hq + number % c->hq) * size;
        int64_t next = n * c->hq * size, to = c->order[c->cu_q[u->seq] + u->begin + i] * c->hq + number % c->hq;
        merge_parts(states, states + 2, next, spans, c->dim, c->out + to * c->dim, c->lse + to);
    }
    return DONE;
}

// out [Nq, hq, dim] and lse [Nq, hq]. `order` sorts the rows of each request, `items[u]` items lie before unit u, and
// `parts` holds a state [hq, dim + 2] for every row of every span of the units that have more than one. Without a table
// there is one page of all keys.
int selective(const void *q, const void *k, const void *v, const int32_t *table, const int64_t *starts,
              const int32_t *lengths, const float *cos, const float *sin, const int32_t *positions,
              const int32_t *order, const int32_t *cu_q, const struct Unit *units, const int32_t *items, float *out,
              float *lse, float *parts, int64_t type, int64_t count, int64_t hq, int64_t hkv, int64_t dim,
              int64_t pages, int64_t page, int64_t table_width, int64_t pairs, int64_t interleaved, int64_t q_row,
              int64_t q_head, int64_t k_page, int64_t k_token, int64_t k_head, int64_t v_page, int64_t v_token,
              int64_t v_head, double scale, int64_t threads)
{
    struct Selective call = {
        .q = q, .k = k, .v = v, .table = table, .starts = starts, .lengths = lengths, .cos = cos, .sin = sin,
        .positions = positions, .order = order, .cu_q = cu_q, .units = units, .items = items, .out = out, .lse = lse,
        .parts = parts, .type = type, .count = count, .hq = hq, .hkv = hkv, .dim = dim, .pages = pages, .page = page,
        .table_width = table_width, .pairs = pairs, .interleaved = interleaved, .q_row = q_row, .q_head = q_head,
        .k_page = k_page, .k_token = k_token, .k_head = k_head, .v_page = v_page, .v_token = v_token,
        .v_head = v_head, .scale = (float)scale,
    };
    int failed = parallel(attend_item, &call, items[count], threads);
    return failed || !parts ? failed : parallel(merge_item, &call, count * hq, threads);
}
