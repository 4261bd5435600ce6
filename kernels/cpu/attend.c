// MoBA attention: blocks are walked in order; each is packed once and meets every query of the item that attends it.
//
// A query keeps one running softmax (maximum, sum, weighted values), so its blocks are summed in rising order whatever
// the slots, chunks or threads are, and results repeat bit for bit. A value that is not finite may reach queries of its
// tile that are before it.
#include "parallel.h"
#include "tiles.h"

struct Attend {
    const void *q, *k, *v;
    const int32_t *indices, *cu_q, *cu_k, *chunks;
    float *out, *lse;
    int64_t type, sequences, hq, hkv, hr, dim, slots, own, block, chunk, q_row, q_head, k_row, k_head, v_row, v_head;
    float scale;
};

// What one item works on: queries [begin, end) of a sequence with the query heads of KV head `head`. A row is a query
// and one of these heads; a choice is a query and a chooser, and stands for `width` rows.
struct Item {
    int64_t seq, head, begin, end, group, choosers, width, before;
    struct Tiles tiles;
    int32_t *choices, *ends;  // choices by block, and where each block's end
};

static void pack_tile(const struct Attend *c, struct Item *it, int64_t key, int64_t count)
{
    int64_t start = c->cu_k[it->seq] + key;
    struct Tiles *t = &it->tiles;
    t->packed = ceil_div(count, LANES) * LANES;
    for (int64_t j = 0; j < t->packed; j++) {
        int64_t at = (start + j) * c->k_row + it->head * c->k_head;
        pack_key(t, j, j < count ? read_row(t->products, c->k, at, c->dim, c->type) : NULL);
    }
    for (int64_t j = 0; j < count; j++)
        pack_value(t, j, c->v, (start + j) * c->v_row + it->head * c->v_head, c->type);
}

INLINE int64_t query_at(const struct Attend *c, const struct Item *it, int64_t row)
{
    int64_t token = c->cu_q[it->seq] + it->begin + row / it->group, head = it->head * it->group + row % it->group;
    return token * c->q_row + head * c->q_head;
}

// Rows `rows[i]` attend the first `live[i]` keys of the packed tile.
static void attend_rows(const struct Attend *c, const struct Item *it, const int64_t *rows, const int64_t *live,
                        int64_t count)
{
    const struct Tiles *t = &it->tiles;
    for (int64_t i = 0; i < count; i++)
        read_scaled(t->queries + i * c->dim, c->q, query_at(c, it, rows[i]), c->dim, c->type, c->scale);
    attend_tile(t, t->queries, rows, live, count);
}

// The choices of block `block`, tile by tile.
static void attend_choices(const struct Attend *c, const struct Item *it, int64_t block, int64_t keys)
{
    int64_t room[2][TILE], *rows = room[0], *next = room[1], live[TILE], first = block ? it->ends[block - 1] : 0;
    int64_t count = (it->ends[block] - first) * it->width, ready = 0, element = c->type == FLOAT ? 4 : 2;
    for (int64_t i = 0; i < TILE; i++)
        live[i] = keys;
    for (int64_t done = 0; done < count + TILE; done += TILE) {
        // Rows of the tile after the one at hand, on their way while that one is computed.
        int64_t n = most(least(TILE, count - done), 0);
        for (int64_t i = 0; i < n; i++) {
            next[i] = it->choices[first + (done + i) / it->width] * it->width + (done + i) % it->width;
            fetch((const char *)c->q + query_at(c, it, next[i]) * element, c->dim * element);
        }
        if (ready)
            attend_rows(c, it, rows, live, ready);
        int64_t *swap = rows;
        rows = next, next = swap, ready = n;
    }
}

// The queries that live in the block of keys [key, key + keys) of the tile, which see keys up to their own.
static void attend_own(const struct Attend *c, const struct Item *it, int64_t key, int64_t keys, int64_t block_end)
{
    int64_t rows[TILE], live[TILE];
    int64_t first = (most(key - it->before, it->begin) - it->begin) * it->group;
    int64_t end = (least(block_end - it->before, it->end) - it->begin) * it->group;
    for (; first < end; first += TILE) {
        int64_t n = least(TILE, end - first);
        for (int64_t i = 0; i < n; i++) {
            rows[i] = first + i;
            live[i] = least(keys, it->before + it->begin + rows[i] / it->group - key + 1);
        }
        attend_rows(c, it, rows, live, n);
    }
}

// Counting sort of the item's choices by block; ascending within one.
static int sort_choices(const struct Attend *c, const struct Item *it, int64_t blocks)
{
    int64_t choices = (it->end - it->begin) * it->choosers;
    memset(it->ends, 0, (blocks + 1) * sizeof *it->ends);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < choices; i++) {
            int64_t token = c->cu_q[it->seq] + it->begin + i / it->choosers;
            int64_t chooser = it->head * it->choosers + i % it->choosers;
            const int32_t *slot = c->indices + (token * c->hr + chooser) * c->slots;
            for (int64_t s = c->own; s < c->slots; s++) {
                if (slot[s] < 0)
                    continue;
                if (slot[s] >= blocks)
                    return BAD_INDEX;
                if (pass)
                    it->choices[it->ends[slot[s]]++] = (int32_t)i;
                else
                    it->ends[slot[s] + 1]++;
            }
        }
        // After the first pass ends[b] is where block b begins; filling moves it to where it ends.
        for (int64_t b = 0; !pass && b < blocks; b++)
            it->ends[b + 1] += it->ends[b];
    }
    return DONE;
}

static void finish(const struct Attend *c, const struct Item *it)
{
    for (int64_t row = 0; row < (it->end - it->begin) * it->group; row++) {
        int64_t token = c->cu_q[it->seq] + it->begin + row / it->group;
        int64_t at = token * c->hq + it->head * it->group + row % it->group;
        finish_row(&it->tiles, row, c->out + at * c->dim, c->lse + at);
    }
}

static int attend_item(const void *call, int64_t number)
{
    const struct Attend *c = call;
    struct Item it = {.head = number % c->hkv, .group = c->hq / c->hkv, .choosers = c->hr / c->hkv};
    int64_t chunk = number / c->hkv, seq = part_of(c->chunks, c->sequences, chunk);
    int64_t nq = c->cu_q[seq + 1] - c->cu_q[seq], nk = c->cu_k[seq + 1] - c->cu_k[seq], block = c->block;
    it.seq = seq, it.width = it.group / it.choosers, it.before = nk - nq;
    it.begin = (chunk - c->chunks[seq]) * c->chunk, it.end = least(it.begin + c->chunk, nq);
    int64_t rows = (it.end - it.begin) * it.group, blocks = ceil_div(nk, block);
    int32_t *lists = malloc((rows / it.width * (c->slots - c->own) + blocks + 1) * sizeof *lists);
    if (!lists || !open_tiles(&it.tiles, rows, c->dim)) {
        free(lists);
        return NO_MEMORY;
    }
    it.ends = lists, it.choices = lists + blocks + 1;
    int failed = sort_choices(c, &it, blocks);
    for (int64_t b = 0; !failed && b < blocks; b++) {
        int64_t start = b * block, end = least(start + block, nk);
        int own = c->own && it.before + it.begin < end && it.before + it.end > start;
        if (!own && it.ends[b] == (b ? it.ends[b - 1] : 0))
            continue;
        for (int64_t key = start; key < end; key += KEYS) {
            int64_t keys = least(KEYS, end - key);
            pack_tile(c, &it, key, keys);
            attend_choices(c, &it, b, keys);
            if (own)
                attend_own(c, &it, key, keys, end);
        }
    }
    if (!failed)
        finish(c, &it);
    free(it.tiles.values);
    free(lists);
    return failed;
}

// out [Nq, hq, dim] and lse [Nq, hq] over the blocks that `indices [Nq, hr, slots]` name, the first slot being the own
// block where `own`; `chunks[s]` chunks of `chunk` queries lie before sequence s.
int attend(const void *q, const void *k, const void *v, const int32_t *indices, const int32_t *cu_q,
           const int32_t *cu_k, const int32_t *chunks, float *out, float *lse, int64_t type, int64_t sequences,
           int64_t hq, int64_t hkv, int64_t hr, int64_t dim, int64_t slots, int64_t own, int64_t block, int64_t chunk,
           int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, double scale,
           int64_t threads)
{
    struct Attend call = {
        .q = q, .k = k, .v = v, .indices = indices, .cu_q = cu_q, .cu_k = cu_k, .chunks = chunks, .out = out,
        .lse = lse, .type = type, .sequences = sequences, .hq = hq, .hkv = hkv, .hr = hr, .dim = dim, .slots = slots,
        .own = own, .block = block, .chunk = chunk, .q_row = q_row, .q_head = q_head, .k_row = k_row,
        .k_head = k_head, .v_row = v_row, .v_head = v_head, .scale = (float)scale,
    };
    return parallel(attend_item, &call, chunks[sequences] * hkv, threads);
}
