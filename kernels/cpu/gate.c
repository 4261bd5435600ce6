// MoBA's gate: block means, and the best blocks of every query, a panel of scores at a time.
#include "choose.h"
#include "parallel.h"
#include "simd.h"

enum { TILE = 4 * ROWS };

struct Means {
    const void *k;
    const int32_t *cu_k, *cu_blocks;
    float *means;
    int64_t type, sequences, heads, dim, block, k_row, k_head;
};

// Keys are summed in runs of RUN and the runs in order, so that long blocks do not lose what pairwise sums keep.
static int mean_of_block(const void *call, int64_t item)
{
    const struct Means *c = call;
    int64_t seq = part_of(c->cu_blocks, c->sequences, item), dim = c->dim;
    int64_t start = c->cu_k[seq] + (item - c->cu_blocks[seq]) * c->block;
    int64_t count = least(c->block, c->cu_k[seq + 1] - start);
    float *room = malloc(2 * dim * sizeof *room), *run = room ? room + dim : NULL;
    if (!room)
        return NO_MEMORY;
    for (int64_t g = 0; g < c->heads; g++) {
        float *mean = c->means + (item * c->heads + g) * dim;
        memset(mean, 0, dim * sizeof *mean);
        for (int64_t first = 0; first < count; first += RUN) {
            memset(run, 0, dim * sizeof *run);
            for (int64_t i = first; i < least(first + RUN, count); i++) {
                const float *key = read_row(room, c->k, (start + i) * c->k_row + g * c->k_head, dim, c->type);
                for (int64_t d = 0; d < dim; d++)
                    run[d] += key[d];
            }
            for (int64_t d = 0; d < dim; d++)
                mean[d] += run[d];
        }
        for (int64_t d = 0; d < dim; d++)
            mean[d] /= (float)count;
    }
    free(room);
    return DONE;
}

// means [cu_blocks[sequences], heads, dim] of the blocks of keys [Nk, heads, dim].
int centroids(const void *k, const int32_t *cu_k, const int32_t *cu_blocks, float *means, int64_t type,
              int64_t sequences, int64_t heads, int64_t dim, int64_t block, int64_t k_row, int64_t k_head,
              int64_t threads)
{
    struct Means call = {
        .k = k, .cu_k = cu_k, .cu_blocks = cu_blocks, .means = means, .type = type, .sequences = sequences,
        .heads = heads, .dim = dim, .block = block, .k_row = k_row, .k_head = k_head,
    };
    return parallel(mean_of_block, &call, cu_blocks[sequences], threads);
}

struct Gate {
    const void *q;
    const float *means;
    const int32_t *cu_q, *cu_k, *cu_blocks, *chunks;
    int32_t *indices;
    float *scores;  // or NULL
    int64_t type, sequences, hq, hkv, hr, dim, block, causal, sink, local, picks, chunk, q_row, q_head;
};

// A query's own block, and where its candidates end.
struct Range {
    int64_t own, last;
};

INLINE struct Range range_of(const struct Gate *c, int64_t seq, int64_t row)
{
    int64_t nk = c->cu_k[seq + 1] - c->cu_k[seq], nq = c->cu_q[seq + 1] - c->cu_q[seq];
    if (!c->causal)
        return (struct Range){-1, ceil_div(nk, c->block)};
    int64_t own = (nk - nq + row) / c->block;
    return (struct Range){own, own - c->local};
}

static void emit(const struct Gate *c, int64_t at, int64_t slot, int64_t block, float score)
{
    c->indices[at + slot] = (int32_t)block;
    if (c->scores)
        c->scores[at + slot] = score;
}

// Slots in their order: own | sink | local | picks, as kernels/moba/spec.py says.
static void write_slots(const struct Gate *c, int64_t at, struct Range range, uint64_t *heap)
{
    int64_t slot = 0, limit = c->causal ? range.own : range.last;
    if (c->causal)
        emit(c, at, slot++, range.own, INFINITY);
    for (int64_t i = 0; i < c->sink; i++)
        i < limit ? emit(c, at, slot++, i, INFINITY) : emit(c, at, slot++, -1, -INFINITY);
    for (int64_t i = 0; i < c->local; i++) {
        int64_t block = range.own - 1 - i;
        block >= c->sink ? emit(c, at, slot++, block, INFINITY) : emit(c, at, slot++, -1, -INFINITY);
    }
    for (int64_t i = c->picks; i--;) {  // the least comes first and goes last
        uint64_t key = heap[0];
        replace_least(heap, c->picks, UINT64_MAX);
        key ? emit(c, at, slot + i, (uint32_t)~key, score_of(key)) : emit(c, at, slot + i, -1, -INFINITY);
    }
}

INLINE void offer(uint64_t *heap, int64_t picks, const float *scores, int64_t first, int64_t count)
{
    for (int64_t at = 0; at < count; at += LANES) {
        float bound = heap[0] ? score_of(heap[0]) : NAN;
        unsigned better = above(load(scores + at), bound);
        if (count - at < LANES)
            better &= (1u << (count - at)) - 1;
        for (; better; better &= better - 1) {
            int64_t i = at + __builtin_ctz(better);
            uint64_t key = key_of(scores[i], (uint32_t)(first + i));
            if (key > heap[0])
                replace_least(heap, picks, key);
        }
    }
}

// Up to WIDTH centroids from `first` on, of those below `last`, of one KV head, transposed; zeros fill the panel up.
static void pack_panel(const struct Gate *c, int64_t seq, int64_t head, int64_t first, int64_t last, float *to)
{
    for (int64_t j = 0; j < WIDTH; j++) {
        if (first + j >= last) {
            for (int64_t d = 0; d < c->dim; d++)
                to[d * WIDTH + j] = 0.0f;
            continue;
        }
        const float *mean = c->means + ((c->cu_blocks[seq] + first + j) * c->hkv + head) * c->dim;
        for (int64_t d = 0; d < c->dim; d++)
            to[d * WIDTH + j] = mean[d];
    }
}

// The query of a chooser: its head's, or the sum of its group's.
static void read_query(const struct Gate *c, int64_t row, int64_t head, float *to, float *room)
{
    int64_t width = c->hq / c->hr;
    read_scaled(to, c->q, row * c->q_row + head * width * c->q_head, c->dim, c->type, 1.0f);
    for (int64_t i = 1; i < width; i++) {
        const float *more = read_row(room, c->q, row * c->q_row + (head * width + i) * c->q_head, c->dim, c->type);
        for (int64_t d = 0; d < c->dim; d++)
            to[d] += more[d];
    }
}

// A chunk of queries of one chooser meets the centroids panel by panel.
static int gate_item(const void *call, int64_t item)
{
    const struct Gate *c = call;
    int64_t head = item % c->hr, dim = c->dim, picks = c->picks;
    int64_t seq = part_of(c->chunks, c->sequences, item / c->hr);
    int64_t begin = (item / c->hr - c->chunks[seq]) * c->chunk, nq = c->cu_q[seq + 1] - c->cu_q[seq];
    int64_t count = least(c->chunk, nq - begin), slots = c->causal + c->sink + c->local + picks;
    int64_t first = c->sink, last = picks ? range_of(c, seq, begin + count - 1).last : first;
    float *queries = malloc((count * dim + dim + WIDTH * dim + TILE * WIDTH) * sizeof *queries);
    uint64_t *heaps = calloc(most(count * picks, 1), sizeof *heaps);
    if (!queries || !heaps) {
        free(queries);
        free(heaps);
        return NO_MEMORY;
    }
    float *room = queries + count * dim, *panel = room + dim, *scores = panel + WIDTH * dim;
    for (int64_t i = 0; last > first && i < count; i++)
        read_query(c, c->cu_q[seq] + begin + i, head, queries + i * dim, room);
    for (int64_t at = first; at < last; at += WIDTH) {
        pack_panel(c, seq, head / (c->hr / c->hkv), at, last, panel);
        for (int64_t row = 0; row < count; row += TILE) {
            int64_t rows = least(TILE, count - row);
            if (range_of(c, seq, begin + row + rows - 1).last <= at)
                continue;
            product(rows, VECTORS, queries + row * dim, dim, panel, dim, dim, scores, WIDTH);
            for (int64_t i = 0; i < rows; i++) {
                int64_t live = least(WIDTH, range_of(c, seq, begin + row + i).last - at);
                offer(heaps + (row + i) * picks, picks, scores + i * WIDTH, at, live);
            }
        }
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t at = ((c->cu_q[seq] + begin + i) * c->hr + head) * slots;
        write_slots(c, at, range_of(c, seq, begin + i), heaps + i * picks);
    }
    free(queries);
    free(heaps);
    return DONE;
}

// indices, scores [Nq, hr, slots] of queries [Nq, hq, dim]; `chunks[s]` chunks of `chunk` queries lie before sequence
// s.
int gate(const void *q, const float *means, const int32_t *cu_q, const int32_t *cu_k, const int32_t *cu_blocks,
         const int32_t *chunks, int32_t *indices, float *scores, int64_t type, int64_t sequences, int64_t hq,
         int64_t hkv, int64_t hr, int64_t dim, int64_t block, int64_t causal, int64_t sink, int64_t local,
         int64_t picks, int64_t chunk, int64_t q_row, int64_t q_head, int64_t threads)
{
    struct Gate call = {
        .q = q, .means = means, .cu_q = cu_q, .cu_k = cu_k, .cu_blocks = cu_blocks, .chunks = chunks,
        .indices = indices, .scores = scores, .type = type, .sequences = sequences, .hq = hq, .hkv = hkv, .hr = hr,
        .dim = dim, .block = block, .causal = causal, .sink = sink, .local = local, .picks = picks, .chunk = chunk,
        .q_row = q_row, .q_head = q_head,
    };
    return parallel(gate_item, &call, chunks[sequences] * hr, threads);
}
