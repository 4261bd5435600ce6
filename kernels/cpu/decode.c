// MoBA decode: a query's blocks chosen by running sums of their keys, then attention over these blocks where they lie.
//
// Every (query, chooser, slot) is a partial softmax of its own; those of a query are merged in the order of the slots,
// so results depend on no thread.
#include "choose.h"
#include "merge.h"
#include "parallel.h"

enum { KEYS = 64, AHEAD = 16 };  // keys whose scores are held at a time, and how far ahead rows are asked for

struct Decode {
    const void *q, *k, *v;
    const int32_t *table;
    const float *sums;
    const int32_t *rows, *lengths, *starts;  // starts may be NULL
    int32_t *indices;
    float *out, *lse, *parts;
    int64_t type, queries, hq, hkv, hr, dim, block, blocks, sink, local, picks, pages, page, q_row, q_head;
    int64_t k_page, k_token, k_head, v_page, v_token, v_head;
    float scale;
    int64_t slots, width, part;  // width: query heads of a chooser; part: floats of one partial softmax
};

// One chooser's slots: own | sink | local | picks, as kernels/moba/spec.py says.
static int choose_item(const void *call, int64_t item)
{
    const struct Decode *c = call;
    int64_t r = item / c->hr, chooser = item % c->hr, head = chooser / (c->hr / c->hkv);
    int64_t length = c->lengths[r], own = length > 0 ? (length - 1) / c->block : -1;
    int32_t *slot = c->indices + item * c->slots;
    uint64_t *heap = calloc(most(c->picks, 1), sizeof *heap);
    float *query = malloc(2 * c->dim * sizeof *query);
    if (!heap || !query) {
        free(heap);
        free(query);
        return NO_MEMORY;
    }
    float *room = query + c->dim;
    read_scaled(query, c->q, r * c->q_row + chooser * c->width * c->q_head, c->dim, c->type, 1.0f);
    for (int64_t i = 1; i < c->width; i++) {
        int64_t at = r * c->q_row + (chooser * c->width + i) * c->q_head;
        const float *more = read_row(room, c->q, at, c->dim, c->type);
        for (int64_t d = 0; d < c->dim; d++)
            query[d] += more[d];
    }
    for (int64_t b = c->sink; c->picks && b < own - c->local; b++) {
        const float *sum = c->sums + ((c->rows[r] * c->blocks + b) * c->hkv + head) * c->dim;
        uint64_t key = key_of(dot(query, sum, c->dim), (uint32_t)b);
        if (key > heap[0])
            replace_least(heap, c->picks, key);
    }
    *slot++ = (int32_t)own;
    for (int64_t i = 0; i < c->sink; i++)
        *slot++ = i < own ? (int32_t)i : -1;
    for (int64_t i = 0; i < c->local; i++)
        *slot++ = own - 1 - i >= c->sink ? (int32_t)(own - 1 - i) : -1;
    for (int64_t i = c->picks; i--;) {
        slot[i] = heap[0] ? (int32_t)~(uint32_t)heap[0] : -1;
        replace_least(heap, c->picks, UINT64_MAX);
    }
    free(heap);
    free(query);
    return DONE;
}

// Where key `t` of query `r`'s row lies: its token slot, in pages.
INLINE int64_t place_of(const struct Decode *c, int64_t r, int64_t t, int64_t page, int64_t token)
{
    int64_t row = c->rows[r], slot = t + (c->starts ? c->starts[row] : 0);
    return c->table[row * c->pages + slot / c->page] * page + slot % c->page * token;
}

INLINE void fetch_row(const struct Decode *c, const void *x, int64_t at)
{
    int64_t element = c->type == FLOAT ? 4 : 2;
    fetch((const char *)x + at * element, c->dim * element);
}

// A partial softmax: for each query head of the chooser its maximum, sum and weighted values.
static int attend_item(const void *call, int64_t item)
{
    const struct Decode *c = call;
    int64_t r = item / (c->hr * c->slots), chooser = item / c->slots % c->hr, head = chooser / (c->hr / c->hkv);
    int64_t block = c->indices[item], first = block * c->block, end = least(first + c->block, c->lengths[r]);
    float *part = c->parts + item * c->part, *values = part + 2 * c->width;
    for (int64_t i = 0; i < c->width; i++)
        part[2 * i] = -INFINITY, part[2 * i + 1] = 0.0f;
    memset(values, 0, c->width * c->dim * sizeof *values);
    if (block < 0)
        return DONE;
    float *queries = malloc(((c->width + 1) * c->dim + c->width * KEYS) * sizeof *queries);
    if (!queries)
        return NO_MEMORY;
    float *room = queries + c->width * c->dim, *scores = room + c->dim;
    for (int64_t i = 0; i < c->width; i++) {
        int64_t at = r * c->q_row + (chooser * c->width + i) * c->q_head;
        read_scaled(queries + i * c->dim, c->q, at, c->dim, c->type, c->scale);
    }
    for (; first < end; first += KEYS) {
        int64_t keys = least(KEYS, end - first), whole = ceil_div(keys, LANES) * LANES;
        for (int64_t j = 0; j < keys; j++) {
            int64_t at = place_of(c, r, first + j, c->k_page, c->k_token) + head * c->k_head;
            if (first + j + AHEAD < end)
                fetch_row(c, c->k, place_of(c, r, first + j + AHEAD, c->k_page, c->k_token) + head * c->k_head);
            fetch_row(c, c->v, place_of(c, r, first + j, c->v_page, c->v_token) + head * c->v_head);
            const float *key = read_row(room, c->k, at, c->dim, c->type);
            for (int64_t i = 0; i < c->width; i++)
                scores[i * KEYS + j] = dot(queries + i * c->dim, key, c->dim);
        }
        for (int64_t i = 0; i < c->width; i++) {
            for (int64_t j = keys; j < whole; j++)
                scores[i * KEYS + j] = -INFINITY;
            float kept = weigh(scores + i * KEYS, whole, part + 2 * i, part + 2 * i + 1);
            for (int64_t d = 0; d < c->dim; d++)
                values[i * c->dim + d] *= kept;
        }
        for (int64_t j = 0; j < keys; j++) {
            int64_t at = place_of(c, r, first + j, c->v_page, c->v_token) + head * c->v_head;
            const float *value = read_row(room, c->v, at, c->dim, c->type);
            for (int64_t i = 0; i < c->width; i++)
                for (int64_t d = 0; d < c->dim; d++)
                    values[i * c->dim + d] += scores[i * KEYS + j] * value[d];
        }
    }
    free(queries);
    return DONE;
}

// One chooser's partial softmaxes become the output of its query heads.
static void merge(const struct Decode *c, int64_t item)
{
    const float *parts = c->parts + item * c->slots * c->part;
    for (int64_t i = 0; i < c->width; i++) {
        int64_t row = item * c->width + i;
        const float *values = parts + 2 * c->width + i * c->dim;
        merge_parts(parts + 2 * i, values, c->part, c->slots, c->dim, c->out + row * c->dim, c->lse + row);
    }
}

// out [queries, hq, dim], lse [queries, hq] and indices [queries, hr, slots] of queries that are the last of the first
// `lengths` keys of cache rows `rows`; sums [Bc, blocks, hkv, dim], parts as long as the launcher says.
int decode(const void *q, const void *k, const void *v, const int32_t *table, const float *sums, const int32_t *rows,
           const int32_t *lengths, const int32_t *starts, int32_t *indices, float *out, float *lse, float *parts,
           int64_t type, int64_t queries, int64_t hq, int64_t hkv, int64_t hr, int64_t dim, int64_t block,
           int64_t blocks, int64_t sink, int64_t local, int64_t picks, int64_t pages, int64_t page, int64_t q_row,
           int64_t q_head, int64_t k_page, int64_t k_token, int64_t k_head, int64_t v_page, int64_t v_token,
           int64_t v_head, double scale, int64_t threads)
{
    int64_t slots = 1 + sink + local + picks, width = hq / hr;
    struct Decode call = {
        .q = q, .k = k, .v = v, .table = table, .sums = sums, .rows = rows, .lengths = lengths, .starts = starts,
        .indices = indices, .out = out, .lse = lse, .parts = parts, .type = type, .queries = queries, .hq = hq,
        .hkv = hkv, .hr = hr, .dim = dim, .block = block, .blocks = blocks, .sink = sink, .local = local,
        .picks = picks, .pages = pages, .page = page, .q_row = q_row, .q_head = q_head, .k_page = k_page,
        .k_token = k_token, .k_head = k_head, .v_page = v_page, .v_token = v_token, .v_head = v_head,
        .scale = (float)scale, .slots = slots, .width = width, .part = width * (dim + 2),
    };
    int failed = parallel(choose_item, &call, queries * hr, threads);
    failed = failed ? failed : parallel(attend_item, &call, queries * hr * slots, threads);
    for (int64_t i = 0; !failed && i < queries * hr; i++)
        merge(&call, i);
    return failed;
}
